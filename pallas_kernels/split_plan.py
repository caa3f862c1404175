"""Equal work for every thread block, whatever the lengths of a batch's sequences.

An item is a row block of a KV head of a sequence. The K/V tiles of all items, put end to end, make
one line: first all sequences of one head, then all of the next, so that the heads of a sequence,
which lie side by side in memory, are read at the same time. The line is cut into equal ranges, one
for each multiprocessor, as Stream-K cuts a matrix product (arXiv 2301.03598). A thread block goes
through the items in its range; what it holds of one of them is a chunk. So all blocks have equally
many tiles, and there are fewer cuts than blocks; a little less than equal where that lets the cuts
fall between sequences. The plan follows from the visible ranges alone: XLA computes it once for all
layers.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class SplitPlan(NamedTuple):
    """Which block attends to what, for B sequences of `heads` items each. All int32.

    Attributes:
      blocks: [num_blocks, 10], a block's first chunk, how many it has, their tiles together,
        and what `chunks` says of the first, so that a block can begin with it.
      chunks: [num_blocks + B * heads - 1, 7], a chunk's sequence; its item there; base, begin, end:
        it holds the tiles base + i of its sequence for begin <= i < end, where i counts the tiles
        of its block; which of the item's chunks it is, from 0 on; and how many the item has. They
        are in order. Only the chunks that a block has mean anything.
      idle: [B], whether nothing is visible, so that no chunk is of this sequence.
    """

    blocks: Array
    chunks: Array
    idle: Array


class ToCombine(NamedTuple):
    """What the split kernel leaves to the combine.

    Attributes:
      out_partial, lse_partial: [chunks, rows, P] and [chunks, rows], of chunks that are not all of
        their item.
      left: [num_blocks, 4 + ceil(B / num_blocks)] int32, for each block: the item that it is the
        first to hold a part of, by its sequence, its place there, its first chunk, and how many it
        has, at most 1 if there is no such item; then whether the sequences block,
        block + num_blocks, ... are idle.
    """

    out_partial: Array
    lse_partial: Array
    left: Array


class _Line(NamedTuple):
    """Where the sequences [B] lie in the line of tiles of one head, and the length of a range.

    Items of sequences without tiles have no place in the line and no number.
    """

    first_tile: Array
    tiles: Array
    start: Array
    stop: Array
    items: Array  # of this sequence and those before it
    size: Array

    @property
    def length(self) -> Array:
        """Tiles of one head."""
        return self.stop[-1]

    @property
    def num_items(self) -> Array:
        """Items of one head."""
        return self.items[-1]


@functools.partial(jax.jit, static_argnames=("block_kv", "heads", "num_blocks"), inline=True)
def make_plan(lo: Array, hi: Array, *, block_kv: int, heads: int, num_blocks: int) -> SplitPlan:
    """Divides the tiles of `block_kv` slots that any query of their sequence sees.

    Args:
      lo, hi: [B, T] int32, slots lo <= s < hi are visible.
      heads: items per sequence, its KV heads times their row blocks.
    """
    first_tile = lo.min(axis=1) // block_kv
    tiles = jnp.maximum(-(-hi.max(axis=1) // block_kv) - first_tile, 0)
    stop, items = _running_sum(tiles), _running_sum(jnp.where(tiles > 0, 1, 0))
    share = jnp.maximum(-(-stop[-1] * heads // num_blocks), 1)
    size = _range_size(share, jnp.maximum(tiles.max(), 1))
    line = _Line(first_tile, tiles, stop - tiles, stop, items, size)
    blocks = _blocks(line, heads, num_blocks)
    return SplitPlan(blocks, _chunks(line, blocks[:, 0], heads), jnp.where(tiles > 0, 0, 1))


def _range_size(share, longest):
    """An equal share of the tiles, or a little more of them where sequences of the greatest length
    are then cut into whole ranges or not at all: each cut saved is a chunk less to merge."""
    pieces = jnp.maximum(longest // share, 1)
    whole = jnp.where(share <= longest, -(-longest // pieces), -(-share // longest) * longest)
    return jnp.where(20 * whole <= 21 * share, whole, share)


def _blocks(line, heads, num_blocks):
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    begin = block * line.size
    end = jnp.minimum(begin + line.size, line.length * heads)
    first_item, busy = _item_at(line, begin), begin < end
    # A chunk begins with its block or with its item, so their numbers add up to its own.
    first_chunk = jnp.where(busy, block + first_item, num_blocks + line.num_items * heads)
    count = jnp.where(busy, _item_at(line, end - 1) - first_item + 1, 0)
    tiles = jnp.maximum(end - begin, 0)
    return jnp.stack([first_chunk, count, tiles, *_chunk(line, block, first_item)], axis=1)


def _chunks(line, first_chunk, heads):
    most = len(first_chunk) + len(line.tiles) * heads - 1
    chunk = jnp.arange(most, dtype=jnp.int32)
    block = jnp.maximum(_up_to(first_chunk, chunk) - 1, 0)
    return jnp.stack(_chunk(line, block, chunk - block), axis=1)


def _chunk(line, block, item):
    """What a block holds of an item."""
    b, head, item_start = _place(line, item)
    item_start = item_start - block * line.size
    item_stop = item_start + line.tiles[b]
    begin, end = jnp.maximum(item_start, 0), jnp.minimum(item_stop, line.size)
    # Of the blocks from that on in which the item begins, each has a part of it until it ends.
    part = -(item_start // line.size)
    parts = part - (-item_stop // line.size)
    return b, head, line.first_tile[b] - item_start, begin, end, part, parts


def _item_at(line, place):
    """The item that holds a tile of the line."""
    head, place = jnp.divmod(place, jnp.maximum(line.length, 1))
    return head * line.num_items + line.items[_sequence_at(line.stop, place)] - 1


def _place(line, item):
    """An item's sequence, its place there, and its first tile in the line."""
    head, place = jnp.divmod(item, jnp.maximum(line.num_items, 1))
    b = _sequence_at(line.items, place)
    return b, head, head * line.length + line.start[b]


def _running_sum(x):
    """[B] int32, each the sum up to and with its place: one sum, where a scan is many steps."""
    b = jnp.arange(len(x), dtype=jnp.int32)
    return jnp.where(b[None, :] <= b[:, None], x[None, :], 0).sum(axis=1, dtype=jnp.int32)


def _sequence_at(stops, place):
    """The sequence b that holds a place, where each ends before `stops[b]`; past all, the last."""
    return jnp.minimum(_up_to(stops, place), len(stops) - 1)


def _up_to(ascending, value):
    """How many elements are at most each value."""
    found = jnp.searchsorted(ascending, value, side="right", method="compare_all")
    return found.astype(jnp.int32)
