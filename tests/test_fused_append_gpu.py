"""A layer in one kernel that also rotates and appends for the next one, on a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_fused_append import S, apart, append_to, appended
from test_fused_layer import EPS, distance, operands
from test_fused_layer_gpu import assert_same_bits

from jaxdecode.pallas_kernels import fused_layer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("slot", [0, 17, S - 1, S, -1])
@pytest.mark.parametrize(
    ("name", "dtype", "cache_dtype"),
    [
        ("llama-3.1-8b", "bfloat16", "bfloat16"),
        ("codellama-34b", "bfloat16", "bfloat16"),
        ("small", "float16", "float32"),
    ],
)
def test_appends_as_the_formula_apart(name, dtype, cache_dtype, slot):
    attended, x, weights = operands(name, dtype)
    append = append_to(weights, slot, cache_dtype)
    found, expected = (jax.jit(call)(attended, x, weights, append) for call in (appended, apart))
    # Both project with the same kernel, so only the rotation's own rounding may differ.
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert distance(one, other) <= 2e-3
    for one, before in zip(found[2:], append[3:], strict=True):
        changed = np.flatnonzero(np.asarray(one != before).any(axis=(0, 2, 3)))
        assert changed.tolist() == ([slot] if 0 <= slot < S else [])


def test_the_last_layer_appends_nothing():
    """Whatever the others left in its slots, and they in its."""
    attended, x, weights = operands("llama-3.1-8b")
    append = append_to(weights, 5)

    @jax.jit
    def three(attended, x, weights, append):
        slots, found = fused_layer.new_slots(attended, weights), []
        for turn, is_last in enumerate((False, True, False), 1):
            operands = attended, x, weights, slots, turn, EPS
            *results, slots = fused_layer.run(*operands, append, is_last=is_last)
            found.append(results)
        return found

    first, last, again = three(attended, x, weights, append)
    assert_same_bits([last[0], *last[2:]], [first[0], *append[3:]])
    assert_same_bits(again, first)
    assert (first[2] != append.keys).any()


def test_repeats_have_equal_bits():
    attended, x, weights = operands("llama-3.1-8b")
    append = append_to(weights, 5)
    run = jax.jit(appended)
    first = [np.asarray(each.view(jnp.uint16)) for each in run(attended, x, weights, append)]
    for _ in range(50):
        for one, other in zip(first, run(attended, x, weights, append), strict=True):
            np.testing.assert_array_equal(one, np.asarray(other.view(jnp.uint16)))
