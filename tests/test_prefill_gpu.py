"""The wide-query kernel on a GPU: every share of a block, every option, long caches.

conftest.py leaves this file out where jax has no GPU kernels (before 0.11.2).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_runs import inputs
from reference import assert_close, low_precision_attention, make_case, reference_attention
from test_prefill import CASES, attend, check

from jaxdecode.pallas_kernels import decode_attention, flash_decode, prefill, xla
from jaxdecode.pallas_kernels.decode_attention import visible_ranges

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("T", [17, 64, 200])
@pytest.mark.parametrize("heads", [(4, 4), (8, 1), (8, 2), (9, 3)], ids=str)
def test_gpu_grid(heads, T, dtype):
    check(2, T, 1024, *heads, 128, {}, dtype)


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("H", flash_decode.HEAD_DIMS)
def test_gpu_head_dims(H, out_dtype):
    check(1, 136, 512, 4, 2, H, {"window": 300}, out_dtype=out_dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("H", [64, 128])
def test_gpu_options(name, H):
    B, T, S, N, K, _, options = CASES[name]
    check(B, T, S, N, K, H, options)


@pytest.mark.parametrize("T", [1, 16, 17, 129])
def test_gpu_long_cache_with_needles(T):
    """A key that dominates at both sides of every tile, and poison right after the last key."""
    case = make_case([16384, 9000], T=T, N=4, K=2, H=128, dtype="bfloat16", S=16384, edge=128)
    case = case.with_dead_slots(np.nan, np.nan)
    arrays = case.q, case.k, case.v, case.kv_len
    out, lse = attend(*(jnp.asarray(x) for x in arrays))
    ref, ref_lse = reference_attention(*arrays)
    low = low_precision_attention(*arrays, out_dtype=jnp.float32)
    assert_close(np.asarray(out), ref, low, "bfloat16", lse=np.asarray(lse), ref_lse=ref_lse)


@pytest.mark.parametrize("q_start", [0, 6000, 14336])
def test_gpu_full_chunk_is_that_of_the_portable_implementation(q_start):
    """A size at which every multiprocessor has several blocks."""
    q, k, v, _ = inputs(1, 2048, 16384, 16, 2, 128, kv_len=[q_start + 2048])
    lo, hi = visible_ranges(
        jnp.array([q_start + 2048]), 2048, 16384, q_start=jnp.array([q_start]), window=5000
    )
    out, lse = prefill.attend(q, k, v, lo, hi, scale=0.1)
    ref, ref_lse = xla.attend(q, k, v, lo, hi, scale=0.1)
    np.testing.assert_allclose(lse, ref_lse, rtol=1e-4, atol=1e-4)
    assert float(jnp.linalg.norm(out - ref) / jnp.linalg.norm(ref)) < 5e-3
    assert float(jnp.abs(out - ref).max() / jnp.abs(ref).max()) < 2e-2


def test_gpu_chunks_add_up_to_the_whole():
    """A prompt in chunks of any size gives what it gives at once."""
    q, k, v, _ = inputs(1, 500, 512, 4, 2, 128, kv_len=[500])
    whole, _ = attend(q, k, v, np.array([500], np.int32))
    for size in (64, 100, 250):
        starts = range(0, 500, size)
        parts = [attend(q[:, s : s + size], k, v, np.array([500]), q_start=[s])[0] for s in starts]
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=0.02, atol=2e-3)


def test_gpu_repeats_are_bit_equal():
    call = jax.jit(attend)
    arrays = inputs(2, 256, 8192, 16, 2, 128, kv_len=[8192, 5000])
    first = jax.tree.map(np.asarray, call(*arrays))
    for _ in range(250):
        again = jax.tree.map(np.asarray, call(*arrays))
        assert all((x == y).all() for x, y in zip(first, again, strict=True))


def test_gpu_rows_do_not_depend_on_the_batch():
    q, k, v, kv_len = inputs(3, 200, 2048, 8, 2, 128, kv_len=[2048, 150, 1111])
    whole, _ = attend(q, k, v, kv_len)
    for row in range(3):
        one = slice(row, row + 1)
        alone, _ = attend(q[one], k[one], v[one], kv_len[one])
        np.testing.assert_array_equal(whole[one], alone)


def test_gpu_gradient():
    q, k, v, _ = inputs(1, 72, 256, 4, 2, 128, kv_len=[256])
    lo, hi = visible_ranges(jnp.array([200]), 72, 256)

    def loss(implementation, *arrays):
        out, lse = implementation(*arrays, lo, hi, scale=0.1)
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse**2)

    found = jax.grad(functools.partial(loss, prefill.attend), (0, 1, 2))(q, k, v)
    expected = jax.grad(functools.partial(loss, xla.attend), (0, 1, 2))(q, k, v)
    for x, y in zip(found, expected, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=0.05, atol=0.02)


def test_gpu_offsets_past_two_to_the_31():
    """The last row lies past 2^31 elements: a 32-bit offset would read the first one."""
    B, S, K, H = 3, 2**20, 8, 128
    k = jnp.zeros((B, S, K, H), jnp.bfloat16).at[B - 1].set(1.0)
    q = jnp.ones((B, 32, K, H), jnp.bfloat16)
    out = decode_attention(q, k, k, np.array([32, 32, S]), implementation="flash_decode")
    assert out[0, 0, 0, 0] == 0.0
    assert abs(out[B - 1, 0, 0, 0] - 1.0) < 1e-2
