"""The decoder on a GPU in bfloat16: every implementation of attention says the same next tokens."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.llama import Llama
from jaxdecode.pallas_kernels import IMPLEMENTATIONS

pytestmark = pytest.mark.gpu

LENGTH = 256
CONFIGS = {
    "smollm2-135m": LlamaConfig.preset("smollm2-135m"),
    "llama-3.1-8b, 4 layers": dataclasses.replace(
        LlamaConfig.preset("llama-3.1-8b"),
        num_layers=4, vocab_size=16_384, bos_id=None, eos_ids=(),
    ),
}  # fmt: skip
CALLS = {name: {"implementation": name} for name in IMPLEMENTATIONS if name != "xla"} | {
    "chosen": {},
    "flash_decode, 3 splits": {"implementation": "flash_decode", "num_splits": 3},
}
# Rounding each attention's result another way moves the top five by 0.08 at most and 0.018 on
# average; what attention has lost tokens moves by ten times as much.
MOST, MOST_ON_AVERAGE = 0.2, 0.04


def teacher_forced(config: LlamaConfig, implementation: str | None, num_splits: int | None = None):
    """Log-probabilities [LENGTH, 2, V] after each of the same random tokens, one step a token."""
    model = Llama(config, nnx.Rngs(0), dtype=jnp.bfloat16)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (LENGTH, 2, 1))
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, cache, tokens):
        def step(cache, token):
            logits, cache = nnx.merge(graph, state)(
                token, cache, implementation=implementation, num_splits=num_splits
            )
            return cache, jax.nn.log_softmax(logits[:, 0])

        return jax.lax.scan(step, cache, tokens)[1]

    return run(state, model.init_cache(2, LENGTH), jnp.asarray(tokens, jnp.int32))


@functools.cache
def expected(name: str):
    return teacher_forced(CONFIGS[name], "xla")


def compare(found, wanted) -> None:
    """The top five of `wanted` have the same log-probabilities, a clear first is the same."""
    top, ids = jax.lax.top_k(wanted, 5)
    difference = jnp.abs(jnp.take_along_axis(found, ids, axis=-1) - top)
    assert float(difference.max()) <= MOST, f"{difference.max()} > {MOST}"
    assert float(difference.mean()) <= MOST_ON_AVERAGE, f"{difference.mean()} > {MOST_ON_AVERAGE}"
    clear = np.asarray(top[..., 0] - top[..., 1] > 0.1)
    assert clear.mean() > 0.3
    np.testing.assert_array_equal(np.asarray(found.argmax(-1))[clear], np.asarray(ids)[clear][:, 0])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", CONFIGS)
def test_teacher_forced_log_probabilities_agree(name, call):
    compare(teacher_forced(CONFIGS[name], **{"implementation": None} | CALLS[call]), expected(name))


def test_the_comparison_notices_lost_tokens():
    config = dataclasses.replace(CONFIGS["smollm2-135m"], window=LENGTH - 16)
    with pytest.raises(AssertionError):
        compare(teacher_forced(config, "xla"), expected("smollm2-135m"))
