"""Types inside `jax.shard_map`: over which mesh axes a value may differ between devices."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

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


def vary_over_none(x: Array) -> Array:
    """The same value, typed as equal on all devices, which it need not be. A kernel writes into no
    reference of another type; what comes out of it has to be cast back by `vary_over`."""
    return _vary_over_none.bind(x) if varying_axes(x) else x


_vary_over_none = Primitive("vary_over_none")
_vary_over_none.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape, x.dtype))
mlir.register_lowering(_vary_over_none, lambda _, x: [x])
