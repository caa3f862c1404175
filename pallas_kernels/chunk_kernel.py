"""What a thread block of Flash-Decoding does with a chunk of the keys, on Pallas Mosaic GPU.

A producer streams K and V tiles through a ring in shared memory (TMA), and consumers attend to
them. The tensor cores' instruction has 64 rows to fill. Few queries leave them to the keys: the
consumer computes the transposed products S^T = K q^T and O^T = V^T P^T. Many queries fill them
themselves: S = q K^T and O = P V keep a query's keys in one warp, which finds their largest by
itself. One consumer would then still take longer over a tile than memory does, so two take turns
and merge what they have at the end.

O^T has a row for each column of V, so V's tiles are as wide as the next multiple of 64: `width`.
The letters are those of flash_decode_kernel.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecode.pallas_kernels.mosaic import (
    LOG2_E,
    accumulate,
    meet,
    reduce_tree,
    swizzled,
    zero_unseen,
)
from jaxdecode.pallas_kernels.split_config import TILE, SplitConfig


class Scratch(NamedTuple):
    """Shared memory of a block, and the barriers that say when it is full or free again.

    p, the softmax weights, is there only where products are transposed. Two consumers meet at
    `meeting`, and one hands its sums to the other: acc in `out`, top and total in `handed`.
    Finished results are in `finished`, which is memory of `out`, where a block stores any."""

    q_rows: Any
    q: Any
    k: Any
    v: Any
    p: Any
    out: Any
    lse: Any
    q_full: Any
    k_full: Any
    v_full: Any
    released: Any
    handed: Any
    meeting: Any
    finished: Any = None

    def stage(self, i: Any, config: SplitConfig) -> Stage:
        """Where the ring has the i-th tiles of the thread block."""
        slot = lax.rem(i, jnp.int32(config.stages))
        refs = self.k, self.v, self.k_full, self.v_full, self.released
        *refs, released = (ref.at[slot] for ref in refs)
        return Stage(*refs, (released,))


class Stage(NamedTuple):
    """A tile of K and one of V in the ring, the barriers that say when they are there, and those
    that release them."""

    k: Any
    v: Any
    k_full: Any
    v_full: Any
    released: tuple[Any, ...]


class Chunk(NamedTuple):
    """The tiles base + i, begin <= i < end, of a sequence's KV head, for one row block. i counts
    all tiles of the thread block, and so says which slot of the ring is next."""

    b: Any
    h: Any
    row_block: Any
    base: Any
    begin: Any
    end: Any


class Slots(NamedTuple):
    """The slots lo <= s < hi that each query token of a row block sees."""

    los: list
    his: list


def allocate(dtype, config: SplitConfig, finished_dtype: Any = None) -> Scratch:
    """What a thread block needs: the types of its scratch memory.

    finished_dtype: of finished results, where the block stores any. Then `out` is both `out` and
    `finished`, which `divide` tells apart."""
    rows, width, block = config.product_rows, config.width, config.block_kv
    # A product wants both operands, V and P among them, in the same swizzle.
    tiled = tiling, swizzle = swizzled(config.head_dim, dtype.itemsize)
    rows_tiled = plgpu.TilingTransform((1, tiling.tiling[1])), swizzle
    ring = plgpu.SMEM((config.stages, block, width), dtype, transforms=tiled)
    barriers = plgpu.Barrier(num_barriers=config.stages)
    alone = config.consumers == 1
    out = plgpu.SMEM((rows, config.columns), jnp.float32, transforms=swizzled(config.columns, 4))
    if finished_dtype is not None:
        # TMA takes rows from multiples of 128 bytes, so they are as wide as tiles of any head_dim.
        out = plgpu.RefUnion(out, plgpu.SMEM((rows, config.columns), finished_dtype))
    return Scratch(
        q_rows=plgpu.SMEM((TILE, width), dtype, transforms=() if _is_plain(config) else rows_tiled),
        q=plgpu.SMEM((TILE, width), dtype, transforms=tiled),
        k=ring,
        v=ring,
        p=plgpu.SMEM((rows, block), dtype, transforms=tiled) if config.transposed else None,
        out=out,
        lse=plgpu.SMEM((rows,), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=config.block_t),
        k_full=barriers,
        v_full=barriers,
        released=barriers,
        handed=None if alone else plgpu.SMEM((2, rows), jnp.float32),
        meeting=None if alone else plgpu.Barrier(num_arrivals=config.consumers),
    )


def divide(scratch: Scratch) -> Scratch:
    """The scratch memory of a block that stores finished results."""
    out, finished = scratch.out
    return scratch._replace(out=out, finished=finished)


def visible_slots(lo_ref, hi_ref, b, row_block, config) -> Slots:
    """Loads what the tokens of a row block see."""
    tokens = _tokens(row_block, lo_ref.shape[1], config)
    return Slots([lo_ref[b, t] for t in tokens], [hi_ref[b, t] for t in tokens])


def _tokens(row_block, T, config):
    t0, _ = first_row(row_block, config)
    return [jnp.minimum(t0 + t, T - 1) for t in range(config.block_t)]


def first_row(row_block, config: SplitConfig) -> tuple[Any, Any]:
    """Token and head of a row block's first row."""
    t_block, g_block = (f(row_block, jnp.int32(config.row_blocks_g)) for f in (lax.div, lax.rem))
    return t_block * config.block_t, g_block * config.block_g


