"""Both steps of Flash-Decoding in one launch, interpreted on the CPU.

The interpreter has no inline assembly, so here slots are plain memory that nobody waits for and
nobody clears: thread blocks that run again with the same slots find all that the others told the
first time. What the assembly does is tested on a GPU (test_flash_decode_gpu.py).

conftest.py leaves this file out where jax has no interpreter for the kernels (before 0.11.2).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_runs import inputs
from reference import assert_close, low_precision_attention, reference_attention

from jaxdecode.pallas_kernels import (
    combine_partials,
    flash_decode,
    merge_kernel,
    part_slots,
    planned_kernel,
)
from jaxdecode.pallas_kernels import flash_decode_kernel as equal_chunks
from jaxdecode.pallas_kernels.decode_attention import visible_ranges
from jaxdecode.pallas_kernels.mosaic import THREADS
from jaxdecode.pallas_kernels.split_config import num_row_blocks, split_config

WARPS, LANES, SLOTS, WORDS = 4, 4, part_slots.GROUP_SLOTS, part_slots.WORDS


def tell(out, lse, ref, config):
    """Each row's groups of sixteen columns: eight slots of two columns eight apart."""
    rows, H = config.block_t * config.block_g, config.head_dim
    near, far = (out[:H, :rows].T.reshape(rows, -1, 2, SLOTS)[:, :, i] for i in range(2))
    lse = jnp.broadcast_to(lse[:rows, None, None], near.shape)
    words = [lax.bitcast_convert_type(x, jnp.int32) for x in (near, far, lse)]
    ref[...] = jnp.stack([*words, jnp.ones_like(words[0])], axis=-1).reshape(-1)


def take(ref, first, count, stride, extra):
    """What is told already of each thread's slots; and counts who takes them."""
    words = ref[...]
    slots, marks = words.reshape(-1, part_slots.SLOT), []
    sums = None
    for word in range(WORDS):
        place = first if word == 0 else first - (0 if extra is None else extra) + word * stride
        wanted = jnp.full(first.shape, True) if count is None else word < count
        marks.append(jnp.where(wanted, part_slots.SLOT * place + part_slots.SLOT - 1, words.size))
        found = slots[jnp.where(wanted, place, 0)]
        near, far, lse = (lax.bitcast_convert_type(found[:, i], jnp.float32) for i in range(3))
        told = wanted & (found[:, 3] > 0)
        one = jnp.where(told, lse, -jnp.inf), jnp.where(told, 1.0, 0.0)
        one = *one, jnp.where(told, near, 0.0), jnp.where(told, far, 0.0)
        sums = one if sums is None else added(sums, one)
    ref[...] = words.at[jnp.concatenate(marks)].add(1, mode="drop")
    # A part that sees nothing has no weight.
    return [sums[0], *(jnp.where(sums[0] == -jnp.inf, 0.0, x) for x in sums[1:])]


def added(sums, others):
    top = jnp.maximum(sums[0], others[0])
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    x, y = (jnp.exp2(each[0] - shift) for each in (sums, others))
    return top, *(a * x + b * y for a, b in zip(sums[1:], others[1:], strict=True))


