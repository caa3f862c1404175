"""What the kernels on Pallas Mosaic GPU share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2_E = math.log2(math.e)
# Threads of a warpgroup. Each has the same number of elements of a row that is spread over them.
THREADS = 128
# A thread's widest load.
_VECTOR_BYTES = 16


def reduce_tree(combine: Callable, values: list) -> Any:
    """Reduces as a balanced tree: a chain would cost its length in latencies."""
    while len(values) > 1:
        pairs = [combine(*values[i : i + 2]) for i in range(0, len(values) - 1, 2)]
        values = pairs + values[len(values) & ~1 :]
    return values[0]


def vector_layout(size: int, dtype: Any) -> plgpu.Layout:
    """Spreads so many elements, a multiple of THREADS, over the threads, for loads as wide as
    can be."""
    widest = _VECTOR_BYTES // jnp.dtype(dtype).itemsize
    vector = next(n for n in (8, 4, 2, 1) if n <= widest and size % (n * THREADS) == 0)
    return plgpu.Layout.WG_STRIDED((size,), vec_size=vector)


def load_vector(ref: Any) -> Any:
    """Loads [size], laid out by `vector_layout`."""
    return plgpu.load(ref, layout=vector_layout(ref.shape[0], ref.dtype))


def swizzled(columns: int, itemsize: int) -> tuple:
    """Layout of a matrix in shared memory that the tensor cores and TMA read without conflicts."""
    swizzle = next(x for x in (128, 64, 32) if columns * itemsize % x == 0)
    return (
        plgpu.TilingTransform((8, swizzle // itemsize)),
        plgpu.SwizzleTransform(swizzle),
    )


def accumulate(acc, p, v_tile) -> Any:
    """acc [64, H] plus p [64, block_kv], both in registers, times v_tile [block_kv, H].

    Mosaic's interpreter lacks this product: tests put another in its place."""
    return pl.run_state(lambda acc: plgpu.wgmma(acc, p, v_tile))(plgpu.ACC.init(acc))


def meet(barrier) -> None:
    """Waits until all warpgroups that a barrier expects are here."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def store_in_shared(ref, value, optimized: bool) -> None:
    """ref[...] = value, where ref is shared memory.

    optimized: whether Mosaic must find a way without bank conflicts. A jax that has no
    `plgpu.store`, before 0.12, finds one where it can and makes do with conflicts elsewhere."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=optimized)
    else:
        ref[...] = value


def zero_unseen(v_tile, start, lo, hi) -> None:
    """Zeroes the slots of a V tile that no query sees: their weight is zero, but 0 * NaN is NaN.

    Args:
      v_tile: [block_kv, H] in shared memory, block_kv a multiple of 64.
      start: the slot of its first row. lo, hi: the slots lo <= s < hi are seen.
    """
    H = v_tile.shape[1]
    layout = plgpu.Layout.WGMMA
    for column in range(0, H, 64):
        part = v_tile.at[:, pl.ds(column, min(64, H - column))]
        slot = plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=layout) + start
        values = plgpu.load(part, layout=layout)
        part[...] = jnp.where((slot >= lo) & (slot < hi), values, jnp.zeros_like(values))
