"""Decode attention in plain JAX: any device, any dtype, differentiable.

Goes over the keys block by block with a running maximum and sum (online softmax, arXiv 1805.02867),
so its temporaries stay small whatever the length, and K/V are never repeated per query head.
B batch, T query tokens, S cache capacity, N query heads, K KV heads, G = N // K, H head_dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxdecode.pallas_kernels.combine import add_sinks
from jaxdecode.pallas_kernels.products import PLAIN, best_products, einsum
from jaxdecode.pallas_kernels.varying import vary_alike

Array = jax.Array
Shape = tuple[int, ...]

# Blocks are sized so that logits, weights and converted K/V of one block stay below this.
_BLOCK_BYTES = 96 * 2**20
_SMALLEST_BLOCK = 16
# Of a query row: a logit, its weight, and the weight as it is multiplied.
_ROW_BYTES_PER_SLOT = 12
# On CPU a loop step costs nothing, and small blocks stay in the cache and skip what nobody sees.
_CPU_BLOCK = 512


@functools.partial(jax.jit, static_argnames=("scale", "softcap"), inline=True)
@jax.named_scope("portable_attention")  # so that a profile tells its products from a model's
def attend(
    q: Array, k: Array, v: Array, lo: Array, hi: Array, *,
    scale: float, softcap: float | None = None, sinks: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Attends each query to the cache slots lo <= s < hi of its sequence.

    Args:
      q: [B, T, N, H]; k, v: [B, S, K, H], query head n reads KV head n // G.
      lo, hi: [B, T] int32, hi <= S. An empty range gives out = 0 and lse = -inf.
      scale: multiplies q.k; softcap: logits become softcap * tanh(logits / softcap).
      sinks: [N], one more logit per head with a zero value; neither scaled nor capped.

    Returns:
      out [B, T, N, H] float32, and lse [B, T, N] float32, natural log, sinks counted.
    """
    out, lse = _attend(q, k, v, lo, hi, scale, softcap)
    return (out, lse) if sinks is None else add_sinks(out, lse, sinks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, lo, hi, scale, softcap):
    """Custom gradient: the forward loop has a dynamic trip count, and saving its steps would cost
    the memory that going blockwise saves."""
    block = _block_size(q, k)
    forward = functools.partial(_forward, scale=scale, softcap=softcap)
    return lax.platform_dependent(
        q, k, v, lo, hi,
        cpu=functools.partial(
            forward, block=min(block, _CPU_BLOCK), dynamic=block > _CPU_BLOCK, products=PLAIN
        ),
        # Elsewhere a dynamic trip count sends the loop's predicate to the host at each step.
        default=functools.partial(
            forward, block=_block_off_cpu(q, k), dynamic=False, products=best_products(q, k)
        ),
    )  # fmt: skip


def _attend_fwd(q, k, v, lo, hi, scale, softcap):
    out, lse = _attend(q, k, v, lo, hi, scale, softcap)
    return (out, lse), (q, k, v, lo, hi, out, lse)


