"""The two products of attention, queries with keys and weights with values, in three forms.

Off a CPU, XLA multiplies batches of matrices that lie one behind the other. Keys [B, s, K, H] with
B and K as batch dimensions do not, so it copies them to [B, K, s, H], and in a token loop it copies
the whole cache, ahead of the loop and back behind it. A decode step has two forms that go without.
B batch, T query tokens, s slots of a block, K KV heads, G query heads of each, H head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

Array = jax.Array

# XLA sums values for two query heads in one kernel: for more than four, they are read too often.
_MOST_SUMMED = 4


class Products(NamedTuple):
    """A form of the two products, both in float32.

    Attributes:
      logits: (q [B, T, K, G, H], k [B, s, K, H]) -> [B, K, G, T, s], neither scaled nor capped.
      weigh: (p [B, K, G, T, s] float32, v [B, s, K, H], visible [B, T, s]) -> [B, K, G, T, H].
        What v holds in slots that are not visible never matters.
    """

    logits: Callable[[Array, Array], Array]
    weigh: Callable[[Array, Array, Array], Array]


def einsum(spec: str, x: Array, y: Array) -> Array:
    """In float32; float32 inputs are multiplied as such: the GPU default rounds them to TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, y, precision=precision, preferred_element_type=jnp.float32)


def best_products(q: Array, k: Array) -> Products:
    """The form, off a CPU, for q [B, T, N, H] and k [B, S, K, H]."""
    (B, T, N, _), K = q.shape, k.shape[2]
    if T > 1 or B == 1 or K == 1:  # a single batch dimension XLA takes as it lies
        return PLAIN
    # K times the work is nothing beside the memory, but for float32, which has no tensor cores.
    sharded = jax.typeof(k).sharding.spec[2] is not None  # heads that no product may mix
    return SUMMED if N // K <= _MOST_SUMMED or q.dtype == jnp.float32 or sharded else ALL_HEADS


def _plain_logits(q, k):
    return einsum("btkgh,bskh->bkgts", q, k)


def _plain_weigh(p, v, visible):
    """The weight of slots not visible is zero, but 0 * NaN is NaN. Slots that no query of the
    sequence sees are zeroed. One that only some see and that is not finite (rare) takes the slow
    way."""
    p, v = p.astype(v.dtype), _zeroed(v, visible)

    def together(p, v):
        return einsum("bkgts,bskh->bkgth", p, v)

    def one_by_one(p, v):
        def one(p_t, visible_t):
            seen = jnp.where(visible_t[..., None, None], v, 0)
            return einsum("bkgs,bskh->bkgh", p_t, seen)

        out = lax.map(lambda x: one(*x), (jnp.moveaxis(p, 3, 0), jnp.moveaxis(visible, 1, 0)))
        return jnp.moveaxis(out, 0, 3)

    if p.shape[3] == 1:
        return together(p, v)
    return lax.cond(jnp.isfinite(v).all(), together, one_by_one, p, v)


def _zeroed(v, visible):
    return jnp.where(visible.any(axis=1)[..., None, None], v, 0)


def _summed_logits(q, k):
    k = _as_stored(k).astype(jnp.float32)
    heads = jnp.moveaxis(q.astype(jnp.float32), 3, 0)
    # A sum for each query head. XLA puts them into one kernel, which reads the keys once.
    logits = jnp.stack([(head * k).sum(axis=-1) for head in heads])
    return jnp.transpose(logits, (1, 3, 0, 2))[:, :, :, None]


def _summed_weigh(p, v, visible):
    v = _as_stored(v).astype(jnp.float32)
    seen = visible[:, 0, :, None, None]
    weights = jnp.transpose(p[:, :, :, 0], (2, 0, 3, 1))[..., None]
    sums = [jnp.where(seen, weight * v, 0).sum(axis=1) for weight in weights]
    return jnp.stack(sums, axis=2)[:, :, :, None]


def _all_heads_logits(q, k):
    """Over the numbers of all KV heads at once: a query is zero but for its own head's."""
    queries = jnp.where(_own(q.shape[2]), q[:, 0, :, :, None], 0)
    return einsum("bkgch,bsch->bkgs", queries, _as_stored(k))[:, :, :, None]


def _all_heads_weigh(p, v, visible):
    p, v = p[:, :, :, 0].astype(v.dtype), _zeroed(_as_stored(v), visible)
    out = jnp.where(_own(v.shape[2]), einsum("bkgs,bsch->bkgch", p, v), 0)
    return out.sum(axis=3)[:, :, :, None]


def _own(K):
    return jnp.eye(K, dtype=bool)[None, :, None, :, None]


def _as_stored(x):
    """Keeps XLA from choosing another order of x's dimensions, and with it the cache's."""
    return with_layout_constraint(x, Layout(major_to_minor=(0, 1, 2, 3)))


PLAIN = Products(_plain_logits, _plain_weigh)
SUMMED = Products(_summed_logits, _summed_weigh)
ALL_HEADS = Products(_all_heads_logits, _all_heads_weigh)
