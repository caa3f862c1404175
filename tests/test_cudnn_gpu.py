"""cuDNN on a GPU: exact where it serves, whatever unseen slots hold, and how it meets JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
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
@pytest.mark.parametrize("H", [64, 80, 96, 128, 192, 256])
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


def many_short():
    """A large batch, with empty rows and NaN in dead slots."""
    lengths = np.arange(256) * 7 % 258
    case = make_case(tuple(lengths.clip(max=256).tolist()), 1, 8, 2, 128, S=256, dtype="bfloat16")
    return case.with_dead_slots(np.nan, np.nan)


def operands(case):
    return [jnp.asarray(x) for x in (case.q, case.k, case.v, case.kv_len)]


def test_many_short_sequences():
    check(many_short())


def attend(*operands):
    return decode_attention(*operands, implementation="cudnn")


def test_vmap_and_gradient():
    q, k, v, kv_len = operands(many_short())
    halves = [x.reshape(2, 128, *x.shape[1:]) for x in (q, k, v, kv_len)]

    whole = attend(q, k, v, kv_len)
    parts = jax.vmap(attend)(*halves)
    parts, whole = (np.asarray(x, np.float32) for x in (parts.reshape(whole.shape), whole))
    np.testing.assert_allclose(parts, whole, atol=0.02)

    def gradient(implementation):
        def loss(q, k, v):
            out = decode_attention(q, k, v, kv_len, implementation=implementation)
            return jnp.sum(out.astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    for ours, theirs in zip(gradient("cudnn"), gradient("xla"), strict=True):
        ours, theirs = (np.asarray(x, np.float32) for x in (ours, theirs))
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, atol=0.02 * np.abs(theirs).max())


def test_inside_shard_map():
    arrays = operands(many_short())
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=(P("data"),) * 4, out_specs=P("data"))
    found, expected = (f(*arrays).astype(jnp.float32) for f in (jax.jit(sharded), attend))
    # cuDNN rounds an element differently now and then.
    np.testing.assert_allclose(found, expected, rtol=0.01, atol=0.01)
