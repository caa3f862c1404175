"""Both steps of Flash-Decoding in one launch, on a GPU: what thread blocks tell each other is there
when it is taken, and the memory that they tell it in is left as it was found."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_flash_decode_gpu import inputs

from jaxdecode.pallas_kernels import decode_attention, flash_decode, part_slots
from jaxdecode.pallas_kernels.decode_attention import visible_ranges
from jaxdecode.pallas_kernels.flash_decode_kernel import attention_in_one
from jaxdecode.pallas_kernels.planned_kernel import planned_attention_in_one
from jaxdecode.pallas_kernels.split_config import choose_num_splits, num_row_blocks, split_config

pytestmark = pytest.mark.gpu

# B, S, N, K, T, H: every number of parts, of lanes and of tasks of a thread; and by plan.
SHAPES = [
    (1, 256, 16, 2, 1, 128), (1, 512, 16, 2, 1, 128), (1, 1024, 8, 2, 2, 64),
    (1, 4096, 9, 3, 5, 80), (1, 8192, 16, 2, 1, 128), (1, 8192, 64, 8, 1, 128),
    (1, 32768, 8, 1, 1, 256), (1, 32768, 1, 1, 1, 96), (1, 2048, 40, 10, 1, 192),
    (60, 2048, 16, 2, 1, 128), (130, 512, 4, 4, 1, 64), (37, 1000, 9, 3, 5, 80),
]  # fmt: skip


def attend(q, k, v, kv_len, **options):
    return decode_attention(
        q, k, v, kv_len, implementation="flash_decode", return_lse=True, **options
    )


def some_lengths(B, S, seed=0):
    """Any, in a batch an empty and a full one among them."""
    lengths = np.random.default_rng(seed).integers(0, S + 1, B)
    if B > 1:
        lengths[0], lengths[-1] = 0, S
    return jnp.asarray(lengths, jnp.int32)


def kernels_in(call, *operands):
    return jax.jit(call).lower(*operands).as_text().count("custom_call @mosaic_gpu")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_one_launch_finds_what_two_do(monkeypatch, shape, sinks):
    B, S, N, K, T, H = shape
    operands = *inputs(B, S, N, K, T, H), some_lengths(B, S)
    options = {"sinks": jax.random.normal(jax.random.key(1), (N,))} if sinks else {}
    call = functools.partial(attend, out_dtype="float32", **options)
    assert kernels_in(call, *operands) == 1
    found = jax.jit(functools.partial(call))(*operands)
    monkeypatch.setattr(flash_decode, "merges_in_one", lambda *shapes: False)
    assert kernels_in(functools.partial(call), *operands) == 2
    expected = jax.jit(functools.partial(call))(*operands)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("shape", [(1, 8192, 16, 2, 1, 128), (60, 2048, 16, 2, 1, 128)], ids=str)
def test_calls_after_one_another_are_bit_equal(shape):
    """With other lengths in between, so that no slot may be left from the call before."""
    B, S, N, K, T, H = shape
    q, k, v = inputs(B, S, N, K, T, H)
    lengths = [some_lengths(B, S, seed) for seed in range(5)]
    call = jax.jit(attend)
    first = [call(q, k, v, x) for x in lengths]
    for _ in range(250):
        for x, expected in zip(lengths, first, strict=True):
            found = call(q, k, v, x)
            assert all(bool((a == b).all()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(1, 4096, 16, 2, 1, 128), (60, 512, 16, 2, 1, 128)], ids=str)
def test_calls_of_one_program_share_their_slots(shape):
    """Independent of each other, and one after the other in a loop."""
    B, S, N, K, T, H = shape
    q, k, v = inputs(B, S, N, K, T, H)
    lengths = jnp.stack([some_lengths(B, S, seed) for seed in range(16)])
    expected = [jax.jit(attend)(q, k, v, x) for x in lengths]

    @jax.jit
    def together(q, k, v, lengths):
        return [attend(q, k, v, x) for x in lengths]

    @jax.jit
    def in_a_loop(q, k, v, lengths):
        return jax.lax.map(lambda x: attend(q, k, v, x), lengths)

    for _ in range(20):
        for found in (together(q, k, v, lengths), zip(*in_a_loop(q, k, v, lengths), strict=True)):
            for pair, other in zip(found, expected, strict=True):
                for x, y in zip(pair, other, strict=True):
                    np.testing.assert_array_equal(x, y)


def test_programs_take_turns():
    """Those with equally many slots may have the same ones."""
    calls = [jax.jit(functools.partial(attend, scale=scale)) for scale in (0.1, 0.2, 0.3)]
    operands = *inputs(1, 2048, 16, 2), some_lengths(1, 2048)
    expected = [call(*operands) for call in calls]
    for _ in range(50):
        for found, other in zip([call(*operands) for call in calls], expected, strict=True):
            np.testing.assert_array_equal(found[0], other[0])


@pytest.mark.parametrize("shape", [(1, 4096, 9, 3, 5, 80), (60, 512, 9, 3, 1, 96)], ids=str)
def test_slots_are_left_as_they_were_found(shape):
    B, S, N, K, T, H = shape
    q, k, v = inputs(B, S, N, K, T, H)
    ranges = visible_ranges(some_lengths(B, S), T, S)
    num_splits = choose_num_splits(q.shape, k.shape) if B == 1 else None
    config = split_config(q.shape, k.shape, num_splits, 0.1, None)
    plan = None if B == 1 else flash_decode._plan(*ranges, k.shape, config)
    parts = num_row_blocks(q.shape, k.shape) * num_splits if plan is None else 2 * len(plan.blocks)
    before = part_slots.new_slots(parts, config)

    @jax.jit
    def call(slots):
        operands = q, k, v, *ranges, None, slots
        if plan is None:
            return attention_in_one(*operands, jnp.float32, config)
        return planned_attention_in_one(*operands, plan, jnp.float32, config)

    slots = jnp.asarray(before)
    for _ in range(3):
        jax.block_until_ready(call(slots))
        marks = np.asarray(slots.copy()).reshape(-1, part_slots.SLOT)[:, -1]
        np.testing.assert_array_equal(marks, before.reshape(-1, part_slots.SLOT)[:, -1])
