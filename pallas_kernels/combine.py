"""Merging attention results over disjoint parts of the keys.

Softmax attention over a union of key sets is the average of the attentions over the sets, weighted
by exp(lse): the reduction step of Flash-Decoding.
B batch, T query tokens, N query heads, H head_dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def combine_partials(
    out: Array, lse: Array, axis: int = 0, *, axis_name: str | tuple[str, ...] | None = None
) -> tuple[Array, Array]:
    """Merges partial attention results into the attention over all of their keys.

    Works over an array axis, or over a mesh axis inside `jax.shard_map`, where each device holds
    one part and all receive the merged result. Differentiable; arithmetic is float32.

    Args:
      out: [..., H], each part normalised by its own softmax sum.
      lse: [...], natural-log log-sum-exp of each part's logits. A part with -inf holds no key and
        adds nothing, whatever its `out` holds (NaN too).
      axis: dimension of `lse` that counts the parts. Not used with `axis_name`.
      axis_name: mesh axis (or axes) over which the parts are spread.

    Returns:
      (out, lse) without that axis: out in the dtype given, lse float32. Without any key in any part
      out is 0 and lse is -inf.

    Raises:
      ValueError: shapes do not fit, or both `axis` and `axis_name` are given.
    """
    if out.shape[:-1] != lse.shape:
        raise ValueError(
            "combine_partials: out must have lse's shape plus head_dim, "
            f"found out {out.shape} and lse {lse.shape}"
        )
    if axis_name is None:
        if not -lse.ndim <= axis < lse.ndim:
            raise ValueError(f"combine_partials: axis={axis} is not a dimension of lse {lse.shape}")
        return _merge(out, lse, axis % lse.ndim)
    if axis != 0:
        raise ValueError(f"combine_partials: give axis={axis} or axis_name={axis_name!r}, not both")
    # One collective for both; merging what all devices hold costs nothing beside its latency.
    packed = jnp.concatenate([out, lse[..., None]], axis=-1, dtype=jnp.float32)
    parts = lax.all_gather(packed, axis_name, to="invarying")
    merged, merged_lse = combine_partials(parts[..., :-1], parts[..., -1])
    return merged.astype(out.dtype), merged_lse


def add_sinks(out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """Adds one logit per head with a zero value to a finished attention result.

    Args:
      out: [B, T, N, H] float32; lse: [B, T, N] float32; sinks: [N].

    Returns:
      (out, lse) with the sink counted. Rows without any visible key get out = 0, lse = sink.
    """
    sinks = jnp.broadcast_to(sinks.astype(jnp.float32)[None, None, :], lse.shape)
    return combine_partials(jnp.stack([out, jnp.zeros_like(out)]), jnp.stack([lse, sinks]))


def _merge(out: Array, lse: Array, axis: int) -> tuple[Array, Array]:
    lse = lse.astype(jnp.float32)
    # The result does not depend on the shift, so it needs no gradient.
    top = lax.stop_gradient(lse).max(axis, keepdims=True)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weight = jnp.exp(lse - top)
    # Selected before the product: 0 * NaN would poison the sum, and its gradient.
    safe_out = jnp.where(lse[..., None] == -jnp.inf, 0.0, out.astype(jnp.float32))
    total = weight.sum(axis)
    empty = total == 0.0
    divisor = jnp.where(empty, 1.0, total)
    merged = (weight[..., None] * safe_out).sum(axis) / divisor[..., None]
    merged_lse = jnp.where(empty, -jnp.inf, jnp.log(divisor) + top.reshape(total.shape))
    return merged.astype(out.dtype), merged_lse