def tiles_of_chunk(slots: Slots, c: Any, config: SplitConfig) -> tuple[Any, Any]:
    """Tiles [first, last) of chunk c: an equal share of those that any of its queries sees.

    So the splits follow the length of the sequence, not the capacity of the cache."""
    block, num_splits = jnp.int32(config.block_kv), jnp.int32(config.num_splits)
    begin = lax.div(reduce_tree(jnp.minimum, slots.los), block)
    end = lax.div(reduce_tree(jnp.maximum, slots.his) + (block - 1), block)
    tiles = jnp.maximum(end - begin, 0)
    return begin + lax.div(c * tiles, num_splits), begin + lax.div((c + 1) * tiles, num_splits)


def load_q(q_ref, k_ref, chunk: Chunk, scratch: Scratch, config: SplitConfig) -> None:
    """Starts to load the query rows."""
    G = q_ref.shape[2] // k_ref.shape[2]
    _, g0 = first_row(chunk.row_block, config)
    heads = pl.ds(chunk.h * G + g0, config.block_g)
    columns = all_columns(chunk.h, config)
    for i, t in enumerate(_tokens(chunk.row_block, q_ref.shape[1], config)):
        rows = pl.ds(i * config.block_g, config.block_g)
        source = q_ref.at[chunk.b, t, heads, columns]
        plgpu.copy_gmem_to_smem(source, scratch.q_rows.at[rows], scratch.q_full)


def load_tiles(k_ref, v_ref, chunk: Chunk, scratch: Scratch, config: SplitConfig) -> None:
    """Streams the chunk's tiles through the ring."""
    block, columns = config.block_kv, all_columns(chunk.h, config)

    def load(step, _):
        i = chunk.begin + step
        slot = lax.rem(i, jnp.int32(config.stages))

        @pl.when(i >= config.stages)
        def _():
            plgpu.barrier_wait(scratch.released.at[slot])

        tile = (chunk.b, pl.ds((chunk.base + i) * block, block), chunk.h, columns)
        plgpu.copy_gmem_to_smem(k_ref.at[tile], scratch.k.at[slot], scratch.k_full.at[slot])
        plgpu.copy_gmem_to_smem(v_ref.at[tile], scratch.v.at[slot], scratch.v_full.at[slot])
        return ()

    lax.fori_loop(0, chunk.end - chunk.begin, load, ())


def drain(tiles, scratch: Scratch, config: SplitConfig) -> None:
    """Waits for the release of the last of all tiles, as Mosaic's interpreter wants it."""
    for slot in range(config.stages):

        @pl.when(slot < tiles)
        def _(slot=slot):
            plgpu.barrier_wait(scratch.released.at[slot])


def all_columns(zero_times, config: SplitConfig) -> Any:
    """All columns of a head and, past head_dim, what TMA fills up with zeros.

    A slice that begins at a constant would have to lie inside the array, so it begins at a product.
    """
    if config.width == config.head_dim:
        return slice(None)
    return pl.ds(pl.multiple_of(zero_times * 0, config.width), config.width)


def _is_plain(config):
    """Whether Mosaic itself finds a layout for the rows of q, which it can read without conflicts.

    For others its search fails or takes minutes: they are given one that always serves."""
    return config.head_dim in (64, 128, 192)


def take_q(consumer, scratch: Scratch, config: SplitConfig) -> Any:
    """Waits for q and lays it out for the products: [product_rows, width] in shared memory.

    consumer: 0, or in a kernel with two the number of this one. The first does it for both."""

    @pl.when(consumer == 0)
    def _():
        plgpu.barrier_wait(scratch.q_full)
        # Rows past the real ones hold anything: no row touches another's result.
        q = plgpu.load(scratch.q_rows, layout=plgpu.Layout.WGMMA, optimized=_is_plain(config))
        scratch.q[...] = q
        plgpu.commit_smem()

    if config.consumers > 1:
        meet(scratch.meeting)
    return scratch.q.at[pl.ds(0, config.product_rows)]


