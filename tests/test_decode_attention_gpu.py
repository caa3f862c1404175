"""The contract of decode_attention on a GPU, by flash_decode; and a call that is exported.

The tests are those of test_decode_attention.py, on its cases in bfloat16 and with capacities that
the kernels take. Left out is what they do not promise or do not decide: NaN in a slot that only
other queries of the sequence see, and how lengths may be given.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_decode_attention as suite
from reference import Case, make_case

from jaxdecode.pallas_kernels import decode_attention, flash_decode

pytestmark = pytest.mark.gpu

SERVED = "flash_decode", "bfloat16"
# Each layout of heads twice, and every head_dim.
PAIRS = [(suite.HEADS[i % 5], suite.HEAD_DIMS[i % 6]) for i in range(10)]


def served_case(
    kv_len: Iterable[int], *sizes: int, S: int | None = None, dtype: str = "", **others: Any
) -> Case:
    """`make_case` in bfloat16, with the next larger capacity that the kernels take."""
    del dtype
    lengths = list(kv_len)
    S = max(lengths) + 3 if S is None else S
    return make_case(lengths, *sizes, S=max(64, -(-S // 8) * 8), dtype="bfloat16", **others)


@pytest.fixture(autouse=True)
def cases_in_bfloat16(monkeypatch):
    monkeypatch.setattr(suite, "make_case", served_case)


@pytest.mark.parametrize(("heads", "H"), PAIRS, ids=str)
def test_heads_and_head_dims(heads, H):
    assert flash_decode.HEAD_DIMS == tuple(suite.HEAD_DIMS)
    suite.test_heads_and_head_dims(SERVED[0], heads, H)


@pytest.mark.parametrize("T", [1, 5, 17])
def test_ragged_lengths_at_every_edge(T):
    suite.test_ragged_lengths_at_every_edge(SERVED[0], T, SERVED[1])


@pytest.mark.parametrize("name", suite.OPTIONS)
def test_options(name):
    suite.test_options(SERVED[0], name)


@pytest.mark.parametrize("out_dtype", ["float32", "float16"])
def test_out_dtype(out_dtype):
    suite.test_out_dtype(*SERVED, out_dtype)


def test_the_rows_that_are_exact(monkeypatch):
    suite.test_default_q_start_puts_the_last_query_last(SERVED[0])
    # The kernels' logarithms are of base 2: what goes there and back is rounded.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    monkeypatch.setattr(np.testing, "assert_array_equal", close)
    suite.test_empty_rows_are_exact(*SERVED)


@pytest.mark.parametrize("T", [1, 4])
def test_dead_slots_never_matter(T):
    suite.test_dead_slots_never_matter(SERVED[0], T, SERVED[1])


def test_slots_left_of_the_window_never_matter():
    suite.test_slots_left_of_the_window_never_matter(SERVED[0])


def test_64k_slots_with_needles():
    suite.test_64k_slots_with_needles(*SERVED)


@pytest.mark.parametrize(
    "wrong",
    [
        suite.swapped, suite.longer, suite.shorter, suite.without_block, suite.without_needle,
        suite.heads_crossed, suite.rows_crossed,
    ],
)  # fmt: skip
def test_the_comparison_rejects(wrong):
    suite.test_the_comparison_rejects(SERVED[0], wrong, SERVED[1])


def test_repeated_calls_are_bit_equal():
    suite.test_repeated_calls_are_bit_equal(SERVED[0])


@pytest.mark.parametrize("kind", ["huge", "equal", "one_hot", "denormal"])
def test_extreme_logits(kind):
    suite.test_extreme_logits(SERVED[0], kind, SERVED[1])


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("written", [False, True])
def test_an_exported_call_says_the_same(B, written):
    """One sequence goes in equal chunks, several by a plan that is part of the program."""
    if written:
        pytest.importorskip("flatbuffers", reason="JAX writes exported functions with flatbuffers")
    case = make_case([1000, 0, 65][:B], 1, 16, 2, 128, S=1024, dtype="bfloat16")
    arrays = [jnp.asarray(x) for x in dataclasses.astuple(case)]
    exported = exported_for_cuda(arrays)
    if written:
        exported = jax.export.deserialize(exported.serialize())
    assert "mosaic_gpu" in exported.mlir_module()
    np.testing.assert_array_equal(exported.call(*arrays), jax.jit(decode_attention)(*arrays))


def exported_for_cuda(arrays: list[jax.Array]) -> jax.export.Exported:
    # Where jax does not promise yet that later versions run Mosaic's kernels.
    kernels = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    call = jax.jit(decode_attention)
    return jax.export.export(call, platforms=["cuda"], disabled_checks=[kernels])(*arrays)
