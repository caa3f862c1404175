"""implementation="cudnn" on a GPU: exact where it serves, whatever unseen slots hold."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, low_precision_attention, make_case, reference_attention

from jaxdecode.pallas_kernels import decode_attention

pytestmark = pytest.mark.gpu

LENGTHS = (1, 0, 63, 64, 65, 500, 1000)


def check(case, **options):
    arrays = [jnp.asarray(x) for x in (case.q, case.k, case.v, case.kv_len)]
    out = np.asarray(decode_attention(*arrays, implementation="cudnn", **options))
    ref, _ = reference_attention(case.q, case.k, case.v, case.kv_len, **options)
    low = low_precision_attention(case.q, case.k, case.v, case.kv_len, **options)
    assert_close(out, ref, low, case.q.dtype)
    np.testing.assert_array_equal(out[case.kv_len == 0], 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("H", [64, 80, 128])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (6, 1)], ids=str)
def test_against_the_oracle(heads, H, dtype):
    check(make_case(LENGTHS, 1, *heads, H, S=1000, dtype=dtype))


def test_a_query_may_stand_before_the_last_token():
    case = make_case((1000, 700), 1, 8, 2, 128, S=1024, dtype="bfloat16")
    check(case, q_start=np.array([500, 699]))


@pytest.mark.parametrize("dead", [np.nan, np.inf, 3e38])
def test_dead_slots_do_not_matter(dead):
    case = make_case(LENGTHS, 1, 8, 2, 128, S=1024, dtype="bfloat16")
    check(case.with_dead_slots(dead, dead))
