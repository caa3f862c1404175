"""Flash-Decoding on Pallas Mosaic GPU with chunks by a plan of equal work, for Hopper.

Each thread block goes through the chunks of its own. It stores the result of an item that one chunk
is all of. What is cut is merged by a launch of its own in combine_kernel.py; or, where all thread
blocks run at the same time, by the same launch in merge_kernel.py. The letters are those of
flash_decode_kernel.py.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecode.pallas_kernels.chunk_kernel import (
    Chunk,
    allocate,
    attend_tiles,
    divide,
    drain,
    load_q,
    load_tiles,
    take_q,
    visible_slots,
)
from jaxdecode.pallas_kernels.flash_decode_kernel import consumers, partials, producer
from jaxdecode.pallas_kernels.merge_kernel import (
    Item,
    Results,
    merge,
    scratch_size,
    store_empty,
    tasks_of_thread,
)
from jaxdecode.pallas_kernels.part_slots import Places, part_of, tell
from jaxdecode.pallas_kernels.split_config import SplitConfig
from jaxdecode.pallas_kernels.split_plan import SplitPlan, ToCombine
from jaxdecode.pallas_kernels.store_kernel import (
    gather,
    normalised,
    store_finished,
    store_partial,
)


class _Tensors(NamedTuple):
    """Refs of what is attended to."""

    q: Any
    k: Any
    v: Any
    lo: Any
    hi: Any
    sinks: Any


class _Planned(NamedTuple):
    """What the plan says of a chunk: see `SplitPlan.chunks`."""

    b: Any
    head: Any
    base: Any
    begin: Any
    end: Any
    part: Any
    parts: Any

    def chunk(self, config: SplitConfig) -> Chunk:
        row_blocks = jnp.int32(config.row_blocks)
        h, row_block = lax.div(self.head, row_blocks), lax.rem(self.head, row_blocks)
        return Chunk(self.b, h, row_block, self.base, self.begin, self.end)


class _Share(NamedTuple):
    """What a thread block has: its chunks' first number, how many they are, and their tiles."""

    block: Any
    first: Any
    count: Any
    tiles: Any
    first_chunk: _Planned
    chunks: Any

    def for_each(self, do: Any) -> _Planned:
        """do(i, planned) of every chunk, by its number; what the plan says of the next one is
        loaded meanwhile. Returns what it says of the last one."""

        def step(i, numbers):
            following = jnp.minimum(self.first + i + 1, self.chunks.shape[0] - 1)
            next_numbers = tuple(self.chunks[following, x] for x in range(self.chunks.shape[1]))
            planned, _ = numbers
            do(self.first + i, _Planned(*planned))
            return next_numbers, planned

        start = tuple(self.first_chunk)
        _, last = lax.fori_loop(0, self.count, step, (start, start))
        return _Planned(*last)


