"""Products of hidden states with weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

# Below about so many elements of a weight, XLA for GPUs makes of a vector times a matrix a sum of
# products, and writes the products to memory first, rounded to bfloat16 if that is their dtype.
_MOST_SUMMED = 10_000_000


def project(x: Array, *weights: Array) -> tuple[Array, ...]:
    """x [B, T, D] times each of the weights [D, ...]: [B, T, ...] in their dtype."""
    if x.shape[0] * x.shape[1] > 1 or all(weight.size > _MOST_SUMMED for weight in weights):
        return _plainly(x, *weights)
    return lax.platform_dependent(x, *weights, cuda=_as_two_rows, default=_plainly)


def _plainly(x: Array, *weights: Array) -> tuple[Array, ...]:
    return tuple(jnp.tensordot(x, weight, axes=1) for weight in weights)


def _as_two_rows(x: Array, *weights: Array) -> tuple[Array, ...]:
    """A matrix times a matrix is left to the tensor cores, and those of one x go together."""
    # The same row twice, for that is part of the product's kernel: padding would be one of its own.
    rows = jnp.broadcast_to(x, (x.shape[0], 2, x.shape[2]))
    return tuple(product[:, :1] for product in _plainly(rows, *weights))
