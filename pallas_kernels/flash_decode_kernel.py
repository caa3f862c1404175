"""Step 1 of Flash-Decoding on Pallas Mosaic GPU, for Hopper: attending to every chunk of the keys.

Two ways to cut: C equal chunks per sequence, a thread block for each; or by a plan of equal work,
each block going through the chunks of its own. Chunks are attended to in chunk_kernel.py, stored in
store_kernel.py, and merged, step 2, in combine_kernel.py.

B batch, T query tokens, S capacity, N query heads, K KV heads, G = N // K, H head_dim, C splits.
A row block holds `rows` query rows of one KV head: `block_t` tokens times `block_g` heads.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecode.pallas_kernels.chunk_kernel import (
    Chunk,
    Scratch,
    allocate,
    attend_tiles,
    divide,
    drain,
    load_q,
    load_tiles,
    take_q,
    tiles_of_chunk,
    visible_slots,
)
from jaxdecode.pallas_kernels.mosaic import THREADS
from jaxdecode.pallas_kernels.split_config import SplitConfig
from jaxdecode.pallas_kernels.split_plan import SplitPlan, ToCombine
from jaxdecode.pallas_kernels.store_kernel import gather, store_finished, store_partial

# Of each thread where three warpgroups share 504.
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 232, 40


def split_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, lo: jax.Array, hi: jax.Array, config: SplitConfig
) -> tuple[jax.Array, jax.Array]:
    """Step 1: attends to each chunk of the keys in parallel, C equal chunks per sequence.

    Args:
      q: [B, T, N, H]; k, v: [B, S, K, H]; lo, hi: [B, T] int32, slots lo <= s < hi are visible.

    Returns:
      out_partial [B, K, row_blocks, C, rows, P] float32, normalised by its own sum, and lse_partial
      [B, K, row_blocks, C, rows] float32 in base 2, -inf (with out 0) for a chunk without keys.
      P is H rounded up to what the combine's threads divide; what lies past H means nothing.
    """
    B, K = q.shape[0], k.shape[2]
    return plgpu.kernel(
        functools.partial(_split_kernel, config=config),
        out_type=_partials((B, K, config.row_blocks, config.num_splits), config),
        grid=(config.num_splits, config.row_blocks, K, B),
        grid_names=("split", "row_block", "kv_head", "batch"),
        num_threads=config.consumers + 1,
        thread_name="thread",
        scratch_types=allocate(q.dtype, config),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="flash_decode_split",
    )(q, k, v, lo, hi)


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
    (B, T, N, H), K, blocks = q.shape, k.shape[2], plan.blocks.shape[0]
    *to_combine, out, lse = plgpu.kernel(
        functools.partial(_planned_kernel, config=config),
        out_type=[
            *_partials(plan.chunks.shape[:1], config),
            jax.ShapeDtypeStruct((blocks, 4 + -(-B // blocks)), jnp.int32),
            jax.ShapeDtypeStruct((B, T, K, N // K, H), out_dtype),
            jax.ShapeDtypeStruct((B, K, config.row_blocks, config.rows), jnp.float32),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=config.consumers + 1,
        thread_name="thread",
        scratch_types={
            "scratch": allocate(q.dtype, config, out_dtype),
            "q_taken": plgpu.Barrier(),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="flash_decode_split_planned",
    )(q, k, v, lo, hi, sinks, *plan)
    return ToCombine(*to_combine), out, lse


def _partials(chunks, config):
    padded = -(-config.head_dim // THREADS) * THREADS
    return [
        jax.ShapeDtypeStruct((*chunks, config.rows, padded), jnp.float32),
        jax.ShapeDtypeStruct((*chunks, config.rows), jnp.float32),
    ]


def _split_kernel(q_ref, k_ref, v_ref, lo_ref, hi_ref, out_ref, lse_ref, *scratch, config):
    """One chunk of the keys, for one row block of one KV head of one sequence."""
    scratch = Scratch(*scratch)
    c, row_block, h, b = map(lax.axis_index, ("split", "row_block", "kv_head", "batch"))
    slots = visible_slots(lo_ref, hi_ref, b, row_block, config)
    first, last = tiles_of_chunk(slots, c, config)
    chunk = Chunk(b, h, row_block, first, 0, last - first)

    @_consumers(config)
    def _consume(consumer):
        q = take_q(consumer, scratch, config)
        sums = attend_tiles(chunk, slots, q, consumer, scratch, config)
        place = (b, h, row_block, c)

        def store(sums):
            store_partial(sums, out_ref.at[place], lse_ref.at[place], scratch, config)

        gather(sums, store, consumer, scratch, config)
        plgpu.wait_smem_to_gmem(0)

    @_producer(config)
    def _produce():
        load_q(q_ref, k_ref, chunk, scratch, config)
        load_tiles(k_ref, v_ref, chunk, scratch, config)


def _planned_kernel(
    q_ref, k_ref, v_ref, lo_ref, hi_ref, sinks_ref, blocks_ref, chunks_ref, idle_ref,
    out_partial_ref, lse_partial_ref, left_ref, out_ref, lse_ref, *, scratch, q_taken, config,
):  # fmt: skip
    """All chunks of one block. The ring runs on over their ends: while a result is stored, the next
    chunk's tiles are on their way."""
    scratch = divide(scratch)
    block = lax.axis_index("block")
    columns = chunks_ref.shape[1]
    first, count, tiles, *first_chunk = (blocks_ref[block, x] for x in range(3 + columns))

    def for_each_chunk(do):
        """do(i, chunk, pieces). What the plan says of the next one is loaded meanwhile."""

        def step(i, numbers):
            following = jnp.minimum(first + i + 1, chunks_ref.shape[0] - 1)
            next_numbers = tuple(chunks_ref[following, x] for x in range(columns))
            b, head, base, begin, end, pieces = numbers
            row_blocks = jnp.int32(config.row_blocks)
            h, row_block = lax.div(head, row_blocks), lax.rem(head, row_blocks)
            do(i, Chunk(b, h, row_block, base, begin, end), pieces)
            return next_numbers

        lax.fori_loop(0, count, step, tuple(first_chunk))

    @_consumers(config)
    def _consume(consumer):
        def attend(i, chunk, pieces):
            slots = visible_slots(lo_ref, hi_ref, chunk.b, chunk.row_block, config)
            q = take_q(consumer, scratch, config)
            pl.when(consumer == 0)(lambda: plgpu.barrier_arrive(q_taken))
            sums = attend_tiles(chunk, slots, q, consumer, scratch, config)
            # The result before this one has left shared memory.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def store(sums):
                @pl.when(pieces != 1)
                def _partial():
                    refs = out_partial_ref.at[first + i], lse_partial_ref.at[first + i]
                    store_partial(sums, *refs, scratch, config)

                @pl.when(pieces == 1)
                def _finished():
                    store_finished(sums, chunk, sinks_ref, out_ref, lse_ref, scratch, config)

            gather(sums, store, consumer, scratch, config)

        for_each_chunk(attend)
        plgpu.wait_smem_to_gmem(0)

    @_producer(config)
    def _produce():
        def load(i, chunk, _):
            @pl.when(i > 0)
            def _():
                plgpu.barrier_wait(q_taken)

            load_q(q_ref, k_ref, chunk, scratch, config)
            load_tiles(k_ref, v_ref, chunk, scratch, config)

        for_each_chunk(load)
        _tell_what_is_left(block, first, count, chunks_ref, idle_ref, left_ref)
        drain(tiles, scratch, config)

        @pl.when(count > 0)
        def _():
            plgpu.barrier_wait(q_taken)


