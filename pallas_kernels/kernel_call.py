"""What the GPU kernels' callers share: the gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdecode.pallas_kernels.xla import attend_gradient

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2, 3, 4))
def differentiable(
    forward: Callable[..., tuple[Array, Array]], operands: tuple[Any, ...],
    scale: float, softcap: float | None, out_dtype: Any,
) -> tuple[Array, Array]:  # fmt: skip
    """A kernel's attention with the gradient of the portable implementation.

    Args:
      forward: computes (out, lse) from the operands and, by keyword, out_dtype.
      operands: (q, k, v, lo, hi, sinks, ...) with sinks [N] float32 or None; what follows is passed
        on and has no gradient.
      scale, softcap: of the logits, as `forward` takes them.
    """
    return forward(*operands, out_dtype=jnp.dtype(out_dtype))


def _saving(forward, operands, scale, softcap, out_dtype):
    out, lse = differentiable(forward, operands, scale, softcap, jnp.float32)
    return (out.astype(out_dtype), lse), (operands, out, lse)


def _backward(forward, scale, softcap, out_dtype, residuals, cotangents):
    (q, k, v, lo, hi, sinks, *rest), out, lse = residuals
    d_out, d_lse = cotangents
    dq, dk, dv = attend_gradient(
        q, k, v, lo, hi, out, lse, d_out, d_lse, scale=scale, softcap=softcap
    )
    d_sinks = None
    if sinks is not None:
        # A sink is a logit whose value is zero: only the normalisation feels it.
        delta = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1) - d_lse
        # Without a visible key and with a sink of -inf both are -inf, and their difference NaN.
        weight = jnp.exp(sinks[None, None, :] - jnp.where(lse == -jnp.inf, 0.0, lse))
        d_sinks = -jnp.sum(weight * delta, axis=(0, 1))
    return ((dq, dk, dv, None, None, d_sinks, *[None] * len(rest)),)


differentiable.defvjp(_saving, _backward)
