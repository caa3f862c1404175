"""Residual and norm of a few rows on Pallas Mosaic GPU, one launch for both.

Such a kernel is all latency. The thread blocks of a row share what is written, but each of them
reads and squares all of the row: that costs less than to wait for one another's sums.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecode.pallas_kernels.mosaic import THREADS, load_vector, vector_layout


def add_and_norm(
    x: jax.Array, delta: jax.Array, scale: jax.Array, *, eps: float, parts: int
) -> tuple[jax.Array, jax.Array]:
    """`norm.add_and_norm` of rows.

    Args:
      x, delta: [rows, D] of one dtype, D a multiple of 8 and at least 128. scale: [D].
      eps: added to the mean square.
      parts: thread blocks of a row; more than one divide D into multiples of 128. The results have
        the same bits whatever their number.

    Returns:
      (x + delta, its norm), both [rows, D].
    """
    out_type = jax.ShapeDtypeStruct(x.shape, x.dtype)
    total, normed = plgpu.kernel(
        functools.partial(_norm_kernel, eps=eps, parts=parts),
        out_type=[out_type, out_type],
        grid=(x.shape[0], parts),
        grid_names=("row", "part"),
        kernel_name="add_and_norm",
        # Its threads exchange a sum, and nothing through what they store.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(x, delta, scale)
    return total, normed


def _norm_kernel(x_ref, delta_ref, scale_ref, total_ref, normed_ref, *, eps: float, parts: int):
    """One block's part of a row. All loads are independent of each other and come before the first
    store, which none may pass: they cost one trip to memory."""
    row, D = lax.axis_index("row"), x_ref.shape[1]
    width = D // parts
    first = lax.axis_index("part") * width
    places = [pl.ds(first + start, size) for start, size, _ in _pieces(width)]
    whole = [
        [load_vector(ref.at[row, pl.ds(start, size)]) for ref in (x_ref, delta_ref)]
        for start, size, _ in _pieces(D)
    ]
    own = [
        [
            load_vector(ref)
            for ref in (x_ref.at[row, place], delta_ref.at[row, place], scale_ref.at[place])
        ]
        for place in places
    ]
    squares = [
        _sum_of_squares(rounded_sum(*operands), fresh)
        for operands, (_, _, fresh) in zip(whole, _pieces(D), strict=True)
    ]
    mean_square = functools.reduce(jnp.add, squares) / D
    for place, (x, delta, scale) in zip(places, own, strict=True):
        total = rounded_sum(x, delta)
        total_ref[row, place] = total
        normed_ref[row, place] = normalised(total, mean_square, scale, eps)


def rounded_sum(x: jax.Array, delta: jax.Array) -> jax.Array:
    """x + delta in their dtype."""
    return (x.astype(jnp.float32) + delta.astype(jnp.float32)).astype(x.dtype)


def normalised(x: jax.Array, mean_square: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale, rounded as in `norm.plain`; mean_square is float32."""
    normal = (x.astype(jnp.float32) * lax.rsqrt(mean_square + eps)).astype(x.dtype)
    return (normal.astype(jnp.float32) * scale.astype(jnp.float32)).astype(x.dtype)


def _sum_of_squares(x, fresh):
    """Of the elements from `fresh` on, in float32."""
    squares = jnp.square(x.astype(jnp.float32))
    if fresh:
        layout = vector_layout(x.shape[0], x.dtype)
        place = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=layout)
        squares = jnp.where(place >= fresh, squares, 0.0)
    return jnp.sum(squares)


def _pieces(size: int) -> list[tuple[int, int, int]]:
    """(start, size, fresh) of pieces that cover so many elements, each spread evenly over the
    threads. The last may begin in the one before it: its elements from `fresh` on do not."""
    even = size // THREADS * THREADS
    pieces = [(0, even, 0)]
    if size > even:
        pieces += [(size - THREADS, THREADS, even - (size - THREADS))]
    return pieces