def _tell_what_is_left(block, first, count, chunks_ref, idle_ref, left_ref):
    """What the combine has to do for a block. It would find the plan itself far away in memory,
    behind all keys and values; this it finds in the cache."""
    num_blocks, B = left_ref.shape[0], idle_ref.shape[0]
    # Only the last chunk of a block may be the first of several.
    last = jnp.minimum(first + count, chunks_ref.shape[0]) - 1
    b, head, *_, pieces = (chunks_ref[last, x] for x in range(chunks_ref.shape[1]))
    pieces = jnp.where(count > 0, pieces, 0)
    for column, value in enumerate((b, head, last, pieces)):
        left_ref[block, column] = value
    for column in range(4, left_ref.shape[1]):
        sequence = block + (column - 4) * num_blocks
        is_idle = idle_ref[jnp.minimum(sequence, B - 1)]
        left_ref[block, column] = jnp.where(sequence < B, is_idle, 0)


def _consumers(config):
    """Runs a function of the consumer's number in the warpgroups that compute."""

    def run(consume):
        thread = lax.axis_index("thread")

        @pl.when(thread < config.consumers)
        def _():
            if config.consumers > 1:
                plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
            consume(thread if config.consumers > 1 else 0)

    return run


def _producer(config):
    """Runs a function in the warpgroup that loads."""

    def run(produce):
        @pl.when(lax.axis_index("thread") == config.consumers)
        def _():
            if config.consumers > 1:
                plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
            produce()

    return run
