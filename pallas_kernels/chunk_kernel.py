"""What a thread block of Flash-Decoding does with a chunk of the keys, on Pallas Mosaic GPU.

A producer streams K and V tiles through a ring in shared memory (TMA); a consumer computes the
transposed products S^T = K q^T and O^T = V^T P^T, so that the many keys, not the few queries, fill
the 64 rows of the tensor cores' instruction. Both products take their operands from shared memory,
which Mosaic's interpreter needs. O^T has a row for each column of V, so V's tiles are as wide as
the next multiple of 64: `width`. The letters are those of flash_decode_kernel.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecode.pallas_kernels.mosaic import LOG2_E, reduce_tree, swizzled, zero_unseen
from jaxdecode.pallas_kernels.split_config import SplitConfig

# Rows of the left operand that one instruction of the tensor cores takes.
_TILE = 64


class Scratch(NamedTuple):
    """Shared memory of a block, and the barriers that say when it is full or free again."""

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


def allocate(dtype, config: SplitConfig) -> Scratch:
    """What a thread block needs: the types of its scratch memory."""
    rows, width, block = config.rows, config.width, config.block_kv
    # A product wants both operands, V and P among them, in the same swizzle.
    tiled = tiling, swizzle = swizzled(config.head_dim, dtype.itemsize)
    rows_tiled = plgpu.TilingTransform((1, tiling.tiling[1])), swizzle
    ring = plgpu.SMEM((config.stages, block, width), dtype, transforms=tiled)
    barriers = plgpu.Barrier(num_barriers=config.stages)
    return Scratch(
        q_rows=plgpu.SMEM(
            (_TILE, width), dtype, transforms=() if _is_plain(config) else rows_tiled
        ),
        q=plgpu.SMEM((_TILE, width), dtype, transforms=tiled),
        k=ring,
        v=ring,
        p=plgpu.SMEM((rows, block), dtype, transforms=tiled),
        out=plgpu.SMEM((rows, width), jnp.float32, transforms=swizzled(width, 4)),
        lse=plgpu.SMEM((rows,), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=config.block_t),
        k_full=barriers,
        v_full=barriers,
        released=barriers,
    )


def visible_slots(lo_ref, hi_ref, b, row_block, config) -> Slots:
    """Loads what the tokens of a row block see."""
    tokens = _tokens(row_block, lo_ref.shape[1], config)
    return Slots([lo_ref[b, t] for t in tokens], [hi_ref[b, t] for t in tokens])


def _tokens(row_block, T, config):
    t0 = lax.div(row_block, jnp.int32(config.row_blocks_g)) * config.block_t
    return [jnp.minimum(t0 + t, T - 1) for t in range(config.block_t)]


def load_q(q_ref, k_ref, chunk: Chunk, scratch: Scratch, config: SplitConfig) -> None:
    """Starts to load the query rows."""
    G = q_ref.shape[2] // k_ref.shape[2]
    g0 = lax.rem(chunk.row_block, jnp.int32(config.row_blocks_g)) * config.block_g
    heads = pl.ds(chunk.h * G + g0, config.block_g)
    columns = _columns(chunk.h, config)
    for i, t in enumerate(_tokens(chunk.row_block, q_ref.shape[1], config)):
        rows = pl.ds(i * config.block_g, config.block_g)
        source = q_ref.at[chunk.b, t, heads, columns]
        plgpu.copy_gmem_to_smem(source, scratch.q_rows.at[rows], scratch.q_full)


def load_tiles(k_ref, v_ref, chunk: Chunk, scratch: Scratch, config: SplitConfig) -> None:
    """Streams the chunk's tiles through the ring."""
    block, columns = config.block_kv, _columns(chunk.h, config)

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


def _columns(zero_times, config):
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


def take_q(scratch: Scratch, config: SplitConfig) -> Any:
    """Waits for q and lays it out for the products: [width, rows] in shared memory."""
    plgpu.barrier_wait(scratch.q_full)
    # Rows past the real ones hold anything: no row touches another's result.
    q = plgpu.load(scratch.q_rows, layout=plgpu.Layout.WGMMA, optimized=_is_plain(config))
    scratch.q[...] = q
    plgpu.commit_smem()
    return scratch.q.at[pl.ds(0, config.rows)].transpose((1, 0))


