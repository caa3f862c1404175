"""What the GPU kernels' callers share: the call, its gradient, and vmap."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdecode.pallas_kernels.varying import vary_alike
from jaxdecode.pallas_kernels.xla import attend_gradient

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2, 3, 4))
def differentiable(
    forward: Callable[..., tuple[Array, Array]], operands: tuple[Any, ...],
    scale: float, softcap: float | None, out_dtype: Any,
) -> tuple[Array, Array]:  # fmt: skip
    """A kernel's attention with the gradient of the portable implementation.

    Args:
      forward: computes (out, lse) from the operands, sinks in float32, and, by keyword, out_dtype,
        a `numpy.dtype`. Under vmap it is called with a larger batch.
      operands: (q, k, v, lo, hi, sinks) with sinks [N] or None.
      scale, softcap: of the logits, as `forward` takes them.
      out_dtype: of the result.
    """
    *arrays, sinks = operands
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    call = _folding(functools.partial(forward, out_dtype=jnp.dtype(out_dtype)))
    # Inside shard_map a kernel's results would count as equal on all devices.
    out, lse, *_ = vary_alike(*call(*arrays, sinks), *arrays)
    return out, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_plain_gradient(
    kernel: Callable[..., tuple[Array, ...]], plain: Callable[..., tuple[Array, ...]],
    operands: tuple[Array, ...],
) -> tuple[Array, ...]:  # fmt: skip
    """A kernel's results; their gradient, and what vmap makes of them, are those of a formula.

    Args:
      kernel, plain: compute the same from the operands.
      operands: inside shard_map, varying over the same axes.
    """

    # Inside shard_map a kernel's results would count as equal on all devices. Those that vmap makes
    # of the formula are of the right type already: the cast is not around both.
    @jax.custom_batching.custom_vmap
    def one(*operands: Array) -> tuple[Array, ...]:
        return _varying_as(operands, kernel(*operands))

    @one.def_vmap
    def many(size: int, mapped: tuple[bool, ...], *operands: Array) -> tuple[Any, Any]:
        results = jax.vmap(plain, [0 if flag else None for flag in mapped], 0, axis_size=size)(
            *operands
        )
        return _varying_as(operands, results), tuple(True for _ in results)

    return one(*operands)


def _varying_as(operands, results):
    return vary_alike(*results, *operands)[: len(results)]


def _save_operands(kernel, plain, operands):
    return with_plain_gradient(kernel, plain, operands), operands


def _pull_back(kernel, plain, operands, cotangents):
    _, pull = jax.vjp(plain, *operands)
    return (pull(cotangents),)


with_plain_gradient.defvjp(_save_operands, _pull_back)


def _folding(attend: Callable[..., tuple[Array, Array]]) -> Callable[..., tuple[Array, Array]]:
    """attend(q, k, v, lo, hi, sinks), of which vmap makes one call of a larger batch; or a loop of
    calls where one cache or several sinks are for all."""
    one = jax.custom_batching.custom_vmap(attend)

    @one.def_vmap
    def many(size: int, mapped: tuple[Any, ...], *operands: Any) -> tuple[Any, tuple[bool, bool]]:
        *arrays, sinks = operands
        if not (mapped[1] and mapped[2]) or mapped[5]:
            return _looped(one, mapped, operands), (True, True)
        whole = [
            x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_mapped in zip(arrays, mapped[:5], strict=True)
        ]
        results = one(*(x.reshape(-1, *x.shape[2:]) for x in whole), sinks)
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in results), (True, True)

    return one


def _looped(attend, mapped, operands):
    """Calls for one row of the mapped operands after the other."""
    flags = [flag is True for flag in mapped]
    rows = [x for x, flag in zip(operands, flags, strict=True) if flag]

    def call(rows):
        row = iter(rows)
        return attend(*(next(row) if f else x for x, f in zip(operands, flags, strict=True)))

    return jax.lax.map(call, rows)


def _saving(forward, operands, scale, softcap, out_dtype):
    out, lse = differentiable(forward, operands, scale, softcap, jnp.float32)
    return (out.astype(out_dtype), lse), (operands, out, lse)


def _backward(forward, scale, softcap, out_dtype, residuals, cotangents):
    (q, k, v, lo, hi, sinks), out, lse = residuals
    d_out, d_lse = cotangents
    dq, dk, dv = attend_gradient(
        q, k, v, lo, hi, out, lse, d_out, d_lse, scale=scale, softcap=softcap
    )
    d_sinks = None
    if sinks is not None:
        # A sink is a logit whose value is zero: only the normalisation feels it.
        delta = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1) - d_lse
        logits = sinks.astype(jnp.float32)[None, None, :]
        # Without a visible key and with a sink of -inf both are -inf, and their difference NaN.
        weight = jnp.exp(logits - jnp.where(lse == -jnp.inf, 0.0, lse))
        d_sinks = -jnp.sum(weight * delta, axis=(0, 1)).astype(sinks.dtype)
    return ((dq, dk, dv, None, None, d_sinks),)


differentiable.defvjp(_saving, _backward)
