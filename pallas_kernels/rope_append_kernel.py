"""Rotating queries and keys and appending to the cache, on Pallas Mosaic GPU.

The work is nothing, so all that counts is how often a thread waits for memory: once. Everything is
loaded at the same time, straight into registers, and stored from there; a warp has a head.

B batch, T tokens in this call, N query heads, K KV heads, H head_dim, S capacity.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_WARPS, _LANES = 4, 32


def rotate_and_append(
    projected: jax.Array, cos: jax.Array, sin: jax.Array, slots: jax.Array, keys_ref: Any,
    values_ref: Any,
) -> jax.Array:  # fmt: skip
    """Runs the kernel: returns the queries [B, T, N, H], and writes keys and values in place.

    Args:
      projected: [B, T, N + 2 K, H], heads of queries, keys and values.
      cos, sin: [B, T, H] float32, cos and cos, and -sin and sin, of the tokens' positions.
      keys_ref, values_ref: the caches. They and the others are as in `rope_append`.
    """
    B, T, heads, H = projected.shape
    K = keys_ref.shape[2]
    N = heads - 2 * K
    heads = math.gcd(K, _WARPS)
    return plgpu.kernel(
        functools.partial(_kernel, heads=heads),
        out_type=jax.ShapeDtypeStruct((B, T, N, H), projected.dtype),
        grid=((N + K) // heads, T, B),
        grid_names=("group", "token", "batch"),
        # A thread stores what it has loaded itself, so nobody needs to wait for another.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="rope_append",
    )(projected, cos, sin, slots, keys_ref, values_ref)


def _kernel(projected_ref, cos_ref, sin_ref, slots_ref, keys_ref, values_ref, q_ref, *, heads: int):
    """Some heads of one token: of its queries, or of its keys and values."""
    group, t, b = map(lax.axis_index, ("group", "token", "batch"))
    _, _, N, H = q_ref.shape
    _, S, K, _ = keys_ref.shape
    halves = pl.ds(0, H // 2), pl.ds(H // 2, H // 2)
    layout = _layout(heads, H // 2)
    slot = slots_ref[b, t]
    cos, sin = (
        _for_all(plgpu.load(ref.at[b, t, half], layout=layout.reduce(0), optimized=False), layout)
        for ref, half in zip((cos_ref, sin_ref), halves, strict=True)
    )

    def load(first):
        rows = projected_ref.at[b, t, pl.ds(first, heads)]
        return [plgpu.load(rows.at[:, half], layout=layout, optimized=False) for half in halves]

    def rotated(first, second):
        first, second = first.astype(jnp.float32), second.astype(jnp.float32)
        turned = first * cos - second * sin, second * cos + first * sin
        return [x.astype(projected_ref.dtype) for x in turned]

    def store(ref, values):
        for half, value in zip(halves, values, strict=True):
            ref[:, half] = value.astype(ref.dtype)

    first = group * heads

    @pl.when(first < N)
    def _rotate():
        store(q_ref.at[b, t, pl.ds(first, heads)], rotated(*load(first)))

    @pl.when(first >= N)
    def _append():
        k, v = load(first), load(first + K)
        # Or the compiler would load them only once it is known that they are stored.
        k, v = lax.optimization_barrier((rotated(*k), v))

        @pl.when((slot >= 0) & (slot < S))
        def _store():
            mine = b, slot, pl.ds(first - N, heads)
            store(keys_ref.at[mine], k)
            store(values_ref.at[mine], v)


def _layout(heads, columns):
    """How the threads hold [heads, columns], columns a multiple of 64: a warp has a head, or where
    there are fewer heads than warps several have the same one. So a warp reads and writes whole
    lines of 128 bytes, which Mosaic insists on from jax 0.12 on."""
    width = math.gcd(columns // _LANES, 4)
    warps = (-3,) if heads > 1 else ()
    if heads < _WARPS:
        warps = (*warps, plgpu.Replicated(_WARPS // heads))
    tiling = plgpu.Tiling(((heads, _LANES * width), (width,)))
    return plgpu.Layout.TILED(tiling, warps, (-2,), -1)


def _for_all(row, layout):
    """A row [columns] for every head."""
    heads = layout.args[0].tiles[0][0]
    return plgpu.layout_cast(lax.broadcast_in_dim(row, (heads, *row.shape), (1,)), layout)