def attend_tiles(
    chunk: Chunk, slots: Slots, q, consumer, scratch: Any, config: SplitConfig
) -> tuple:
    """Online softmax over a consumer's tiles of the chunk.

    Args:
      scratch: what has `stage` and, where products are transposed, `p`, as Scratch has them.

    Returns (acc [rows, width], top [rows], total [rows]): the weighted sum, the largest logit in
    base 2, and the weights' sum. Of transposed products acc is [width, rows] and total
    [block_kv, rows], which is added up over the keys, and so across warps, only at the end.
    """
    block = config.block_kv
    seen_by_all = reduce_tree(jnp.maximum, slots.los), reduce_tree(jnp.minimum, slots.his)
    seen_by_any = reduce_tree(jnp.minimum, slots.los), reduce_tree(jnp.maximum, slots.his)
    first, last = _share(chunk, consumer, config)

    lo, hi = (_of_rows(x, config) for x in slots)

    def mask(logits, start):
        slot = plgpu.broadcasted_iota(
            jnp.int32, logits.shape, keys_axis(config), layout=plgpu.Layout.WGMMA
        )
        slot = slot + start
        return jnp.where((slot >= lo) & (slot < hi), logits, -jnp.inf)

    def tile(step, carry):
        acc, top, total = carry
        i = (first + step) * config.consumers + consumer
        k, v, k_full, v_full, released = scratch.stage(i, config)
        start = (chunk.base + i) * block
        plgpu.barrier_wait(k_full)
        logits = _cap(_product(*((k, q) if config.transposed else (q, k))), config)
        inside = (start >= seen_by_all[0]) & (start + block <= seen_by_all[1])
        logits = lax.cond(inside, lambda x: x, lambda x: mask(x, start), logits)
        new_top = jnp.maximum(top, logits.max(axis=keys_axis(config)))
        shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        rescale = jnp.exp2(top - shift)
        p = jnp.exp2(logits - across(shift, block, config))
        if config.transposed:
            scratch.p.transpose((1, 0))[...] = p.astype(v.dtype)
        plgpu.barrier_wait(v_full)

        @pl.when((start < seen_by_any[0]) | (start + block > seen_by_any[1]))
        def _():
            zero_unseen(v, start, *seen_by_any)
            if not config.transposed:
                plgpu.commit_smem()

        if config.transposed:
            plgpu.commit_smem()
            update = _product(v.transpose((1, 0)), scratch.p)
            _arrive(released)
            acc = acc * across(rescale, config.width, config) + update
            return acc, new_top, total * across(rescale, block, config) + p
        acc = acc * across(rescale, config.width, config)
        acc = accumulate(acc, p.astype(v.dtype), v)
        _arrive(released)
        return acc, new_top, total * rescale + p.sum(axis=1)

    return lax.fori_loop(0, last - first, tile, _no_sums(config))


def _arrive(barriers):
    for barrier in barriers:
        plgpu.barrier_arrive(barrier)


def _no_sums(config):
    """What `attend_tiles` returns for no tiles."""
    layout, rows = plgpu.Layout.WGMMA, config.product_rows
    per_row = layout.reduce(keys_axis(config))

    def filled(value, shape, layout):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    acc = filled(0.0, _shape(rows, config.width, config), layout)
    top = filled(-jnp.inf, (rows,), per_row)
    if config.transposed:
        return acc, top, filled(0.0, _shape(rows, config.block_kv, config), layout)
    return acc, top, filled(0.0, (rows,), per_row)


def _share(chunk, consumer, config):
    """first <= n < last of the tiles n * consumers + consumer, which are a consumer's.

    So each slot of the ring always has the same consumer, as `stages` is a multiple of them."""
    if config.consumers == 1:
        return chunk.begin, chunk.end
    count = jnp.int32(config.consumers)
    return tuple(lax.div(x + (count - 1) - consumer, count) for x in (chunk.begin, chunk.end))


def _cap(logits, config):
    """Scaled and capped logits, in base 2."""
    if config.softcap is None:
        return logits * (config.scale * LOG2_E)
    return jnp.tanh(logits * (config.scale / config.softcap)) * (config.softcap * LOG2_E)


def _of_rows(values, config):
    """The values of each row's token, across the keys. If all rows are one token's, just that."""
    of_rows, *others = values
    if not others:
        return of_rows
    layout = plgpu.Layout.WGMMA.reduce(keys_axis(config))
    row = plgpu.broadcasted_iota(jnp.int32, (config.product_rows,), 0, layout=layout)
    for t, value in enumerate(others, 1):
        of_rows = jnp.where(row >= t * config.block_g, value, of_rows)
    return across(of_rows, config.block_kv, config)


def _product(a, b):
    """a b^T, both in shared memory, as a float32 array in registers: a [M, k], b [N, k]."""

    def multiply(acc):
        plgpu.wgmma(acc, a, b.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))


def keys_axis(config: SplitConfig) -> int:
    """Of logits [keys, rows] or [rows, keys]."""
    return 0 if config.transposed else 1


def _shape(rows, size, config):
    return (size, rows) if config.transposed else (rows, size)


def across(x, size: int, config: SplitConfig) -> Any:
    """x [rows] across `size` keys or columns."""
    shape = _shape(x.shape[0], size, config)
    return lax.broadcast_in_dim(x, shape, (1 - keys_axis(config),))
