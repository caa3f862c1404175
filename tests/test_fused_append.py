"""A layer in one kernel that also rotates and appends for the next one.

The letters are those of fused_layer.py; S is the capacity of the cache.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_fused_layer import (
    EPS,
    kernels_in,
    operands,
    pretend_gpu,
    run_once,
    structs,
    traced,
    with_kernels,
)

from jaxdecode.pallas_kernels import fused_layer, rope_append
from jaxdecode.pallas_kernels.fused_layer import Append

__all__ = ["pretend_gpu", "traced"]  # fixtures

S, H = 64, 128


def append_to(weights, slot: int, dtype=None, seed: int = 0) -> Append:
    """A cache of random values, and the rotation at position 7."""
    K = weights.projections[1].shape[1] // (2 * H)
    dtype = dtype or weights.o.dtype
    keys, values = (
        jax.random.normal(jax.random.key(seed + i), (1, S, K, H)).astype(dtype) for i in range(2)
    )
    angle = 7.0 * 10000.0 ** (-jnp.arange(H // 2) / (H // 2))
    cos, sin = (f(angle).astype(jnp.float32)[None, None, None] for f in (jnp.cos, jnp.sin))
    return Append(cos, sin, jnp.full((1, 1), slot, jnp.int32), keys, values)


def appended(attended, x, weights, append, is_last=False):
    """x, queries, keys and values."""
    slots = fused_layer.new_slots(attended, weights)
    return fused_layer.run(attended, x, weights, slots, 1, EPS, append, is_last=is_last)[:4]


def apart(attended, x, weights, append):
    """The same, the projections first."""
    x, projected = run_once(attended, x, weights)
    K = append.keys.shape[2]
    heads = projected.reshape(1, 1, -1, H)
    q, kv = heads[:, :, : -2 * K], heads[:, :, -2 * K :].reshape(1, 1, 2, K, H)
    return x, *rope_append.plainly(q, kv, *append)


@pytest.mark.parametrize("slot", [0, S - 1, S, -1])
def test_appends_as_the_formula_apart(traced, slot):
    attended, x, weights = operands("small")
    append = append_to(weights, slot)
    assert fused_layer.can_append(weights, append.keys)
    found, expected = (call(attended, x, weights, append) for call in (appended, apart))
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (one, other)))
    was_written = [bool((a != b).any()) for a, b in zip(found[2:], append[3:], strict=True)]
    assert was_written == [0 <= slot < S] * 2


def test_the_last_layer_appends_nothing(traced):
    attended, x, weights = operands("small")
    append = append_to(weights, 5)
    found, _, *caches = appended(attended, x, weights, append, is_last=True)
    expected, *_ = run_once(attended, x, weights)
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (found, expected)))
    for cache, before in zip(caches, append[3:], strict=True):
        assert not (cache != before).any()


def test_gradients_reach_the_cache(traced):
    attended, x, weights = operands("small")
    append = append_to(weights, 3)

    def loss(call, keys, x):
        results = call(attended, x, weights, append._replace(keys=keys))
        return sum(jnp.sum(each.astype(jnp.float32) ** 2) for each in results)

    for one, other in zip(
        *(jax.grad(lambda *a, call=call: loss(call, *a), (0, 1))(append.keys, x)
          for call in (appended, apart)), strict=True,
    ):  # fmt: skip
        assert jnp.linalg.norm((one - other).astype(jnp.float32)) <= 2e-2 * jnp.linalg.norm(
            other.astype(jnp.float32)
        )


@pytest.mark.parametrize(("heads", "columns"), [(64, (512, 256)), (256, (512, 512))])
def test_other_heads_are_appended_apart(heads, columns):
    weights = structs("small", columns=columns)[2]
    cache = jax.ShapeDtypeStruct((1, S, 2, heads), jnp.bfloat16)
    assert not fused_layer.can_append(weights, cache)


@with_kernels
@pytest.mark.parametrize("name", ["llama-3.1-8b", "codellama-34b", "small"])
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float32"])
def test_lowers_for_cuda(pretend_gpu, name, cache_dtype):
    attended, x, weights = structs(name)
    append = jax.eval_shape(lambda: append_to(weights, 0, cache_dtype))
    assert kernels_in(appended, attended, x, weights, append) == (1, 1)


@with_kernels
def test_the_last_layer_shares_the_kernel_of_the_others(pretend_gpu):
    attended, x, weights = structs("small")
    append = jax.eval_shape(lambda: append_to(weights, 0))
    slots = jax.eval_shape(lambda: fused_layer.new_slots(attended, weights))

    def two(attended, x, weights, append, slots, eps=EPS):
        first = attended, x, weights, slots, 1, EPS
        x, _, keys, values, slots = fused_layer.run(*first, append)
        then = attended, x, weights, slots, 2, eps
        append = append._replace(keys=keys, values=values)
        return fused_layer.run(*then, append, is_last=True)

    assert kernels_in(two, attended, x, weights, append, slots) == (1, 1)
    others = functools.partial(two, eps=1e-3)
    assert kernels_in(others, attended, x, weights, append, slots) == (2, 2)
