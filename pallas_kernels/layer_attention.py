"""The attention that a layer's kernel begins with, on Pallas Mosaic GPU: Flash-Decoding without a
launch of its own.

Each thread block attends to a chunk of one KV head's keys, whose tiles come through the ring before
those of the weights. It tells the results, and of each query head one thread block merges them and
tells all what it found. Weights stream on meanwhile.

The letters are those of layer_config.py; C chunks for each of K KV heads, G = N // K.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecode.pallas_kernels.chunk_kernel import (
    Chunk,
    Slots,
    Stage,
    attend_tiles,
    tiles_of_chunk,
)
from jaxdecode.pallas_kernels.layer_config import COLUMNS, ROWS, TILES, LayerConfig
from jaxdecode.pallas_kernels.layer_tiles import MOST_IN_FLIGHT, Loaded, Scratch, load_tile
from jaxdecode.pallas_kernels.mosaic import THREADS, reduce_tree
from jaxdecode.pallas_kernels.slots import LINE, put_columns, put_line, take_lines
from jaxdecode.pallas_kernels.store_kernel import gather, normalised

# Chunks of a query head that are taken together.
_MOST_CHUNKS = 8


class Attend(NamedTuple):
    """What the kernel attends to.

    Attributes:
      q: [N, COLUMNS], rotated. keys, values: [1, S, K, COLUMNS].
      lo, hi: int32 [1, 1], slots lo <= s < hi are visible.
    """

    q: Any
    keys: Any
    values: Any
    lo: Any
    hi: Any


class _Ring(NamedTuple):
    """The layer's ring, in which tiles of K and V take turns, for `attend_tiles`."""

    scratch: Scratch
    stages: int

    @property
    def p(self) -> Any:
        return self.scratch.heads.p

    def stage(self, i: Any, config: Any) -> Stage:
        """Where the i-th tiles are."""
        del config
        places = [lax.rem(i * TILES + j, jnp.int32(self.stages)) for j in range(TILES)]
        tiles, full, released = (
            [ref.at[place] for place in places]
            for ref in (self.scratch.ring, self.scratch.full, self.scratch.released)
        )
        return Stage(*tiles, *full, tuple(released))


def stream_cache(
    attend: Attend, block: Any, so_far: Loaded, scratch: Scratch, config: LayerConfig
) -> Loaded:
    """Loads a thread block's queries, and its chunk's tiles of K and V."""
    chunk, _ = _chunk(attend, block, config)
    rows = config.attention.rows
    # Tiles of shared memory are filled from where a multiple of their rows begins.
    start = lax.div(chunk.h * config.attention.block_g, jnp.int32(rows)) * rows
    heads = pl.ds(pl.multiple_of(start, rows), rows)
    plgpu.copy_gmem_to_smem(attend.q.at[heads], scratch.heads.q, scratch.q_full)

    def load(i, landed):
        place = 0, pl.ds((chunk.base + i) * ROWS, ROWS), chunk.h
        for j, cache in enumerate((attend.keys, attend.values)):
            copy = functools.partial(plgpu.copy_gmem_to_smem, cache.at[place])
            landed = load_tile(i * TILES + j, landed, MOST_IN_FLIGHT, copy, scratch, config)
        return landed

    landed = lax.fori_loop(0, chunk.end, load, so_far.landed)
    return Loaded(chunk.end, landed)


def attend_chunk(
    attend: Attend, block: Any, turn: Any, chunks_ref: Any, scratch: Scratch, config: LayerConfig
) -> Any:
    """Attends to a thread block's chunk, and tells what it found. Returns the ring's steps."""
    attention, heads = config.attention, scratch.heads
    chunk, slots = _chunk(attend, block, config)
    plgpu.barrier_wait(scratch.q_full)
    ring = _Ring(scratch, config.stages)
    sums = attend_tiles(chunk, slots, heads.q, 0, ring, attention)

    def tell(sums):
        _, chunks, kinds, columns = config.chunks_shape
        head = chunk.h * attention.block_g
        row = lax.rem(head, jnp.int32(attention.rows))
        split = lax.div(block, jnp.int32(_kv_heads(attend)))
        lines = _line(chunks_ref, (head - row, split, 0), config)
        # The log-sum-exp beside each column, so that who merges them has it in every thread.
        distance = 2 * chunks * kinds * columns
        out, lse = normalised(sums, attention)
        put_columns(out, lse, turn, lines, row, attention.block_g, distance)

    @pl.when(block < _kv_heads(attend) * attention.num_splits)
    def _():
        gather(sums, tell, 0, scratch, attention)

    return chunk.end


def merge_heads(
    block: Any, turn: Any, chunks_ref: Any, attended_ref: Any, dtype: Any, config: LayerConfig
) -> None:
    """Merges the chunks of a thread block's query heads, and tells them."""
    num_heads = config.chunks_shape[0]
    for first in range(0, num_heads, config.num_blocks):

        @pl.when(first + block < num_heads)
        def _(head=first + block):
            found = _merged(head, turn, chunks_ref, config).astype(dtype)
            columns = pl.ds(head * COLUMNS, COLUMNS)
            put_line(found, turn, attended_ref.at[columns])


def _merged(head, turn, chunks_ref, config):
    """A query head's result, as LINE."""
    _, count, kinds, columns = config.chunks_shape

    def merge(i, sums):
        acc, top, total = sums
        first = i * _MOST_CHUNKS
        left = jnp.minimum(count - first, _MOST_CHUNKS)
        refs = [_line(chunks_ref, (head, first, j), config) for j in range(kinds)]
        distance = 2 * kinds * columns
        outs, lses = take_lines(turn, refs, [0.0, -math.inf], _MOST_CHUNKS, left, distance)
        tops = [top, *lses]
        new_top = reduce_tree(jnp.maximum, tops)
        shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        weight, *weights = (jnp.exp2(each - shift) for each in tops)
        weighted = [w * out for w, out in zip(weights, outs, strict=True)]
        return (
            acc * weight + reduce_tree(jnp.add, weighted),
            new_top,
            total * weight + reduce_tree(jnp.add, weights),
        )

    def line(value):
        return plgpu.layout_cast(jnp.full((THREADS,), value, jnp.float32), LINE)

    trips = -(-count // _MOST_CHUNKS)
    acc, _, total = lax.fori_loop(0, trips, merge, (line(0.0), line(-jnp.inf), line(0.0)))
    return acc / jnp.where(total == 0.0, 1.0, total)


def _chunk(attend, block, config):
    """A thread block's chunk, none in those that are left over, and what is visible."""
    attention, K = config.attention, jnp.int32(_kv_heads(attend))
    slots = Slots([attend.lo[0, 0]], [attend.hi[0, 0]])
    split = lax.div(block, K)
    first, last = tiles_of_chunk(slots, split, attention)
    count = jnp.where(split < attention.num_splits, last - first, 0)
    return Chunk(0, lax.rem(block, K), 0, first, 0, count), slots


def _kv_heads(attend):
    return attend.keys.shape[2]


def _line(chunks_ref, place, config):
    """The slots of the result of a query head's chunk, or of its log-sum-exp."""
    _, chunks, kinds, columns = config.chunks_shape
    head, chunk, kind = place
    line = (head * chunks + chunk) * kinds + kind
    return chunks_ref.at[pl.ds(2 * line * columns, 2 * columns)]
