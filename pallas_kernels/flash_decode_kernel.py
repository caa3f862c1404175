"""The kernels of Flash-Decoding on Pallas Mosaic GPU, for Hopper.

Step 1, `split_attention`: one thread block per chunk of the keys. A producer streams K and V tiles
through a ring in shared memory (TMA); a consumer computes the transposed products S^T = K q^T and
O^T = V^T P^T, so that the many keys, not the few queries, fill the 64 rows of the tensor cores'
instruction. Step 2, `combine_splits`: one thread block per query row weighs the chunks by their
log-sum-exp. Both products take their operands from shared memory, which Mosaic's interpreter needs.

B batch, T query tokens, S capacity, N query heads, K KV heads, G = N // K, H head_dim, C splits.
A row block holds `rows` query rows of one KV head: `block_t` tokens times `block_g` heads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2_E = math.log2(math.e)
# Row r of a warpgroup's tile; tiles of the tensor cores have 64.
_TILE = 64


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    """Static sizes of the split kernel.

    Attributes:
      num_splits: C, chunks per sequence and KV head.
      block_kv: keys per tile, a multiple of 64.
      stages: K/V tiles in flight.
      block_t, block_g: query tokens and heads of a row block; block_t * block_g <= 64.
      row_blocks_t, row_blocks_g: how many row blocks cover T tokens and G heads.
      scale: of the logits. softcap: None for none.
    """

    num_splits: int
    block_kv: int
    stages: int
    block_t: int
    block_g: int
    row_blocks_t: int
    row_blocks_g: int
    scale: float
    softcap: float | None = None

    @property
    def rows(self) -> int:
        """Rows of a row block, padded to what the tensor cores take."""
        return -(-self.block_t * self.block_g // 8) * 8

    @property
    def row_blocks(self) -> int:
        return self.row_blocks_t * self.row_blocks_g


def split_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, lo: jax.Array, hi: jax.Array, config: SplitConfig
) -> tuple[jax.Array, jax.Array]:
    """Step 1: attends to each chunk of the keys in parallel.

    Args:
      q: [B, T, N, H]; k, v: [B, S, K, H]; lo, hi: [B, T] int32, slots lo <= s < hi are visible.

    Returns:
      out_partial [B, K, row_blocks, C, rows, H] float32, normalised by its own sum, and lse_partial
      [B, K, row_blocks, C, rows] float32 in base 2, -inf (with out 0) for a chunk without keys.
    """
    B, _, _, H = q.shape
    K = k.shape[2]
    C, rows, block, stages = config.num_splits, config.rows, config.block_kv, config.stages
    partial = (B, K, config.row_blocks, C, rows)
    tiled = _swizzled(H, q.dtype.itemsize)
    ring = plgpu.SMEM((stages, block, H), q.dtype, transforms=tiled)
    barriers = plgpu.Barrier(num_barriers=stages)
    return plgpu.kernel(
        functools.partial(_split_kernel, config=config),
        out_type=[
            jax.ShapeDtypeStruct((*partial, H), jnp.float32),
            jax.ShapeDtypeStruct(partial, jnp.float32),
        ],
        grid=(C, config.row_blocks, K, B),
        grid_names=("split", "row_block", "kv_head", "batch"),
        num_threads=2,
        thread_name="thread",
        scratch_types=[
            plgpu.SMEM((_TILE, H), q.dtype),
            plgpu.SMEM((_TILE, H), q.dtype, transforms=tiled),
            ring,
            ring,
            plgpu.SMEM((rows, block), q.dtype, transforms=_swizzled(block, q.dtype.itemsize)),
            plgpu.SMEM((rows, H), jnp.float32, transforms=_swizzled(H, 4)),
            plgpu.SMEM((rows,), jnp.float32),
            plgpu.Barrier(num_arrivals=config.block_t),
            barriers,
            barriers,
            barriers,
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, lo, hi)


def _split_kernel(
    q_ref, k_ref, v_ref, lo_ref, hi_ref, out_ref, lse_ref,
    q_rows, q_smem, k_smem, v_smem, p_smem, out_smem, lse_smem, q_full, k_full, v_full, released,
    *, config: SplitConfig,
):  # fmt: skip
    """One chunk of the keys, for one row block of one KV head of one sequence."""
    c, row_block, h, b = map(lax.axis_index, ("split", "row_block", "kv_head", "batch"))
    T = q_ref.shape[1]
    t0 = lax.div(row_block, jnp.int32(config.row_blocks_g)) * config.block_t
    tokens = [jnp.minimum(t0 + t, T - 1) for t in range(config.block_t)]
    los = [lo_ref[b, t] for t in tokens]
    his = [hi_ref[b, t] for t in tokens]
    first, last = _tiles_of_chunk(los, his, c, config)

    @pl.when(lax.axis_index("thread") == 0)
    def _consume():
        plgpu.barrier_wait(q_full)
        # Rows past the real ones hold anything: no row touches another's result.
        q_smem[...] = plgpu.load(q_rows, layout=plgpu.Layout.WGMMA)
        q = q_smem.at[pl.ds(0, config.rows)].transpose((1, 0))
        ring = (k_smem, v_smem, k_full, v_full, released)
        carry = _attend_chunk(first, last, los, his, q, p_smem, ring, config)
        _finish_chunk(*carry, out_smem, lse_smem)
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[b, h, row_block, c])
        plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[b, h, row_block, c])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(lax.axis_index("thread") == 1)
    def _produce():
        G = q_ref.shape[2] // k_ref.shape[2]
        g0 = lax.rem(row_block, jnp.int32(config.row_blocks_g)) * config.block_g
        heads = pl.ds(h * G + g0, config.block_g)
        for i, t in enumerate(tokens):
            rows = pl.ds(i * config.block_g, config.block_g)
            plgpu.copy_gmem_to_smem(q_ref.at[b, t, heads], q_rows.at[rows], q_full)

        def load(i, _):
            slot = lax.rem(i, jnp.int32(config.stages))

            @pl.when(i >= config.stages)
            def _():
                plgpu.barrier_wait(released.at[slot])

            tile = (b, pl.ds((first + i) * config.block_kv, config.block_kv), h)
            plgpu.copy_gmem_to_smem(k_ref.at[tile], k_smem.at[slot], k_full.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[tile], v_smem.at[slot], v_full.at[slot])
            return ()

        lax.fori_loop(0, last - first, load, ())


def _tiles_of_chunk(los, his, c, config):
    """Tiles [first, last) of chunk c: an equal share of those that any of its queries sees.

    So the splits follow the length of the sequence, not the capacity of the cache."""
    block, num_splits = jnp.int32(config.block_kv), jnp.int32(config.num_splits)
    begin = lax.div(_reduce(jnp.minimum, los), block)
    end = lax.div(_reduce(jnp.maximum, his) + (block - 1), block)
    tiles = jnp.maximum(end - begin, 0)
    return begin + lax.div(c * tiles, num_splits), begin + lax.div((c + 1) * tiles, num_splits)


def _attend_chunk(first, last, los, his, q, p_smem, ring, config):
    """Online softmax over the chunk's tiles.

    Returns (acc [H, rows], top [rows], total [block_kv, rows]): the weighted sum, the largest logit
    in base 2, and the weights' sums, which are added up over the keys only once, at the end.
    """
    k_smem, v_smem, k_full, v_full, released = ring
    layout, block, (H, rows) = plgpu.Layout.WGMMA, config.block_kv, q.shape
    seen_by_all = _reduce(jnp.maximum, los), _reduce(jnp.minimum, his)
    seen_by_any = _reduce(jnp.minimum, los), _reduce(jnp.maximum, his)

    def mask(logits, start):
        return jnp.where(_visible(start, los, his, logits.shape, config), logits, -jnp.inf)

    def tile(i, carry):
        acc, top, total = carry
        slot = lax.rem(i, jnp.int32(config.stages))
        start = (first + i) * block
        plgpu.barrier_wait(k_full.at[slot])
        logits = _cap(_product(k_smem.at[slot], q, (block, rows)), config)
        inside = (start >= seen_by_all[0]) & (start + block <= seen_by_all[1])
        logits = lax.cond(inside, lambda x: x, lambda x: mask(x, start), logits)
        new_top = jnp.maximum(top, logits.max(axis=0))
        shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        rescale = jnp.exp2(top - shift)
        p = jnp.exp2(logits - _across(shift, block))
        p_smem.transpose((1, 0))[...] = p.astype(p_smem.dtype)
        plgpu.barrier_wait(v_full.at[slot])

        @pl.when((start < seen_by_any[0]) | (start + block > seen_by_any[1]))
        def _():
            _zero_unseen(v_smem.at[slot], start, *seen_by_any)

        plgpu.commit_smem()
        update = _product(v_smem.at[slot].transpose((1, 0)), p_smem.transpose((1, 0)), (H, rows))
        plgpu.barrier_arrive(released.at[slot])
        return acc * _across(rescale, H) + update, new_top, total * _across(rescale, block) + p

    def zeros(size):
        return plgpu.layout_cast(jnp.zeros((size, rows), jnp.float32), layout)

    lowest = plgpu.layout_cast(jnp.full((rows,), -jnp.inf, jnp.float32), layout.reduce(0))
    return lax.fori_loop(0, last - first, tile, (zeros(H), lowest, zeros(block)))


def _finish_chunk(acc, top, total, out_smem, lse_smem):
    """Normalises the chunk's sum and leaves it, with its log-sum-exp, in shared memory."""
    total = total.sum(axis=0)
    empty = total == 0.0
    divisor = jnp.where(empty, 1.0, total)
    out = acc * _across(1.0 / divisor, acc.shape[0])
    out_smem.transpose((1, 0))[...] = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
    lse_smem[...] = jnp.where(empty, -jnp.inf, top + jnp.log2(divisor))
    plgpu.commit_smem()


