"""A kernel that only reads: how fast the memory of a Hopper GPU gives its contents away.

Built like the streaming part of `flash_decode_kernel`, so its speed is the ceiling of what such a
kernel can reach. Every element is summed, because a read that nobody uses proves nothing.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecode.pallas_kernels.split_config import NUM_SMS

COLUMNS = 128
TILE_ROWS = 64
# Tiles in flight: 96 KB in bfloat16, so that two blocks fit into a multiprocessor's 227 KB.
_STAGES = 6
_ADDED_ROWS = 8


@functools.partial(jax.jit, static_argnames="num_blocks")
def read_sums(x: jax.Array, *, num_blocks: int = NUM_SMS) -> jax.Array:
    """Reads all of x once and returns sums that every element is part of.

    Args:
      x: [rows, 128] in bfloat16 or float16, rows a multiple of 64.
      num_blocks: thread blocks that share the rows.

    Returns:
      [num_blocks, 8, 128] float32; summed over the first two axes it is x summed over its rows.

    Raises:
      ValueError: x has another shape.
    """
    if x.ndim != 2 or x.shape[1] != COLUMNS or x.shape[0] % TILE_ROWS:
        raise ValueError(
            f"x must have shape [rows, {COLUMNS}] with rows a multiple of {TILE_ROWS}, "
            f"found {x.shape}"
        )
    barriers = plgpu.Barrier(num_barriers=_STAGES)
    return plgpu.kernel(
        functools.partial(_read_kernel, num_tiles=x.shape[0] // TILE_ROWS, num_blocks=num_blocks),
        out_type=jax.ShapeDtypeStruct((num_blocks, _ADDED_ROWS, COLUMNS), jnp.float32),
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="thread",
        scratch_types=[plgpu.SMEM((_STAGES, TILE_ROWS, COLUMNS), x.dtype), barriers, barriers],
        kernel_name="read_sums",
    )(x)


def _read_kernel(x_ref, sums_ref, ring, full, released, *, num_tiles: int, num_blocks: int):
    """One block's share of the tiles: a producer streams them through the ring, a consumer adds."""
    block = lax.axis_index("block")
    first = lax.div(block * num_tiles, jnp.int32(num_blocks))
    count = lax.div((block + 1) * num_tiles, jnp.int32(num_blocks)) - first
    layout = plgpu.Layout.WG_STRIDED((_ADDED_ROWS, COLUMNS), vec_size=8)

    @pl.when(lax.axis_index("thread") == 0)
    def _add():
        def tile(i, sums):
            slot = lax.rem(i, jnp.int32(_STAGES))
            plgpu.barrier_wait(full.at[slot])
            for row in range(0, TILE_ROWS, _ADDED_ROWS):
                part = ring.at[slot, pl.ds(row, _ADDED_ROWS)]
                sums = sums + plgpu.load(part, layout=layout).astype(jnp.float32)
            # What was read must be over for the copy engine too, before it writes there again.
            plgpu.commit_smem()
            plgpu.barrier_arrive(released.at[slot])
            return sums

        zeros = jnp.zeros((_ADDED_ROWS, COLUMNS), jnp.float32)
        sums_ref[block] = lax.fori_loop(0, count, tile, plgpu.layout_cast(zeros, layout))

    @pl.when(lax.axis_index("thread") == 1)
    def _stream():
        def load(i, _):
            slot = lax.rem(i, jnp.int32(_STAGES))

            @pl.when(i >= _STAGES)
            def _():
                plgpu.barrier_wait(released.at[slot])

            @pl.when(i < count)
            def _():
                rows = pl.ds((first + i) * TILE_ROWS, TILE_ROWS)
                plgpu.copy_gmem_to_smem(x_ref.at[rows], ring.at[slot], full.at[slot])

            return ()

        # A few rounds more: whoever waits for a barrier has to see all of its phases.
        lax.fori_loop(0, count + _STAGES, load, ())
