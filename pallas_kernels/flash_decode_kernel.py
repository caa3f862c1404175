"""Flash-Decoding on Pallas Mosaic GPU, for Hopper: C equal chunks of the keys of each sequence.

Step 1 attends to every chunk in parallel, with a thread block for each; step 2 merges them. The
chunks are attended to in chunk_kernel.py, stored in store_kernel.py, and merged by a launch of its
own in combine_kernel.py; or, where all thread blocks run at the same time, by the same launch in
merge_kernel.py. Chunks by a plan of equal work are in planned_kernel.py.

B batch, T query tokens, S capacity, N query heads, K KV heads, G = N // K, H head_dim, C splits.
A row block holds `rows` query rows of one KV head: `block_t` tokens times `block_g` heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
    load_q,
    load_tiles,
    take_q,
    tiles_of_chunk,
    visible_slots,
)
from jaxdecode.pallas_kernels.merge_kernel import (
    Item,
    Results,
    merge_share,
    scratch_size,
    share_of,
    tasks_of_thread,
)
from jaxdecode.pallas_kernels.mosaic import THREADS
from jaxdecode.pallas_kernels.part_slots import Places, part_of, tell
from jaxdecode.pallas_kernels.split_config import SplitConfig
from jaxdecode.pallas_kernels.store_kernel import gather, normalised, store_partial

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
        out_type=partials((B, K, config.row_blocks, config.num_splits), config),
        grid=(config.num_splits, config.row_blocks, K, B),
        grid_names=("split", "row_block", "kv_head", "batch"),
        num_threads=config.consumers + 1,
        thread_name="thread",
        scratch_types=allocate(q.dtype, config),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="flash_decode_split",
    )(q, k, v, lo, hi)


def attention_in_one(
    q: jax.Array, k: jax.Array, v: jax.Array, lo: jax.Array, hi: jax.Array,
    sinks: jax.Array | None, slots: Any, out_dtype: Any, config: SplitConfig,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Both steps for one sequence in one launch: who attends to its chunks merges them too.

    Args:
      sinks: [N] float32 or None, one more logit per head with a zero value.
      slots: int32, `slots_size` of C chunks of each item. All zero, and left so.

    Returns:
      out [1, T, N, H] in out_dtype, lse [1, T, N] float32, natural log, sinks counted.
    """
    (B, T, N, H), K = q.shape, k.shape[2]
    tasks = tasks_of_thread(config.num_splits, config)
    out, lse = plgpu.kernel(
        functools.partial(_merging_kernel, tasks=tasks, config=config),
        out_type=[
            jax.ShapeDtypeStruct((B, T, K, N // K, H), out_dtype),
            jax.ShapeDtypeStruct((B, T, N), jnp.float32),
        ],
        grid=(config.num_splits, config.row_blocks, K),
        grid_names=("split", "row_block", "kv_head"),
        num_threads=config.consumers + 1,
        thread_name="thread",
        scratch_types={
            # Parts are told from registers.
            "scratch": allocate(q.dtype, config)._replace(out=None, lse=None),
            "merging": plgpu.SMEM((scratch_size(tasks),), jnp.float32),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="flash_decode",
    )(q, k, v, lo, hi, sinks, slots)
    return out.reshape(B, T, N, H), lse


def partials(chunks: tuple[int, ...], config: SplitConfig) -> list:
    """Types of the partial results of so many chunks."""
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

    @consumers(config)
    def _consume(consumer):
        q = take_q(consumer, scratch, config)
        sums = attend_tiles(chunk, slots, q, consumer, scratch, config)
        place = (b, h, row_block, c)

        def store(sums):
            store_partial(sums, out_ref.at[place], lse_ref.at[place], scratch, config)

        gather(sums, store, consumer, scratch, config)
        plgpu.wait_smem_to_gmem(0)

    @producer(config)
    def _produce():
        load_q(q_ref, k_ref, chunk, scratch, config)
        load_tiles(k_ref, v_ref, chunk, scratch, config)


def _merging_kernel(
    q_ref, k_ref, v_ref, lo_ref, hi_ref, sinks_ref, slots_ref, out_ref, lse_ref,
    *, scratch, merging, tasks, config,
):  # fmt: skip
    """One chunk of the keys, for one row block of one KV head, and its share of the merge."""
    c, row_block, h = map(lax.axis_index, ("split", "row_block", "kv_head"))
    slots = visible_slots(lo_ref, hi_ref, 0, row_block, config)
    first, last = tiles_of_chunk(slots, c, config)
    chunk = Chunk(0, h, row_block, first, 0, last - first)
    C, (_, _, K, G, _) = config.num_splits, out_ref.shape
    first_part = (h * config.row_blocks + row_block) * C
    item = Item(0, h, row_block, c, C, Places(first_part))
    results = Results(out_ref, lse_ref, sinks_ref, lambda item, row, t, g: (t * K + item.h) * G + g)

    @consumers(config)
    def _consume(consumer):
        # Where everything is, while the first tiles are on their way.
        share = share_of(item, 0, tasks, results, config)
        q = take_q(consumer, scratch, config)
        sums = attend_tiles(chunk, slots, q, consumer, scratch, config)

        def tell_part(sums):
            tell(*normalised(sums, config), part_of(slots_ref, first_part + c, config), config)

        gather(sums, tell_part, consumer, scratch, config)
        merge_share(share, C, slots_ref, results, merging, config)

    @producer(config)
    def _produce():
        load_q(q_ref, k_ref, chunk, scratch, config)
        load_tiles(k_ref, v_ref, chunk, scratch, config)


def consumers(config: SplitConfig) -> Callable:
    """Runs a function of the consumer's number in the warpgroups that compute."""

    def run(consume):
        thread = lax.axis_index("thread")

        @pl.when(thread < config.consumers)
        def _():
            if config.consumers > 1:
                plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
            consume(thread if config.consumers > 1 else 0)

    return run


def producer(config: SplitConfig) -> Callable:
    """Runs a function in the warpgroup that loads."""

    def run(produce):
        @pl.when(lax.axis_index("thread") == config.consumers)
        def _():
            if config.consumers > 1:
                plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
            produce()

    return run
