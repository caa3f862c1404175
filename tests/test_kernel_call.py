"""The gradient that callers of the GPU kernels share; the portable attention stands in for them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdecode.pallas_kernels import xla
from jaxdecode.pallas_kernels.kernel_call import differentiable

SCALE = 0.3
# The first query sees nothing, the second a part, the third all.
LO, HI = jnp.array([[0, 1, 0]], jnp.int32), jnp.array([[0, 3, 5]], jnp.int32)


def stand_in(q, k, v, lo, hi, sinks, *, out_dtype, softcap):
    assert sinks is None or sinks.dtype == jnp.float32
    assert isinstance(out_dtype, np.dtype)
    out, lse = xla.attend(q, k, v, lo, hi, scale=SCALE, softcap=softcap, sinks=sinks)
    return out.astype(out_dtype), lse


def through_kernels(q, k, v, sinks, softcap):
    forward = functools.partial(stand_in, softcap=softcap)
    return differentiable(forward, (q, k, v, LO, HI, sinks), SCALE, softcap, jnp.float32)


def portable(q, k, v, sinks, softcap):
    return xla.attend(q, k, v, LO, HI, scale=SCALE, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    ("sinks", "dtype"),
    [
        (None, None), ([0.5, -1.0], "float32"), ([-np.inf, 0.5], "float32"),
        ([0.5, -1.0], "bfloat16"),
    ],
    ids=["none", "two", "one", "two in bfloat16"],
)  # fmt: skip
def test_gradient_is_that_of_the_portable_attention(sinks, dtype, softcap):
    q, k, v = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(1, 3, 2, 8), (1, 5, 1, 8), (1, 5, 1, 8)])
    )
    arguments = (q, k, v, None if sinks is None else jnp.array(sinks, dtype))

    def loss(attend, *arguments):
        out, lse = attend(*arguments, softcap)
        return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))

    wanted = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
    found, expected = (
        jax.grad(functools.partial(loss, attend), wanted)(*arguments)
        for attend in (through_kernels, portable)
    )
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        assert np.isfinite(other).all()
        assert np.abs(other).max() > 0.01
        np.testing.assert_allclose(one, other, atol=1e-5)


def mapped_calls(axes, sinks=None):
    """What vmap over these axes of (q, k, v, lo, hi, sinks) gives, what a loop gives, and the batch
    of each call that the kernels got."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(3, 2, 3, 2, 8), (3, 2, 5, 1, 8), (3, 2, 5, 1, 8)]
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    ranges = [jnp.broadcast_to(x, (3, 2, 3)) for x in (LO, HI)]
    operands = [
        x if x is None or axis == 0 else x[0]
        for x, axis in zip([*arrays, *ranges, sinks], axes, strict=True)
    ]
    batches = []

    def attend(q, *rest, out_dtype):
        batches.append(q.shape[0])
        return stand_in(q, *rest, out_dtype=out_dtype, softcap=None)

    def call(*operands):
        return differentiable(attend, operands, SCALE, None, jnp.float32)

    found = jax.vmap(call, in_axes=axes)(*operands)
    called = tuple(batches)
    rows = [
        call(*(x[i] if axis == 0 else x for x, axis in zip(operands, axes, strict=True)))
        for i in range(3)
    ]
    return found, [jnp.stack(x) for x in zip(*rows, strict=True)], called


@pytest.mark.parametrize(
    "axes", [(0, 0, 0, 0, 0, None), (None, 0, 0, None, 0, None)], ids=["all", "one query"]
)
def test_vmap_is_one_call_of_a_larger_batch(axes):
    found, expected, batches = mapped_calls(axes)
    assert batches[-1] == 6
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.parametrize(
    ("axes", "sinks"),
    [((0, None, None, 0, 0, None), None), ((0, 0, 0, 0, 0, 0), jnp.ones((3, 2)))],
    ids=["one cache", "sinks"],
)
def test_vmap_is_a_loop_where_a_larger_batch_would_copy_the_cache(axes, sinks):
    found, expected, batches = mapped_calls(axes, sinks)
    assert set(batches) == {2}
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_vmap_of_vmap_and_its_gradient():
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, 2, *shape))
        for i, shape in enumerate([(1, 3, 2, 8), (1, 5, 1, 8), (1, 5, 1, 8)])
    )

    def gradient(attend):
        def loss(*arrays):
            return attend(*arrays, None, None)[0].sum()

        return jax.vmap(jax.vmap(jax.grad(loss, (0, 1, 2))))(q, k, v)

    for one, other in zip(gradient(through_kernels), gradient(portable), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
