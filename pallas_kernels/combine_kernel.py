"""Step 2 of Flash-Decoding in a launch of its own, on Pallas Mosaic GPU: merging the chunks of
query rows.

One thread block per query row weighs the chunks by their log-sum-exp. By plan that is only of rows
that step 1 leaves: those of items that are cut and of idle sequences. Step 1 and the letters are in
flash_decode_kernel.py.

It takes 1.1 to 1.9 us, and is for what merge_kernel.py is not: many query rows, a number of splits
that is asked for, batches of few sequences, GPUs on which not all thread blocks run at the same
time. Other ways were slower, for 16/2 heads on an H200. The last block of a row merges: 1.5 to
2.3 us more, for a ticket needs memory that is zeroed first. Step 1 in clusters that merge through
their shared memory: 0.05 us more for 512 tokens, 0.7 for 4096, and at 65536 of 64/8 heads 1.9.
Started early by programmatic dependent launch: 0.4 more.
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
from jaxdecode.pallas_kernels.split_plan import ToCombine

# Chunks of a row that are in flight together where their number is not known when compiled.
_AT_ONCE, _FEW = 16, 2
# Of what a block of step 1 leaves, up to so many rows have a thread block each; of more, some share
# one, so many at most. (Eight rows in two thread blocks took 0.2 to 0.8 us longer where something
# is left, and not less time where nothing is.)
_MOST_ALONE, _MOST_TOGETHER = 8, 4


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
    padded = out_partial.shape[-1]
    out, lse = plgpu.kernel(
        functools.partial(_combine_kernel, config=config),
        out_type=[
            jax.ShapeDtypeStruct(shape, out_dtype),
            jax.ShapeDtypeStruct(shape[:3], jnp.float32),
        ],
        grid=(N, T, B),
        grid_names=("head", "token", "batch"),
        scratch_types={} if H == padded else {"row_smem": plgpu.SMEM((padded,), out_dtype)},
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="flash_decode_combine",
    )(out_partial, lse_partial, *(() if sinks is None else (sinks,)))
    return out, lse


def combine_planned(
    to_combine: ToCombine, sinks: jax.Array | None, out_ref: Any, lse_ref: Any, config: SplitConfig
) -> None:
    """Step 2 for chunks by plan, of what step 1 could not finish: merges what is cut, and fills in
    the rows of idle sequences.

    Args:
      to_combine: from `planned_attention`, as are the arrays in out_ref and lse_ref, which this
        writes the other rows of.
      sinks: [N] float32 or None, one more logit per head with a zero value.
    """
    H, padded = out_ref.shape[-1], to_combine.out_partial.shape[-1]
    rows = config.block_t * config.block_g
    together = min(-(-rows // _MOST_ALONE), _MOST_TOGETHER)
    row_smem = plgpu.SMEM((together, padded), out_ref.dtype)
    plgpu.kernel(
        functools.partial(_planned_kernel, config=config, rows=rows, together=together),
        out_type=(),
        grid=(-(-rows // together), to_combine.left.shape[0]),
        grid_names=("group", "block"),
        num_threads=together,
        thread_name="warpgroup",
        scratch_types={} if H == padded else {"row_smem": row_smem},
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="flash_decode_combine_planned",
    )(*to_combine, sinks, out_ref, lse_ref)


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
    _store_row(merged, top, total, ((b, t, n), (b, t, n)), out_ref, lse_ref, row_smem)


def _planned_kernel(
    out_partial_ref, lse_partial_ref, left_ref, sinks_ref, out_ref, lse_ref,
    *, config: SplitConfig, rows: int, together: int, row_smem=None,
):  # fmt: skip
    """Rows of an item that is cut, and of every item of some sequences if they are idle; each in a
    warpgroup of its own."""
    group, warpgroup, block = map(lax.axis_index, ("group", "warpgroup", "block"))
    row = group * together + warpgroup
    row_smem = None if row_smem is None else row_smem.at[warpgroup]
    num_blocks, (_, T, K, G, _) = left_ref.shape[0], out_ref.shape
    b, head, first, count, *idle = (left_ref[block, x] for x in range(left_ref.shape[1]))

    def finish(b, head, add_chunks):
        """Stores what add_chunks makes of a row without any. Rows of no token or head are left."""
        h, row_block = (f(head, jnp.int32(config.row_blocks)) for f in (lax.div, lax.rem))
        t, g = _token_and_head(row_block, row, config)

        @pl.when((t < T) & (g < G) & (row < rows))
        def _():
            sink = None if sinks_ref is None else sinks_ref[h * G + g]
            top, total, merged = add_chunks(_start_of_row(sink, out_partial_ref.shape[-1]))
            top = jnp.where(top == -jnp.inf, 0.0, top)
            places = (b, t, h, g), (b, h, row_block, row)
            _store_row(merged, top, total, places, out_ref, lse_ref, row_smem)

    def merge(at_once):
        """A row's chunks are merged some at a time: they cost a trip to memory together."""

        def some(i, sums):
            numbers = [i * at_once + x for x in range(at_once)]
            return _merge_chunks(sums, out_partial_ref, lse_partial_ref, first, count, numbers, row)

        trips = lax.div(count + (at_once - 1), jnp.int32(at_once))
        finish(b, head, lambda start: lax.fori_loop(0, trips, some, start))

    # In a large batch a row has few chunks, and the loads of more than there are would be felt.
    pl.when((count > 1) & (count <= _FEW))(lambda: merge(_FEW))
    pl.when(count > _FEW)(lambda: merge(_AT_ONCE))
    heads = K * config.row_blocks
    for i, is_idle in enumerate(idle):

        @pl.when(is_idle == 1)
        def _(sequence=block + i * num_blocks):
            pl.loop(0, heads)(lambda head: finish(sequence, head, lambda start: start))


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


def _token_and_head(row_block, row, config):
    """A row's token and its head of the KV head's group, past the last ones where it is padding."""
    t_block, g_block = (f(row_block, jnp.int32(config.row_blocks_g)) for f in (lax.div, lax.rem))
    t_row, g_row = (f(row, jnp.int32(config.block_g)) for f in (lax.div, lax.rem))
    return t_block * config.block_t + t_row, g_block * config.block_g + g_row


def _store_row(merged, top, total, places, out_ref, lse_ref, row_smem):
    """Normalises and stores a row, by way of shared memory where it is padded: only TMA can leave
    a part out."""
    place, lse_place = places
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
    lse_ref[lse_place] = jnp.where(empty, -jnp.inf, (top + jnp.log2(divisor)) / LOG2_E)
