"""Step 1 of Flash-Decoding on Pallas Mosaic GPU, for Hopper: attending to every chunk of the keys.

One thread block per chunk. A producer streams K and V tiles through a ring in shared memory (TMA);
a consumer computes the transposed products S^T = K q^T and O^T = V^T P^T, so that the many keys,
not the few queries, fill the 64 rows of the tensor cores' instruction. Both products take their
operands from shared memory, which Mosaic's interpreter needs. Step 2 is in combine_kernel.py.

B batch, T query tokens, S capacity, N query heads, K KV heads, G = N // K, H head_dim, C splits.
A row block holds `rows` query rows of one KV head: `block_t` tokens times `block_g` heads.
O^T has a row for each column of V, so V's tiles are as wide as the next multiple of 64: `width`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecode.pallas_kernels.combine_kernel import THREADS, reduce_tree
from jaxdecode.pallas_kernels.mosaic import LOG2_E, swizzled, zero_unseen
from jaxdecode.pallas_kernels.split_config import SplitConfig

# Rows of the left operand that one instruction of the tensor cores takes.
_TILE = 64


def split_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, lo: jax.Array, hi: jax.Array, config: SplitConfig
) -> tuple[jax.Array, jax.Array]:
    """Step 1: attends to each chunk of the keys in parallel.

    Args:
      q: [B, T, N, H]; k, v: [B, S, K, H]; lo, hi: [B, T] int32, slots lo <= s < hi are visible.

    Returns:
      out_partial [B, K, row_blocks, C, rows, P] float32, normalised by its own sum, and lse_partial
      [B, K, row_blocks, C, rows] float32 in base 2, -inf (with out 0) for a chunk without keys.
      P is H rounded up to what the combine's threads divide; what lies past H means nothing.
    """
    B, _, _, H = q.shape
    K = k.shape[2]
    C, rows, block, stages = config.num_splits, config.rows, config.block_kv, config.stages
    width = config.width
    partial = (B, K, config.row_blocks, C, rows)
    # A product wants both operands, V and P among them, in the same swizzle.
    tiled = swizzled(H, q.dtype.itemsize)
    rows_tiled = () if _is_plain(H) else (plgpu.TilingTransform((1, tiled[0].tiling[1])), tiled[1])
    ring = plgpu.SMEM((stages, block, width), q.dtype, transforms=tiled)
    barriers = plgpu.Barrier(num_barriers=stages)
    return plgpu.kernel(
        functools.partial(_split_kernel, config=config),
        out_type=[
            jax.ShapeDtypeStruct((*partial, -(-H // THREADS) * THREADS), jnp.float32),
            jax.ShapeDtypeStruct(partial, jnp.float32),
        ],
        grid=(C, config.row_blocks, K, B),
        grid_names=("split", "row_block", "kv_head", "batch"),
        num_threads=2,
        thread_name="thread",
        scratch_types=[
            plgpu.SMEM((_TILE, width), q.dtype, transforms=rows_tiled),
            plgpu.SMEM((_TILE, width), q.dtype, transforms=tiled),
            ring,
            ring,
            plgpu.SMEM((rows, block), q.dtype, transforms=tiled),
            plgpu.SMEM((rows, width), jnp.float32, transforms=swizzled(width, 4)),
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
        optimized = _is_plain(config.head_dim)
        q_smem[...] = plgpu.load(q_rows, layout=plgpu.Layout.WGMMA, optimized=optimized)
        plgpu.commit_smem()
        q = q_smem.at[pl.ds(0, config.rows)].transpose((1, 0))
        ring = (k_smem, v_smem, k_full, v_full, released)
        carry = _attend_chunk(first, last, los, his, q, p_smem, ring, config)
        _finish_chunk(*carry, out_smem, lse_smem)
        columns = pl.ds(0, config.width)
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[b, h, row_block, c, :, columns])
        plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[b, h, row_block, c])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(lax.axis_index("thread") == 1)
    def _produce():
        G = q_ref.shape[2] // k_ref.shape[2]
        g0 = lax.rem(row_block, jnp.int32(config.row_blocks_g)) * config.block_g
        heads = pl.ds(h * G + g0, config.block_g)
        columns = _columns(h, config)
        for i, t in enumerate(tokens):
            rows = pl.ds(i * config.block_g, config.block_g)
            plgpu.copy_gmem_to_smem(q_ref.at[b, t, heads, columns], q_rows.at[rows], q_full)

        def load(i, _):
            slot = lax.rem(i, jnp.int32(config.stages))

            @pl.when(i >= config.stages)
            def _():
                plgpu.barrier_wait(released.at[slot])

            tile = (b, pl.ds((first + i) * config.block_kv, config.block_kv), h, columns)
            plgpu.copy_gmem_to_smem(k_ref.at[tile], k_smem.at[slot], k_full.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[tile], v_smem.at[slot], v_full.at[slot])
            return ()

        lax.fori_loop(0, last - first, load, ())


def _is_plain(head_dim):
    """Whether Mosaic itself finds a layout for the rows of q, which it can read without conflicts.

    For others its search fails or takes minutes: they are given one that always serves."""
    return head_dim in (64, 128, 192)


def _columns(zero_times, config):
    """All columns of a head and, past head_dim, what TMA fills up with zeros.

    A slice that begins at a constant would have to lie inside the array, so it begins at a product.
    """
    if config.width == config.head_dim:
        return slice(None)
    return pl.ds(pl.multiple_of(zero_times * 0, config.width), config.width)


def _tiles_of_chunk(los, his, c, config):
    """Tiles [first, last) of chunk c: an equal share of those that any of its queries sees.

    So the splits follow the length of the sequence, not the capacity of the cache."""
    block, num_splits = jnp.int32(config.block_kv), jnp.int32(config.num_splits)
    begin = lax.div(reduce_tree(jnp.minimum, los), block)
    end = lax.div(reduce_tree(jnp.maximum, his) + (block - 1), block)
    tiles = jnp.maximum(end - begin, 0)
    return begin + lax.div(c * tiles, num_splits), begin + lax.div((c + 1) * tiles, num_splits)


def _attend_chunk(first, last, los, his, q, p_smem, ring, config):
    """Online softmax over the chunk's tiles.

    Returns (acc [H, rows], top [rows], total [block_kv, rows]): the weighted sum, the largest logit
    in base 2, and the weights' sums, which are added up over the keys only once, at the end.
    """
    k_smem, v_smem, k_full, v_full, released = ring
    layout, block, (H, rows) = plgpu.Layout.WGMMA, config.block_kv, q.shape
    seen_by_all = reduce_tree(jnp.maximum, los), reduce_tree(jnp.minimum, his)
    seen_by_any = reduce_tree(jnp.minimum, los), reduce_tree(jnp.maximum, his)

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
            zero_unseen(v_smem.at[slot], start, *seen_by_any)

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
    visible = (slot >= los[0]) & (slot < his[0])
    if config.block_t == 1:
        return visible
    row = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
    for t in range(1, config.block_t):
        seen = (slot >= los[t]) & (slot < his[t])
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