def _attend_bwd(scale, softcap, residuals, cotangents):
    return (*attend_gradient(*residuals, *cotangents, scale=scale, softcap=softcap), None, None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def attend_gradient(
    q: Array, k: Array, v: Array, lo: Array, hi: Array,
    out: Array, lse: Array, d_out: Array, d_lse: Array,
    *, scale: float, softcap: float | None = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gradient of `attend` without sinks, from its saved (out, lse) in float32, block by block.

    Returns:
      (dq, dk, dv) in the shapes and dtypes of q, k, v. Rows without keys give zeros.
    """
    B, T, N, H = q.shape
    _, S, K, _ = k.shape
    block = _block_size(q, k)
    q = q.reshape(B, T, K, N // K, H)
    d_out = d_out.astype(jnp.float32).reshape(q.shape)
    # d(logit) = p * (dp - delta); the log-sum-exp's own cotangent enters with p as its derivative.
    delta = jnp.sum(d_out * out.reshape(q.shape), axis=-1) - d_lse.reshape(q.shape[:-1])
    delta = jnp.moveaxis(delta, 1, -1)[..., None]
    lse = jnp.moveaxis(lse.reshape(q.shape[:-1]), 1, -1)[..., None]
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)

    def step(i, grads):
        dq, dk, dv = grads
        start, visible = _block_slots(i, block, S, lo, hi)
        seen = visible.any(axis=1)[..., None, None]
        k_block = jnp.where(seen, lax.dynamic_slice_in_dim(k, start, block, 1), 0)
        v_block = jnp.where(seen, lax.dynamic_slice_in_dim(v, start, block, 1), 0)
        logits = _capped(PLAIN.logits(q, k_block), scale, softcap)
        p = jnp.where(visible[:, None, None], jnp.exp(logits - lse), 0.0)
        dp = einsum("btkgh,bskh->bkgts", d_out, v_block.astype(jnp.float32))
        ds = p * (dp - delta) * scale
        if softcap is not None:
            ds = ds * (1.0 - jnp.square(logits / softcap))
        # A NaN in a value that only some queries see makes their dp NaN, and 0 * NaN the others'.
        ds = jnp.where(visible[:, None, None], ds, 0.0)
        dq = dq + einsum("bkgts,bskh->btkgh", ds, k_block.astype(jnp.float32))
        dk = _add_slice(dk, einsum("bkgts,btkgh->bskh", ds, q.astype(jnp.float32)), start)
        dv = _add_slice(dv, einsum("bkgts,btkgh->bskh", p, d_out), start)
        return dq, dk, dv

    # A static trip count, so that the gradient can be differentiated again.
    zeros = vary_alike(*(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)), q)[:3]
    dq, dk, dv = lax.fori_loop(0, -(-S // block), step, zeros)
    return dq.reshape(B, T, N, H).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _forward(q, k, v, lo, hi, scale, softcap, block, dynamic, products):
    B, T, N, H = q.shape
    _, S, K, _ = k.shape
    block = min(block, S)
    q = q.reshape(B, T, K, N // K, H)

    def step(i, carry):
        acc, top, total = carry
        start, visible = _block_slots(i, block, S, lo, hi)
        k_held, v_held = _held(k, v, i)
        k_block = lax.dynamic_slice_in_dim(k_held, start, block, 1)
        v_block = lax.dynamic_slice_in_dim(v_held, start, block, 1)
        logits = _capped(products.logits(q, k_block), scale, softcap)
        logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
        new_top = jnp.maximum(top, logits.max(axis=-1, keepdims=True))
        shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        p = jnp.exp(logits - shift)
        rescale = jnp.exp(top - shift)
        total = total * rescale + p.sum(axis=-1, keepdims=True)
        acc = acc * rescale + products.weigh(p, v_block, visible)
        return acc, new_top, total

    rows = (B, K, N // K, T)
    carry = vary_alike(
        jnp.zeros((*rows, H), jnp.float32),
        jnp.full((*rows, 1), -jnp.inf, jnp.float32),
        jnp.zeros((*rows, 1), jnp.float32),
        q,
    )[:3]
    if S <= block:
        carry = step(0, carry)
    elif dynamic:
        carry = lax.fori_loop(jnp.min(lo) // block, -(-jnp.max(hi) // block), step, carry)
    else:
        carry = lax.fori_loop(0, -(-S // block), step, carry)
    acc, top, total = carry
    empty = total == 0.0
    divisor = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, jnp.where(empty, 0.0, top) + jnp.log(divisor))
    out = jnp.moveaxis(acc / divisor, 3, 1).reshape(B, T, N, H)
    return out, jnp.moveaxis(lse[..., 0], 3, 1).reshape(B, T, N)


def _block_slots(i, block, S, lo, hi):
    """First slot of block i, and which of its slots each query sees: [B, T, block].

    The last block is moved back to end at S, and leaves what it then shares to its neighbour."""
    start = jnp.minimum(i * block, S - block)
    slots = (start + jnp.arange(block, dtype=jnp.int32))[None, None, :]
    visible = (slots >= lo[..., None]) & (slots < hi[..., None]) & (slots >= i * block)
    return start, visible


def _held(k, v, i):
    """k and v, kept inside step i of a loop: XLA on CPU widens bfloat16 to float32 before slicing,
    and would widen the whole cache ahead of the loop."""
    if k.dtype != jnp.bfloat16:
        return k, v
    _, k, v = lax.optimization_barrier((i, k, v))
    return k, v


def _capped(logits, scale, softcap):
    logits = logits * scale
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _add_slice(total, part, start):
    size = part.shape[1]
    part = part + lax.dynamic_slice_in_dim(total, start, size, 1)
    return lax.dynamic_update_slice_in_dim(total, part, start, 1)


def block_bytes(q_shape: Shape, k_shape: Shape, platform: str) -> int:
    """Bytes, at most, of the logits, weights and converted keys and values of one block.

    Args:
      q_shape, k_shape: of q and k as `attend` takes them.
      platform: "cpu" or another of `jax.Device.platform`.
    """
    slot = _bytes_per_slot(q_shape, k_shape)
    slots = min(k_shape[1], max(_SMALLEST_BLOCK, _BLOCK_BYTES // slot))
    return slot * (min(slots, _CPU_BLOCK) if platform == "cpu" else slots)


def _block_off_cpu(q, k):
    """Each step of a loop copies its keys and values there: a few query rows have one step, and a
    decode step has no more than its logits and weights demand. Copies of whole K and V are not
    counted here; whoever plans memory does."""
    (B, T, N, _), S = q.shape, k.shape[1]
    steps = -(-B * N * T * S * _ROW_BYTES_PER_SLOT // _BLOCK_BYTES)
    return -(-S // steps) if T == 1 or steps == 1 else _block_size(q, k)


def _block_size(q, k):
    block = max(_SMALLEST_BLOCK, _BLOCK_BYTES // _bytes_per_slot(q.shape, k.shape))
    # Powers of two make edges predictable and keep the last block's overlap small.
    return min(k.shape[1], 1 << (block.bit_length() - 1))


def _bytes_per_slot(q_shape, k_shape):
    (B, T, N, H), (_, _, K, _) = q_shape, k_shape
    return _ROW_BYTES_PER_SLOT * B * N * T + 16 * B * K * H