def across_lanes(x, bits, combine):
    add = {"max": jnp.maximum, "sum": jnp.add}[combine]
    lanes = x.reshape(-1, LANES // 2, 2, SLOTS)
    lanes = jnp.where(bits > 0, add(lanes, lanes[:, :, ::-1]), lanes)
    lanes = jnp.where(bits > 1, add(lanes, lanes[:, ::-1]), lanes)
    return lanes.reshape(x.shape)


def across_warps(sums, bits, scratch_ref):
    del scratch_ref
    warps = 1 << (bits - part_slots.WARP_BITS)
    warp = jnp.arange(WARPS)

    def other(x, j):
        shape = x.shape
        source = jnp.where(j < warps, (warp & -warps) + j, warp)
        return x.reshape(-1, WARPS, THREADS // WARPS)[:, source].reshape(shape)

    result = None
    for j in range(WARPS):
        one = [other(x, j) for x in sums]
        one[0] = jnp.where(j < warps, one[0], -jnp.inf)
        result = tuple(one) if result is None else added(result, one)
    return list(result)


def gather(ref, index):
    return ref[...][index]


def scatter(ref, index, value):
    """All of it is of one sequence, of which nobody else writes meanwhile."""
    size = ref.size // ref.shape[0]
    sequence = index.max() // size

    @pl.when(sequence >= 0)
    def _():
        old = ref[sequence]
        places = jnp.where(index < 0, size, index - sequence * size)
        ref[sequence] = old.reshape(-1).at[places].set(value, mode="drop").reshape(old.shape)


@pytest.fixture
def plain_slots(monkeypatch, interpreter_without_races):
    for module in (equal_chunks, planned_kernel):
        monkeypatch.setattr(module, "tell", tell)
    for function in (take, across_lanes, across_warps, gather, scatter):
        monkeypatch.setattr(merge_kernel, function.__name__, function)


def attend(q, k, v, kv_len, sinks, window, num_splits, blocks):
    """(out, lse) once all is told: by plan for so many blocks, or else in equal chunks."""
    ranges = visible_ranges(jnp.asarray(kv_len), q.shape[1], k.shape[1], window=window)
    config = split_config(q.shape, k.shape, num_splits, q.shape[-1] ** -0.5, None)
    plan = None if blocks is None else flash_decode._plan(*ranges, k.shape, config)
    parts = 2 * blocks if blocks else num_splits * num_row_blocks(q.shape, k.shape)
    slots = jax.new_ref(jnp.asarray(part_slots.new_slots(parts, config)))

    @jax.jit
    def run(plan, *operands):
        if plan is None:
            return equal_chunks.attention_in_one(*operands, jnp.float32, config)
        out, lse = planned_kernel.planned_attention_in_one(*operands, plan, jnp.float32, config)
        return out.reshape(q.shape), flash_decode._lse_of_tokens(lse, q.shape[:3], config)

    for _ in range(2):
        results = run(plan, q, k, v, *ranges, sinks, slots)
    return tuple(map(np.asarray, results))


def check(shape, H, kv_len, *, num_splits=None, blocks=None, window=None, sinks=False):
    q, k, v, kv_len = inputs(*shape, H, jnp.bfloat16, kv_len, window)
    options = {"window": window}
    if sinks:
        options["sinks"] = jnp.asarray(np.random.default_rng(1).normal(size=shape[3]), jnp.float32)
    out, lse = attend(q, k, v, kv_len, options.get("sinks"), window, num_splits, blocks)
    case = [np.asarray(x) for x in (q, k, v)]
    ref, ref_lse = reference_attention(*case, kv_len, **options)
    low = low_precision_attention(*case, kv_len, **options, out_dtype=jnp.float32)
    assert_close(out, ref, low, q.dtype, lse=lse, ref_lse=ref_lse)


# (B, T, S, N, K), H, lengths, and chunks of one sequence, or blocks of a plan: rows and columns
# that only fill tiles; blocks that begin with a later part, end with a first one, are all of one
# part, or have nothing; and sequences that see nothing.
CASES = {
    "columns that fill a tile": ((1, 1, 256, 3, 1), 80, [250], 3, None, {"sinks": True}),
    "only sinks": ((1, 1, 128, 4, 1), 64, [0], 2, None, {"sinks": True}),
    "one item in all blocks": ((2, 1, 512, 8, 1), 128, [512, 0], None, 4, {}),
    "long and short": ((3, 3, 512, 2, 1), 80, [512, 130, 300], None, 3, {"window": 400}),
}


@pytest.mark.parametrize("name", CASES)
def test_in_one_launch(plain_slots, monkeypatch, name):
    shape, H, lengths, num_splits, blocks, options = CASES[name]
    monkeypatch.setattr(flash_decode, "NUM_SMS", blocks)
    check(shape, H, lengths, num_splits=num_splits, blocks=blocks, **options)


def merge_told(parts, lse, out, heads, is_static):
    """(out, lse) merged from parts that are told already, by as many thread blocks.

    out: [parts, rows, H]. lse: [parts, rows], base 2."""
    H = out.shape[2]
    T, G = heads
    config = split_config((1, T, G, H), (1, 4096, 1, H), parts, 0.1, None)
    step, extra = (1, 0) if is_static else (2, 1)
    slots = np.array(part_slots.new_slots(step * parts + extra, config))
    of_part = part_slots.slots_size(1, config)
    for part in range(parts):
        near, far = (out[part].reshape(len(out[part]), -1, 2, SLOTS)[:, :, i] for i in range(2))
        words = [near, far, np.broadcast_to(lse[part, :, None, None], near.shape)]
        words = [x.astype(np.float32).view(np.int32) for x in words]
        place = step * part + (extra if part == 0 else 0)
        told = np.stack([*words, np.ones_like(words[0])], axis=-1).reshape(-1)
        slots[place * of_part : (place + 1) * of_part] = told
    tasks = merge_kernel.tasks_of_thread(parts if is_static else None, config)

    def body(slots_ref, count_ref, out_ref, lse_ref, scratch_ref):
        count = parts if is_static else count_ref[0]
        places = part_slots.Places(jnp.int32(0), step, extra)
        item = merge_kernel.Item(0, 0, 0, lax.axis_index("block"), count, places)
        results = merge_kernel.Results(out_ref, lse_ref, None, lambda item, row, t, g: t * G + g)
        if is_static:
            share = merge_kernel.share_of(item, 0, tasks, results, config)
            merge_kernel.merge_share(share, count, slots_ref, results, scratch_ref, config)
        else:
            merge_kernel.merge(item, slots_ref, results, scratch_ref, config)

    shape = jax.ShapeDtypeStruct((1, T, 1, G, H), jnp.float32)
    slots_ref = jax.new_ref(jnp.asarray(slots))
    run = plgpu.kernel(
        body,
        out_type=[shape, jax.ShapeDtypeStruct((1, T, G), jnp.float32)],
        grid=(parts,),
        grid_names=("block",),
        scratch_types=[plgpu.SMEM((merge_kernel.scratch_size(tasks),), jnp.float32)],
    )
    merged, merged_lse = jax.jit(run)(slots_ref, jnp.array([parts], jnp.int32))
    taken = np.asarray(jax.freeze(slots_ref))[part_slots.SLOT - 1 :: part_slots.SLOT]
    told = slots[part_slots.SLOT - 1 :: part_slots.SLOT]
    # One of two that took a slot could wait for it in vain. (The last one is nobody's.)
    np.testing.assert_array_equal(taken[:-1], 2 * told[:-1])
    return np.asarray(merged).reshape(T * G, H), np.asarray(merged_lse).reshape(-1)


# A thread for all parts of a slot, lanes of a warp, of two and of all warps, and more parts than
# these have at once; tasks that do not divide among threads or blocks.
@pytest.mark.parametrize("is_static", [True, False], ids=["known", "by plan"])
@pytest.mark.parametrize(
    ("parts", "T", "G", "H"),
    [
        *((parts, 1, 8, 128) for parts in (2, 11, 64)),
        *((parts, 1, 1, 64) for parts in (4, 29)),
        *((parts, 2, 3, 80) for parts in (5, 131)),
    ],
)
def test_merge_of_parts(plain_slots, parts, T, G, H, is_static):
    rng = np.random.default_rng(parts)
    out = rng.normal(size=(parts, T * G, H)).astype(np.float32)
    lse = (4 * rng.normal(size=(parts, T * G))).astype(np.float32)
    lse[rng.random(lse.shape) < 0.2] = -np.inf
    lse[:, 0] = -np.inf
    out[np.isneginf(lse)] = 0
    merged, merged_lse = merge_told(parts, lse, out, (T, G), is_static)
    expected, expected_lse = combine_partials(jnp.asarray(out), jnp.asarray(lse / np.log2(np.e)))
    np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(merged_lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_slots_are_no_constant_that_is_filled_anew():
    config = split_config((1, 1, 16, 128), (1, 512, 2, 128), 4, 0.1, None)
    slots = part_slots.new_slots(8, config)
    # Of 8 rows 64 slots each, and one behind them that is not zero.
    assert slots.shape == (8 * 8 * 64 * 4 + 4,)
    assert not slots[:-1].any()
    assert slots[-1] == 1
