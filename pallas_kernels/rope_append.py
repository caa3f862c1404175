"""Between a decoder's projections and its attention: rotating queries and keys, and appending.

On a GPU one kernel does for a few new tokens what takes XLA five, each of about a microsecond.

B batch, T tokens in this call, N query heads, K KV heads, H head_dim, S capacity.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxdecode.pallas_kernels import flash_decode
from jaxdecode.pallas_kernels.kernel_call import with_plain_gradient
from jaxdecode.pallas_kernels.varying import vary_alike, vary_over_none

Array = jax.Array

CACHE_DTYPES = (*flash_decode.DTYPES, "float32")
# Tokens of a decode step; with more, as in prefill, nobody has measured that the kernel is faster.
MOST_TOKENS = 64


def rotate_and_append(
    q: Array, kv: Array, cos: Array, sin: Array, slots: Array, keys: Array, values: Array
) -> tuple[Array, Array, Array]:
    """The queries for attention, and the caches with the new tokens, from one kernel where it can
    serve. Works under jit, vmap and grad.

    Args:
      q: [B, T, N, H]. kv: [B, T, 2, K, H], keys and then values, in q's dtype.
      cos, sin: [B, T, 1, H / 2] float32, of the tokens' positions.
      slots: [B, T] int32, where each token goes, none of [0, S) twice in a row; one that belongs
        elsewhere is not written.
      keys, values: [B, S, K, H]; a jitted step that takes them donated writes them in place.

    Returns:
      (q rotated, keys, values), each in its own dtype.
    """
    operands = (q, kv, cos, sin, slots, keys, values)
    if why_not(q, keys) is not None:
        return plainly(*operands)
    return _by_platform(*vary_alike(*operands))


def why_not(q: Any, keys: Any) -> str | None:
    """Why the kernel does not serve queries and caches like these here; None if it does."""
    B, T, _, H = q.shape
    if q.dtype not in flash_decode.DTYPES or keys.dtype not in CACHE_DTYPES:
        return (
            f"the kernel takes {' and '.join(flash_decode.DTYPES)} for caches of "
            f"{', '.join(CACHE_DTYPES)}, not {q.dtype} for {keys.dtype}"
        )
    if H % 128:
        return f"the kernel takes a head_dim that is a multiple of 128, not {H}"
    if B * T > MOST_TOKENS:
        return f"the kernel is for up to {MOST_TOKENS} tokens in a step, not {B * T}"
    return flash_decode.why_not_here()


def plainly(
    q: Array, kv: Array, cos: Array, sin: Array, slots: Array, keys: Array, values: Array
) -> tuple[Array, Array, Array]:
    """`rotate_and_append` without a kernel, on any device."""
    k, v = apply_rope(kv[:, :, 0], cos, sin), kv[:, :, 1]
    return apply_rope(q, cos, sin), write_slots(keys, k, slots), write_slots(values, v, slots)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Turns x [B, T, N, H] by cos and sin [B, T, 1, H / 2], in float32, and returns x's dtype.

    Paired as in Hugging Face: i turns with i + H / 2 (arXiv 2104.09864 pairs neighbours).
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def write_slots(cache: Array, new: Array, slots: Array) -> Array:
    """The cache [B, S, K, H] with the new tokens [B, T, K, H] in their slots [B, T]. What belongs
    in none of [0, S) is dropped; of the others none may be there twice in a row."""
    row = jnp.broadcast_to(jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None], slots.shape)
    # A dynamic_update_slice would clamp instead, over the newest tokens.
    return cache.at[row, slots].set(
        new.astype(cache.dtype), mode="drop", unique_indices=True, wrap_negative_indices=False
    )


# One jit for the module, so that equal calls, such as a model's layers, share one trace.
@jax.jit
def _by_platform(*operands):
    # Decided when it is lowered: a process with a GPU may compile this call for its CPU.
    return lax.platform_dependent(*operands, cuda=_with_kernel, default=plainly)


def _with_kernel(*operands):
    q, keys, values = with_plain_gradient(_forward, plainly, operands)
    return q, keys, values


# A jit of its own, so that calls of which less is wanted share its lowering.
@jax.jit
def _forward(q, kv, cos, sin, slots, keys, values):
    from jaxdecode.pallas_kernels import rope_append_kernel

    B, T, _, H = q.shape
    # XLA makes q and kv by one product. In its own shape that goes whole: slices of it are copies.
    rows = (B * T, -1) if B * T > 1 else (-1,)
    whole = jnp.concatenate([q.reshape(rows), kv.reshape(rows)], axis=-1)
    heads = whole.reshape(B, T, -1, H)
    keys_ref, values_ref = (jax.new_ref(vary_over_none(x)) for x in (keys, values))
    # For whole heads, as in fused_layer, so that XLA makes them once for both.
    cos, sin = cos.reshape(rows), sin.reshape(rows)
    pairs = [cos, cos], [-sin, sin]
    cos, sin = (jnp.concatenate(pair, axis=-1).reshape(B, T, H) for pair in pairs)
    q = rope_append_kernel.rotate_and_append(heads, cos, sin, slots, keys_ref, values_ref)
    return q, jax.freeze(keys_ref), jax.freeze(values_ref)