def attend_tiles(chunk: Chunk, slots: Slots, q, scratch: Scratch, config: SplitConfig) -> tuple:
    """Online softmax over the chunk's tiles.

    Returns (acc [width, rows], top [rows], total [block_kv, rows]): the weighted sum, the largest
    logit in base 2, and the weights' sums, which are added up over the keys only at the end.
    """
    layout, block, (width, rows) = plgpu.Layout.WGMMA, config.block_kv, q.shape
    seen_by_all = reduce_tree(jnp.maximum, slots.los), reduce_tree(jnp.minimum, slots.his)
    seen_by_any = reduce_tree(jnp.minimum, slots.los), reduce_tree(jnp.maximum, slots.his)

    def mask(logits, start):
        return jnp.where(_visible(start, slots, logits.shape, config), logits, -jnp.inf)

    def tile(step, carry):
        acc, top, total = carry
        i = chunk.begin + step
        slot = lax.rem(i, jnp.int32(config.stages))
        start = (chunk.base + i) * block
        plgpu.barrier_wait(scratch.k_full.at[slot])
        logits = _cap(_product(scratch.k.at[slot], q, (block, rows)), config)
        inside = (start >= seen_by_all[0]) & (start + block <= seen_by_all[1])
        logits = lax.cond(inside, lambda x: x, lambda x: mask(x, start), logits)
        new_top = jnp.maximum(top, logits.max(axis=0))
        shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        rescale = jnp.exp2(top - shift)
        p = jnp.exp2(logits - _across(shift, block))
        scratch.p.transpose((1, 0))[...] = p.astype(scratch.p.dtype)
        plgpu.barrier_wait(scratch.v_full.at[slot])

        @pl.when((start < seen_by_any[0]) | (start + block > seen_by_any[1]))
        def _():
            zero_unseen(scratch.v.at[slot], start, *seen_by_any)

        plgpu.commit_smem()
        update = _product(
            scratch.v.at[slot].transpose((1, 0)), scratch.p.transpose((1, 0)), (width, rows)
        )
        plgpu.barrier_arrive(scratch.released.at[slot])
        return acc * _across(rescale, width) + update, new_top, total * _across(rescale, block) + p

    def zeros(size):
        return plgpu.layout_cast(jnp.zeros((size, rows), jnp.float32), layout)

    lowest = plgpu.layout_cast(jnp.full((rows,), -jnp.inf, jnp.float32), layout.reduce(0))
    sums = zeros(width), lowest, zeros(block)
    return lax.fori_loop(0, chunk.end - chunk.begin, tile, sums)


def store_result(sums, out_ref, lse_ref, scratch: Scratch, config: SplitConfig) -> None:
    """Normalises the chunk's sums and starts to store them, with their log-sum-exp."""
    acc, top, total = sums
    total = total.sum(axis=0)
    empty = total == 0.0
    divisor = jnp.where(empty, 1.0, total)
    out = acc * _across(1.0 / divisor, config.width)
    scratch.out.transpose((1, 0))[...] = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
    scratch.lse[...] = jnp.where(empty, -jnp.inf, top + jnp.log2(divisor))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch.out, out_ref.at[:, pl.ds(0, config.width)])
    plgpu.copy_smem_to_gmem(scratch.lse, lse_ref)


def _cap(logits, config):
    """Scaled and capped logits, in base 2."""
    if config.softcap is None:
        return logits * (config.scale * LOG2_E)
    return jnp.tanh(logits * (config.scale / config.softcap)) * (config.softcap * LOG2_E)


def _visible(start, slots, shape, config):
    """Which of a tile's slots each row sees: [block_kv, rows]."""
    layout = plgpu.Layout.WGMMA
    slot = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + start
    visible = (slot >= slots.los[0]) & (slot < slots.his[0])
    if config.block_t == 1:
        return visible
    row = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
    for t in range(1, config.block_t):
        seen = (slot >= slots.los[t]) & (slot < slots.his[t])
        visible = jnp.where(row >= t * config.block_g, seen, visible)
    return visible


def _product(a, b, shape):
    """a times b, both in shared memory, as a float32 array [M, N] in registers."""

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _across(x, size):
    """x [rows] as [size, rows]."""
    return lax.broadcast_in_dim(x, (size, *x.shape), (1,))