def planned_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, lo: jax.Array, hi: jax.Array,
    sinks: jax.Array | None, plan: SplitPlan, out_dtype: Any, config: SplitConfig,
) -> tuple[ToCombine, jax.Array, jax.Array]:  # fmt: skip
    """Step 1 with chunks by plan, each thread block going through those that it has.

    Args:
      sinks: [N] float32 or None, one more logit per head with a zero value.

    Returns:
      What is left to combine; and, only of items that one chunk is all of, the results: out
      [B, T, K, G, H] in out_dtype, and lse [B, K, row_blocks, rows] float32, natural log, sinks
      counted.
    """
    B, blocks = q.shape[0], plan.blocks.shape[0]
    *to_combine, out, lse = plgpu.kernel(
        functools.partial(_planned_kernel, config=config),
        out_type=[
            *partials(plan.chunks.shape[:1], config),
            jax.ShapeDtypeStruct((blocks, 4 + -(-B // blocks)), jnp.int32),
            *_results(q, k, out_dtype, config),
        ],
        kernel_name="flash_decode_split_planned",
        **_launch(q, plan, out_dtype, config),
    )(q, k, v, lo, hi, sinks, *plan)
    return ToCombine(*to_combine), out, lse


def planned_attention_in_one(
    q: jax.Array, k: jax.Array, v: jax.Array, lo: jax.Array, hi: jax.Array,
    sinks: jax.Array | None, slots: Any, plan: SplitPlan, out_dtype: Any, config: SplitConfig,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Both steps in one launch.

    Args:
      sinks: [N] float32 or None, one more logit per head with a zero value.
      slots: int32, `slots_size` of two parts for each block of the plan. All zero, and left so.

    Returns:
      out [B, T, K, G, H] in out_dtype, and lse [B, K, row_blocks, rows] float32, natural log, sinks
      counted.
    """
    scratch = scratch_size(tasks_of_thread(None, config))
    out, lse = plgpu.kernel(
        functools.partial(_merging_kernel, config=config),
        out_type=_results(q, k, out_dtype, config),
        kernel_name="flash_decode_planned",
        **_launch(q, plan, out_dtype, config, merging=plgpu.SMEM((scratch,), jnp.float32)),
    )(q, k, v, lo, hi, sinks, *plan, slots)
    return out, lse


def _results(q, k, out_dtype, config):
    (B, T, N, H), K = q.shape, k.shape[2]
    return [
        jax.ShapeDtypeStruct((B, T, K, N // K, H), out_dtype),
        jax.ShapeDtypeStruct((B, K, config.row_blocks, config.rows), jnp.float32),
    ]


def _launch(q, plan, out_dtype, config, **scratch):
    """What every launch by plan has, with more shared memory."""
    return {
        "grid": plan.blocks.shape[:1],
        "grid_names": ("block",),
        "num_threads": config.consumers + 1,
        "thread_name": "thread",
        "scratch_types": {
            "scratch": allocate(q.dtype, config, out_dtype),
            "q_taken": plgpu.Barrier(),
            **scratch,
        },
        "compiler_params": plgpu.CompilerParams(approx_math=True),
    }


def _planned_kernel(
    q_ref, k_ref, v_ref, lo_ref, hi_ref, sinks_ref, blocks_ref, chunks_ref, idle_ref,
    out_partial_ref, lse_partial_ref, left_ref, out_ref, lse_ref, *, scratch, q_taken, config,
):  # fmt: skip
    """All chunks of one block. What it cannot finish is for the combine."""
    scratch = divide(scratch)
    share = _share_of_block(blocks_ref, chunks_ref)
    tensors = _Tensors(q_ref, k_ref, v_ref, lo_ref, hi_ref, sinks_ref)

    @consumers(config)
    def _consume(consumer):
        def store_part(sums, i, _):
            store_partial(sums, out_partial_ref.at[i], lse_partial_ref.at[i], scratch, config)

        results = out_ref, lse_ref
        _attend(share, tensors, results, store_part, consumer, scratch, q_taken, config)
        plgpu.wait_smem_to_gmem(0)

    @producer(config)
    def _produce():
        _load(share, tensors, scratch, q_taken, config)
        _tell_what_is_left(share, idle_ref, left_ref)
        _wait_for_the_last(share, scratch, q_taken, config)


def _merging_kernel(
    q_ref, k_ref, v_ref, lo_ref, hi_ref, sinks_ref, blocks_ref, chunks_ref, idle_ref, slots_ref,
    out_ref, lse_ref, *, scratch, q_taken, merging, config,
):  # fmt: skip
    """All chunks of one block, and its share of the merge. A block begins with the last part of an
    item, if it has one, and ends with a first part: so it merges when it has told both."""
    scratch = divide(scratch)
    share = _share_of_block(blocks_ref, chunks_ref)
    tensors = _Tensors(q_ref, k_ref, v_ref, lo_ref, hi_ref, sinks_ref)
    results = Results(out_ref, lse_ref, sinks_ref, functools.partial(_lse_place, lse_ref))

    @consumers(config)
    def _consume(consumer):
        def tell_part(sums, _, planned):
            place = 2 * share.block + jnp.where(planned.part == 0, 1, 0)
            tell(*normalised(sums, config), part_of(slots_ref, place, config), config)

        refs = out_ref, lse_ref
        last = _attend(share, tensors, refs, tell_part, consumer, scratch, q_taken, config)
        _merge_what_is_cut(share, last, slots_ref, results, merging, config)
        plgpu.wait_smem_to_gmem(0)

    @producer(config)
    def _produce():
        _load(share, tensors, scratch, q_taken, config)
        _store_idle(share, idle_ref, results, config)
        _wait_for_the_last(share, scratch, q_taken, config)


def _share_of_block(blocks_ref, chunks_ref):
    block = lax.axis_index("block")
    numbers = [blocks_ref[block, x] for x in range(blocks_ref.shape[1])]
    return _Share(block, *numbers[:3], _Planned(*numbers[3:]), chunks_ref)


def _attend(share, tensors, results, store_part, consumer, scratch, q_taken, config):
    """Attends to all chunks and stores what is finished; store_part(sums, number, planned) is for
    the others. Returns what the plan says of the last one."""

    def attend(i, planned):
        chunk = planned.chunk(config)
        slots = visible_slots(tensors.lo, tensors.hi, chunk.b, chunk.row_block, config)
        q = take_q(consumer, scratch, config)
        pl.when(consumer == 0)(lambda: plgpu.barrier_arrive(q_taken))
        sums = attend_tiles(chunk, slots, q, consumer, scratch, config)
        # The result before this one has left shared memory.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def store(sums):
            pl.when(planned.parts > 1)(lambda: store_part(sums, i, planned))

            @pl.when(planned.parts == 1)
            def _finished():
                store_finished(sums, chunk, tensors.sinks, *results, scratch, config)

        gather(sums, store, consumer, scratch, config)

    return share.for_each(attend)


def _load(share, tensors, scratch, q_taken, config):
    """Loads what all chunks need. The ring runs on over their ends: while a result is stored, the
    next chunk's tiles are on their way."""

    def load(i, planned):
        chunk = planned.chunk(config)
        pl.when(i > share.first)(lambda: plgpu.barrier_wait(q_taken))
        load_q(tensors.q, tensors.k, chunk, scratch, config)
        load_tiles(tensors.k, tensors.v, chunk, scratch, config)

    share.for_each(load)


def _wait_for_the_last(share, scratch, q_taken, config):
    drain(share.tiles, scratch, config)
    pl.when(share.count > 0)(lambda: plgpu.barrier_wait(q_taken))


def _merge_what_is_cut(share, last, slots_ref, results, merging, config):
    """Merges the item whose later part comes first, and the one whose first part comes last."""
    first = share.first_chunk

    @pl.loop(0, 2)
    def _(i):
        is_first = i == 0
        planned = _Planned(*(jnp.where(is_first, *each) for each in zip(first, last, strict=True)))
        is_cut = jnp.where(is_first, first.part > 0, (last.part == 0) & (last.parts > 1))

        @pl.when((share.count > 0) & is_cut)
        def _():
            chunk = planned.chunk(config)
            places = _places(share.block - planned.part)
            item = Item(chunk.b, chunk.h, chunk.row_block, planned.part, planned.parts, places)
            merge(item, slots_ref, results, merging, config)


def _places(first_block):
    """Of an item's parts that begin in a block: each block has a later part and a first one."""
    return Places(2 * first_block, step=2, extra=1)


def _lse_place(lse_ref, item, row, t, g):
    del t, g
    _, K, row_blocks, rows = lse_ref.shape
    return ((item.b * K + item.h) * row_blocks + item.row_block) * rows + row


def _store_idle(share, idle_ref, results, config):
    """Stores the rows of some sequences, if they see nothing."""
    (B,), num_blocks = idle_ref.shape, lax.axis_size("block")
    K = results.out.shape[2]

    @pl.loop(0, -(-B // num_blocks))
    def _(i):
        b = share.block + i * num_blocks

        @pl.when((b < B) & (idle_ref[jnp.minimum(b, B - 1)] == 1))
        def _():
            @pl.loop(0, K * config.row_blocks)
            def _(head):
                row_blocks = jnp.int32(config.row_blocks)
                h, row_block = lax.div(head, row_blocks), lax.rem(head, row_blocks)
                store_empty(Item(b, h, row_block, 0, 1, Places(0)), results, config)


def _tell_what_is_left(share, idle_ref, left_ref):
    """What the combine has to do for a block. It would find the plan itself far away in memory,
    behind all keys and values; this it finds in the cache."""
    (B,), num_blocks, block = idle_ref.shape, left_ref.shape[0], share.block
    # Only the last chunk of a block may be the first of several.
    last = jnp.minimum(share.first + share.count, share.chunks.shape[0]) - 1
    planned = _Planned(*(share.chunks[last, x] for x in range(share.chunks.shape[1])))
    parts = jnp.where((share.count > 0) & (planned.part == 0), planned.parts, 0)
    for column, value in enumerate((planned.b, planned.head, last, parts)):
        left_ref[block, column] = value
    for column in range(4, left_ref.shape[1]):
        sequence = block + (column - 4) * num_blocks
        is_idle = idle_ref[jnp.minimum(sequence, B - 1)]
        left_ref[block, column] = jnp.where(sequence < B, is_idle, 0)
