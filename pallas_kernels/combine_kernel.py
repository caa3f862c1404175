"""Step 2 of Flash-Decoding on Pallas Mosaic GPU: merging the chunks of every query row.

One thread block per query row weighs the chunks by their log-sum-exp. Step 1 and the letters are in
flash_decode_kernel.py.
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

from jaxdecode.pallas_kernels.mosaic import LOG2_E
from jaxdecode.pallas_kernels.split_config import SplitConfig

# A row is spread over the 128 threads of a warpgroup, each with the same number of elements.
THREADS = 128


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
    B, T, N, H = shape
    operands = (out_partial, lse_partial) + (() if sinks is None else (sinks,))
    padded = out_partial.shape[-1]
    return plgpu.kernel(
        functools.partial(_combine_kernel, config=config, has_sinks=sinks is not None),
        out_type=[
            jax.ShapeDtypeStruct((B, T, N, H), out_dtype),
            jax.ShapeDtypeStruct((B, T, N), jnp.float32),
        ],
        grid=(N, T, B),
        grid_names=("head", "token", "batch"),
        scratch_types={} if H == padded else {"row_smem": plgpu.SMEM((padded,), out_dtype)},
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)


def _combine_kernel(
    out_partial_ref, lse_partial_ref, *refs, config: SplitConfig, has_sinks: bool, row_smem=None
):
    """One query row: all loads are independent of each other, so they cost one trip to memory."""
    *sink_ref, out_ref, lse_ref = refs
    n, t, b = map(lax.axis_index, ("head", "token", "batch"))
    N, K, C = out_ref.shape[2], out_partial_ref.shape[1], config.num_splits
    h, g = lax.div(n, jnp.int32(N // K)), lax.rem(n, jnp.int32(N // K))
    t_block, t_row = lax.div(t, jnp.int32(config.block_t)), lax.rem(t, jnp.int32(config.block_t))
    g_block, g_row = lax.div(g, jnp.int32(config.block_g)), lax.rem(g, jnp.int32(config.block_g))
    row_block = t_block * config.row_blocks_g + g_block
    row = t_row * config.block_g + g_row
    layout = plgpu.Layout.WG_STRIDED(out_partial_ref.shape[-1:], vec_size=1)
    lses = [lse_partial_ref[b, h, row_block, c, row] for c in range(C)]
    outs = [
        plgpu.load(out_partial_ref.at[b, h, row_block, c, row], layout=layout) for c in range(C)
    ]
    logits = lses + ([sink_ref[0][n] * LOG2_E] if has_sinks else [])
    top = reduce_tree(jnp.maximum, logits)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weights = [jnp.exp2(x - top) for x in logits]
    total = reduce_tree(jnp.add, weights)
    empty = total == 0.0
    divisor = jnp.where(empty, 1.0, total)
    merged = reduce_tree(jnp.add, [x * w for x, w in zip(outs, weights[:C], strict=True)])
    _store_row((merged / divisor).astype(out_ref.dtype), out_ref.at[b, t, n], row_smem)
    lse_ref[b, t, n] = jnp.where(empty, -jnp.inf, (top + jnp.log2(divisor)) / LOG2_E)


def _store_row(values, row_ref, row_smem):
    """Stores a row, by way of shared memory where it is padded: only TMA can leave a part out."""
    if row_smem is None:
        row_ref[...] = values
        return
    row_smem[...] = values
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(row_smem.at[pl.ds(0, row_ref.shape[0])], row_ref)
    plgpu.wait_smem_to_gmem(0)


def reduce_tree(combine: Callable, values: list) -> Any:
    """Reduces as a balanced tree: a chain would cost its length in latencies."""
    while len(values) > 1:
        pairs = [combine(*values[i : i + 2]) for i in range(0, len(values) - 1, 2)]
        values = pairs + values[len(values) & ~1 :]
    return values[0]