def _cap(logits, config):
    """Scaled and capped logits, in base 2."""
    if config.softcap is None:
        return logits * (config.scale * LOG2_E)
    return jnp.tanh(logits * (config.scale / config.softcap)) * (config.softcap * LOG2_E)


def _visible(start, los, his, shape, config):
    """Which of a tile's slots each row sees: [block_kv, rows]."""
    layout = plgpu.Layout.WGMMA
    slot = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout) + start
    if config.block_t == 1:
        return (slot >= los[0]) & (slot < his[0])
    row = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
    visible = (slot >= los[0]) & (slot < his[0])
    for t in range(1, config.block_t):
        seen = (slot >= los[t]) & (slot < his[t])
        visible = jnp.where(row >= t * config.block_g, seen, visible)
    return visible


def _zero_unseen(v_tile, start, lo, hi):
    """Zeroes the slots of a V tile that no query sees: their weight is zero, but 0 * NaN is NaN."""
    block, H = v_tile.shape
    layout = plgpu.Layout.WGMMA
    for column in range(0, H, _TILE):
        part = v_tile.at[:, pl.ds(column, _TILE)]
        slot = plgpu.broadcasted_iota(jnp.int32, (block, _TILE), 0, layout=layout) + start
        values = plgpu.load(part, layout=layout)
        part[...] = jnp.where((slot >= lo) & (slot < hi), values, jnp.zeros_like(values))


