"""What the GPU kernels' callers share: the gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdecode.pallas_kernels.xla import attend_gradient

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 7, 8, 9))
def differentiable(
    forward: Callable[..., tuple[Array, Array]], q: Array, k: Array, v: Array, lo: Array, hi: Array,
    sinks: Array | None, scale: float, softcap: float | None, out_dtype: Any,
) -> tuple[Array, Array]:  # fmt: skip
    """A kernel's attention with the gradient of the portable implementation.

    Args:
      forward: computes (out, lse) from the other arguments, the last three by keyword.
      sinks: [N] float32 or None.
    """
    return forward(
        q, k, v, lo, hi, sinks, scale=scale, softcap=softcap, out_dtype=jnp.dtype(out_dtype)
    )


def _saving(forward, q, k, v, lo, hi, sinks, scale, softcap, out_dtype):
    out, lse = differentiable(forward, q, k, v, lo, hi, sinks, scale, softcap, jnp.float32)
    return (out.astype(out_dtype), lse), (q, k, v, lo, hi, sinks, out, lse)


def _backward(forward, scale, softcap, out_dtype, residuals, cotangents):
    q, k, v, lo, hi, sinks, out, lse = residuals
    d_out, d_lse = cotangents
    dq, dk, dv = attend_gradient(
        q, k, v, lo, hi, out, lse, d_out, d_lse, scale=scale, softcap=softcap
    )
    if sinks is None:
        return dq, dk, dv, None, None, None
    # A sink is a logit whose value is zero: only the normalisation feels it.
    delta = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1) - d_lse
    weight = jnp.exp(sinks[None, None, :] - lse)
    return dq, dk, dv, None, None, -jnp.sum(weight * delta, axis=(0, 1))


differentiable.defvjp(_saving, _backward)
