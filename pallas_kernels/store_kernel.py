"""What a thread block of Flash-Decoding does with what it has found, on Pallas Mosaic GPU.

Its consumers' sums become one's, and that one stores them: as a part of the result, for the combine
to merge, or as the result itself where the chunk is all that there is of its item.
The letters are those of flash_decode_kernel.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecode.pallas_kernels.chunk_kernel import (
    Chunk,
    Scratch,
    across,
    first_row,
    keys_axis,
)
from jaxdecode.pallas_kernels.mosaic import LOG2_E, meet, store_in_shared
from jaxdecode.pallas_kernels.split_config import SplitConfig


def gather(sums: tuple, store: Callable, consumer, scratch: Scratch, config: SplitConfig) -> None:
    """Calls store(sums) with the sums of all consumers, in one of them: either `store_partial` or
    `store_finished`. No store before this one may still read shared memory."""
    if config.consumers == 1:
        acc, top, total = sums
        store((acc, top, total.sum(axis=0) if config.transposed else total))
        return
    meet(scratch.meeting)
    pl.when(consumer == 1)(lambda: _hand_over(sums, scratch))
    meet(scratch.meeting)
    pl.when(consumer == 0)(lambda: store(_merged(sums, scratch, config)))


def _hand_over(sums, scratch):
    """Leaves a consumer's sums in shared memory."""
    scratch.out[...], scratch.handed[0], scratch.handed[1] = sums
    plgpu.commit_smem()


def _merged(sums, scratch, config):
    """A consumer's sums and those that were handed over, as one's."""
    acc, top, total = sums
    row = plgpu.Layout.WGMMA.reduce(1)
    other = plgpu.load(scratch.out, layout=plgpu.Layout.WGMMA)
    other_top, other_total = (
        plgpu.load(scratch.handed.at[x], layout=row, optimized=False) for x in range(2)
    )
    new_top = jnp.maximum(top, other_top)
    shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    weight, other_weight = jnp.exp2(top - shift), jnp.exp2(other_top - shift)
    acc = acc * across(weight, config.width, config)
    acc = acc + other * across(other_weight, config.width, config)
    return acc, new_top, total * weight + other_total * other_weight


def store_partial(sums: tuple, out_ref, lse_ref, scratch: Scratch, config: SplitConfig) -> None:
    """Starts to store the chunk's result and its log-sum-exp, in float32 and base 2."""
    out, lse = normalised(sums, config)
    scratch.lse[...] = lse
    rows = pl.ds(0, config.rows)
    for column in _stage(out, scratch.out, config):
        part = out_ref.at[:, pl.ds(column, config.columns)]
        plgpu.copy_smem_to_gmem(scratch.out.at[rows], part)
    plgpu.copy_smem_to_gmem(scratch.lse.at[rows], lse_ref)


def store_finished(
    sums: tuple, chunk: Chunk, sinks_ref, out_ref, lse_ref, scratch: Scratch, config: SplitConfig
) -> None:
    """Starts to store the result of a chunk that is all of its item.

    Args:
      sinks_ref: [N] or None.
      out_ref: [B, T, K, G, H]. lse_ref: [B, K, row_blocks, rows], natural log.
    """
    _, T, _, G, H = out_ref.shape
    t0, g0 = first_row(chunk.row_block, config)
    width = min(H, scratch.finished.shape[1])
    # Rows go together where each has a place in the result and nothing is between them.
    has_padding = width < scratch.finished.shape[1]
    heads = config.block_g if G % config.block_g == 0 and not has_padding else 1
    if sinks_ref is not None:
        first_head = chunk.h * G + g0
        sums = _with_sinks(sums, _sinks_of_rows(sinks_ref, first_head, config), config)
    out, lse = normalised(sums, config)
    scratch.lse[...] = lse * (1 / LOG2_E)
    # Mosaic finds no way without bank conflicts where it transposes, but to tiles of 8 rows, which
    # copies must not cut, nor where copies take a part of a row.
    optimized = not has_padding and (not config.transposed or heads % 8 == 0)
    for column in _stage(out, scratch.finished, config, optimized):
        for row in range(0, config.block_t * config.block_g, heads):
            t, g = t0 + row // config.block_g, g0 + row % config.block_g
            rows = scratch.finished.at[pl.ds(row, heads), pl.ds(0, width)]
            part = out_ref.at[chunk.b, t, chunk.h, pl.ds(g, heads), pl.ds(column, width)]
            copy = functools.partial(plgpu.copy_smem_to_gmem, rows, part)
            pl.when((t < T) & (g < G))(copy)
    lse_part = lse_ref.at[chunk.b, chunk.h, chunk.row_block]
    plgpu.copy_smem_to_gmem(scratch.lse.at[pl.ds(0, config.rows)], lse_part)


def _sinks_of_rows(sinks_ref, first_head, config):
    """Each row's sink, in base 2."""
    layout = plgpu.Layout.WGMMA.reduce(keys_axis(config))
    row = plgpu.broadcasted_iota(jnp.int32, (config.product_rows,), 0, layout=layout)
    last_head = sinks_ref.shape[0] - 1
    sinks = [sinks_ref[jnp.minimum(first_head + g, last_head)] for g in range(config.block_g)]
    of_rows = jnp.where(row >= 0, sinks[0], 0.0)
    for first in range(0, config.block_t * config.block_g, config.block_g):
        for g, sink in enumerate(sinks):
            of_rows = jnp.where(row >= first + g, sink, of_rows)
    return of_rows * LOG2_E


def _with_sinks(sums, sinks, config):
    """The sums with one more logit for each row, whose value is zero."""
    acc, top, total = sums
    new_top = jnp.maximum(top, sinks)
    shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    weight = jnp.exp2(top - shift)
    return (
        acc * across(weight, config.width, config),
        new_top,
        total * weight + jnp.exp2(sinks - shift),
    )


def normalised(sums: tuple, config: SplitConfig) -> tuple:
    """The chunk's result, 0 where it has no keys, and its log-sum-exp in base 2, -inf there."""
    acc, top, total = sums
    empty = total == 0.0
    divisor = jnp.where(empty, 1.0, total)
    out = acc * across(1.0 / divisor, config.width, config)
    return out, jnp.where(empty, -jnp.inf, top + jnp.log2(divisor))


def _stage(out, staging, config, optimized=True):
    """Puts the result, in the dtype of `staging`, there for TMA, some columns after the others.
    Yields the first of them; they have been read before the next come.

    optimized: whether Mosaic must do so without bank conflicts."""
    if config.transposed:
        out = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
    for column in range(0, config.width, config.columns):
        if column > 0:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if config.transposed:
            target, part = staging.transpose((1, 0)), out
        else:
            target, part = staging, out[:, column : column + staging.shape[1]]
        store_in_shared(target, part.astype(staging.dtype), optimized)
        plgpu.commit_smem()
        yield column