def _product(a, b, shape):
    """a times b, both in shared memory, as a float32 array [M, N] in registers."""

    def multiply(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def combine_splits(
    out_partial: jax.Array, lse_partial: jax.Array, sinks: jax.Array | None,
    shape: tuple[int, int, int], out_dtype: Any, config: SplitConfig,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Step 2: merges the chunks of every query row.

    Args:
      out_partial, lse_partial: from `split_attention`.
      sinks: [N] float32 or None, one more logit per head with a zero value.
      shape: (B, T, N).

    Returns:
      out [B, T, N, H] in out_dtype, lse [B, T, N] float32, natural log, sinks counted.
    """
    B, T, N = shape
    H = out_partial.shape[-1]
    operands = (out_partial, lse_partial) + (() if sinks is None else (sinks,))
    return plgpu.kernel(
        functools.partial(_combine_kernel, config=config, has_sinks=sinks is not None),
        out_type=[
            jax.ShapeDtypeStruct((B, T, N, H), out_dtype),
            jax.ShapeDtypeStruct((B, T, N), jnp.float32),
        ],
        grid=(N, T, B),
        grid_names=("head", "token", "batch"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)


def _combine_kernel(out_partial_ref, lse_partial_ref, *refs, config: SplitConfig, has_sinks: bool):
    """One query row: all loads are independent of each other, so they cost one trip to memory."""
    *sink_ref, out_ref, lse_ref = refs
    n, t, b = map(lax.axis_index, ("head", "token", "batch"))
    N, K, C = out_ref.shape[2], out_partial_ref.shape[1], config.num_splits
    h, g = lax.div(n, jnp.int32(N // K)), lax.rem(n, jnp.int32(N // K))
    t_block, t_row = lax.div(t, jnp.int32(config.block_t)), lax.rem(t, jnp.int32(config.block_t))
    g_block, g_row = lax.div(g, jnp.int32(config.block_g)), lax.rem(g, jnp.int32(config.block_g))
    row_block = t_block * config.row_blocks_g + g_block
    row = t_row * config.block_g + g_row
    # One element of the row for each of the 128 threads of a warpgroup.
    layout = plgpu.Layout.WG_STRIDED((out_ref.shape[3],), vec_size=1)
    lses = [lse_partial_ref[b, h, row_block, c, row] for c in range(C)]
    outs = [
        plgpu.load(out_partial_ref.at[b, h, row_block, c, row], layout=layout) for c in range(C)
    ]
    logits = lses + ([sink_ref[0][n] * LOG2_E] if has_sinks else [])
    top = _reduce(jnp.maximum, logits)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weights = [jnp.exp2(x - top) for x in logits]
    total = _reduce(jnp.add, weights)
    empty = total == 0.0
    divisor = jnp.where(empty, 1.0, total)
    merged = _reduce(jnp.add, [x * w for x, w in zip(outs, weights[:C], strict=True)])
    out_ref[b, t, n] = (merged / divisor).astype(out_ref.dtype)
    lse_ref[b, t, n] = jnp.where(empty, -jnp.inf, (top + jnp.log2(divisor)) / LOG2_E)


def _reduce(combine: Callable, values: list):
    """Reduces as a balanced tree: a chain would cost its length in latencies."""
    while len(values) > 1:
        pairs = [combine(*values[i : i + 2]) for i in range(0, len(values) - 1, 2)]
        values = pairs + values[len(values) & ~1 :]
    return values[0]


def _across(x, size):
    """x [rows] as [size, rows]."""
    return lax.broadcast_in_dim(x, (size, *x.shape), (1,))


def _swizzled(columns: int, itemsize: int):
    """Layout of a matrix in shared memory that the tensor cores and TMA read without conflicts."""
    swizzle = next(x for x in (128, 64, 32) if columns * itemsize % x == 0)
    return (
        plgpu.TilingTransform((8, swizzle // itemsize)),
        plgpu.SwizzleTransform(swizzle),
    )
