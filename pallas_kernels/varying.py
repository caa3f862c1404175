"""Types inside `jax.shard_map`: over which mesh axes a value may differ between devices."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

Array = jax.Array


def vary_alike(*values: Array) -> tuple[Array, ...]:
    """The same values, each typed as varying over every axis over which any of them varies.

    Loop carries, branches and custom gradients want equal types; the gradient of this cast sums
    over the axes it adds. Outside shard_map it does nothing.
    """
    axes = frozenset(axis for x in values for axis in varying_axes(x))
    return tuple(vary_over(x, axes - varying_axes(x)) for x in values)


def vary_over(x: Array, axes: frozenset[Any]) -> Array:
    """The same value, typed as varying over these axes, over which it does not yet."""
    return lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def varying_axes(x: Array) -> frozenset[Any]:
    """The mesh axes over which x may differ between devices."""
    return frozenset(jax.typeof(x).mat.varying)
