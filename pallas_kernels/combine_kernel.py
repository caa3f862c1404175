"""Step 2 of Flash-Decoding on Pallas Mosaic GPU: merging the chunks of every query row.

One thread block per query row weighs the chunks by their log-sum-exp. Step 1 and the letters are in
flash_decode_kernel.py.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecode.pallas_kernels.mosaic import LOG2_E, reduce_tree
from jaxdecode.pallas_kernels.split_config import SplitConfig

# Chunks of a row that are in flight together where their number is not known when compiled.
_AT_ONCE, _FEW = 16, 2


def combine_splits(
    out_partial: jax.Array, lse_partial: jax.Array, sinks: jax.Array | None,
    shape: tuple[int, int, int, int], out_dtype: Any, config: SplitConfig,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Step 2: merges the chunks of every query row.

    Args:
      out_partial, lse_partial: from `split_attention`.
      sinks: [N] float32 or None, one more logit per head with a zero value.
      shape: (B, T, N, H).

    Returns:
      out [B, T, N, H] in out_dtype, lse [B, T, N] float32, natural log, sinks counted.
    """
    operands = (out_partial, lse_partial) + (() if sinks is None else (sinks,))
    return _over_rows(_combine_kernel, operands, shape, out_dtype, config)


def combine_planned(
    out_partial: jax.Array, lse_partial: jax.Array, spans: jax.Array, sinks: jax.Array | None,
    shape: tuple[int, int, int, int], out_dtype: Any, config: SplitConfig,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Step 2 for chunks by plan.

    Args:
      out_partial, lse_partial: from `planned_attention`.
      spans: of the plan. The others and the results are those of `combine_splits`.
    """
    operands = (out_partial, lse_partial, spans) + (() if sinks is None else (sinks,))
    return _over_rows(_planned_kernel, operands, shape, out_dtype, config)


def _over_rows(kernel, operands, shape, out_dtype, config):
    """Runs a combine kernel, a thread block for each query row."""
    B, T, N, H = shape
    padded = operands[0].shape[-1]
    out, lse = plgpu.kernel(
        functools.partial(kernel, config=config),
        out_type=[
            jax.ShapeDtypeStruct(shape, out_dtype),
            jax.ShapeDtypeStruct(shape[:3], jnp.float32),
        ],
        grid=(N, T, B),
        grid_names=("head", "token", "batch"),
        scratch_types={} if H == padded else {"row_smem": plgpu.SMEM((padded,), out_dtype)},
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="flash_decode_combine",
    )(*operands)
    return out, lse


def _combine_kernel(out_partial_ref, lse_partial_ref, *refs, config: SplitConfig, row_smem=None):
    """One query row: all loads are independent of each other, so they cost one trip to memory."""
    *sinks_ref, out_ref, lse_ref = refs
    n, t, b = map(lax.axis_index, ("head", "token", "batch"))
    C = config.num_splits
    h, row_block, row = _place(n, t, out_ref.shape[2] // out_partial_ref.shape[1], config)
    layout = plgpu.Layout.WG_STRIDED(out_partial_ref.shape[-1:], vec_size=1)
    lses = [lse_partial_ref[b, h, row_block, c, row] for c in range(C)]
    outs = [
        plgpu.load(out_partial_ref.at[b, h, row_block, c, row], layout=layout) for c in range(C)
    ]
    logits = lses + [ref[n] * LOG2_E for ref in sinks_ref]
    top = reduce_tree(jnp.maximum, logits)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weights = [jnp.exp2(x - top) for x in logits]
    total = reduce_tree(jnp.add, weights)
    merged = reduce_tree(jnp.add, [x * w for x, w in zip(outs, weights[:C], strict=True)])
    _store_row(merged, top, total, (b, t, n), out_ref, lse_ref, row_smem)


def _planned_kernel(
    out_partial_ref, lse_partial_ref, spans_ref, *refs, config: SplitConfig, row_smem=None
):
    """One query row. Its chunks are merged some at a time: they cost a trip to memory together."""
    *sinks_ref, out_ref, lse_ref = refs
    n, t, b = map(lax.axis_index, ("head", "token", "batch"))
    K = spans_ref.shape[1] // config.row_blocks
    h, row_block, row = _place(n, t, out_ref.shape[2] // K, config)
    item = h * config.row_blocks + row_block
    first, count = spans_ref[b, item, 0], spans_ref[b, item, 1]
    start = _start_of_row(sinks_ref[0][n] if sinks_ref else None, out_partial_ref.shape[-1])

    def merge(at_once):
        def some(i, sums):
            numbers = [i * at_once + x for x in range(at_once)]
            return _merge_chunks(sums, out_partial_ref, lse_partial_ref, first, count, numbers, row)

        trips = lax.div(count + (at_once - 1), jnp.int32(at_once))
        top, total, merged = lax.fori_loop(0, trips, some, start)
        top = jnp.where(top == -jnp.inf, 0.0, top)
        _store_row(merged, top, total, (b, t, n), out_ref, lse_ref, row_smem)

    # In a large batch a row has few chunks, and the loads of more than there are would be felt.
    pl.when(count <= _FEW)(lambda: merge(_FEW))
    pl.when(count > _FEW)(lambda: merge(_AT_ONCE))


def _start_of_row(sink, width):
    """(top, total, merged) before the first chunk."""
    top = jnp.float32(-jnp.inf) if sink is None else sink * LOG2_E
    total = jnp.where(top == -jnp.inf, 0.0, 1.0)
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=1)
    return top, total, plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)


def _merge_chunks(sums, out_partial_ref, lse_partial_ref, first, count, numbers, row):
    """(top, total, merged) with these of a row's chunks."""
    top, total, merged = sums
    layout = plgpu.Layout.WG_STRIDED(merged.shape, vec_size=1)
    # Past the last chunk that one is loaded again, without weight.
    chunks = [first + jnp.minimum(x, count - 1) for x in numbers]
    lses = [lse_partial_ref[c, row] for c in chunks]
    outs = [plgpu.load(out_partial_ref.at[c, row], layout=layout) for c in chunks]
    logits = [jnp.where(x < count, lse, -jnp.inf) for x, lse in zip(numbers, lses, strict=True)]
    new_top = jnp.maximum(top, reduce_tree(jnp.maximum, logits))
    shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    rescale = jnp.exp2(top - shift)
    weights = [jnp.exp2(x - shift) for x in logits]
    total = total * rescale + reduce_tree(jnp.add, weights)
    update = reduce_tree(jnp.add, [x * w for x, w in zip(outs, weights, strict=True)])
    return new_top, total, merged * rescale + update


def _place(n, t, G, config):
    """Where a query row is in the partial results: KV head, row block, row."""
    h, g = lax.div(n, jnp.int32(G)), lax.rem(n, jnp.int32(G))
    t_block, t_row = lax.div(t, jnp.int32(config.block_t)), lax.rem(t, jnp.int32(config.block_t))
    g_block, g_row = lax.div(g, jnp.int32(config.block_g)), lax.rem(g, jnp.int32(config.block_g))
    return h, t_block * config.row_blocks_g + g_block, t_row * config.block_g + g_row


def _store_row(merged, top, total, place, out_ref, lse_ref, row_smem):
    """Normalises and stores a row, by way of shared memory where it is padded: only TMA can leave
    a part out."""
    empty = total == 0.0
    divisor = jnp.where(empty, 1.0, total)
    out = (merged / divisor).astype(out_ref.dtype)
    if row_smem is None:
        out_ref[place] = out
    else:
        row_smem[...] = out
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(row_smem.at[pl.ds(0, out_ref.shape[-1])], out_ref.at[place])
        plgpu.wait_smem_to_gmem(0)
    lse_ref[place] = jnp.where(empty, -jnp.inf, (top + jnp.log2(divisor)) / LOG2_E)
