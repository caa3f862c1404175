"""Rotating and appending in one kernel, on a GPU: every shape, and the caches in place.

conftest.py leaves this file out where jax has no GPU kernels (before 0.11.2).
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_rope_append import CONFIG, S, assert_same, assert_same_bits, operands

from jaxdecode.models.llama import Llama
from jaxdecode.pallas_kernels.rope_append import plainly, rotate_and_append, why_not

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float16", "float32")], ids=str)
@pytest.mark.parametrize("H", [128, 256])
@pytest.mark.parametrize("heads", [(64, 8), (9, 3), (8, 1), (6, 6)], ids=str)
@pytest.mark.parametrize("tokens", [(1, 1), (4, 4), (64, 1), (1, 64)], ids=str)
def test_gpu_rounds_as_the_plain_formula(tokens, heads, H, dtypes):
    slots = np.random.default_rng(0).permuted(np.tile(np.arange(-9, S + 9), (tokens[0], 1)), axis=1)
    arguments = operands(*tokens, *heads, H, *dtypes, slots)
    assert why_not(arguments[0], arguments[5]) is None
    found, expected = (jax.jit(each)(*arguments) for each in (rotate_and_append, plainly))
    assert_same(found, expected, dtypes[0])
    assert_same_bits(found[2:], expected[2:])


def copies(donated: tuple[int, ...]) -> list[str]:
    """Copies of a layer's cache in eight decode steps."""
    model = Llama(CONFIG, nnx.Rngs(0))
    graph, state = nnx.split(model)

    def steps(state, token, cache):
        def step(carry, _):
            token, cache = carry
            logits, cache = nnx.merge(graph, state)(token, cache, logits="last")
            return (jnp.argmax(logits, axis=-1).astype(jnp.int32), cache), token

        return jax.lax.scan(step, (token, cache), length=8)

    operands = state, jnp.zeros((1, 1), jnp.int32), model.init_cache(1, 4096)
    hlo = jax.jit(steps, donate_argnums=donated).lower(*operands).compile().as_text()
    layer = ",".join(map(str, operands[2].keys[0].shape))
    assert f"bf16[{layer}]" in hlo
    return re.findall(rf"bf16\[{layer}\]\S* copy\(", hlo)


def test_gpu_a_donated_cache_is_never_copied():
    assert copies(donated=(2,)) == []


def test_gpu_a_cache_that_is_kept_is_copied_once_a_layer():
    assert len(copies(donated=())) == 2 * CONFIG.num_layers
