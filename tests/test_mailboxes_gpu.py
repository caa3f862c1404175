"""A decoder whose steps exchange through the peers' memory says the same tokens, on several GPUs.

With one GPU there is nothing to exchange: conftest.py then leaves this file out.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from meshes import copies

from jaxdecode.decode_loop import SplitModel, decode, prefill, start_state
from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.llama import Llama
from jaxdecode.models.params import param_letters
from jaxdecode.models.sharding import Sharding, fit_mesh
from jaxdecode.sampling import SamplingArrays, SamplingParams

pytestmark = pytest.mark.gpu

COUNTS = [n for n in range(2, jax.device_count() + 1) if jax.device_count() % n == 0]
CONFIG = LlamaConfig(
    vocab_size=512, embed_dim=1024, ffw_dim=2048, num_layers=3, num_q_heads=16, num_kv_heads=8,
    head_dim=64, max_positions=512, dtype="float32",
)  # fmt: skip


def sharding_of(count: int, axis: str, collectives: str) -> Sharding:
    mesh = Mesh(np.array(jax.devices()[:count]), (axis,))
    return dataclasses.replace(fit_mesh(CONFIG, mesh), collectives=collectives)


def model_on(sharding: Sharding) -> Llama:
    params, letters = Llama(CONFIG, nnx.Rngs(0)).params(), param_letters(CONFIG)
    if sharding.mesh is not None:
        params = {k: jax.device_put(x, sharding.named(letters[k])) for k, x in params.items()}
    return Llama.from_params(CONFIG, params, sharding)


def check_exchanges(hlo: str, count: int) -> None:
    assert "all-reduce" not in hlo
    assert "all-to-all" not in hlo
    # Of 2 rows of 1024 float32. A copied mailbox is not where the peers write.
    slots = (2, count, 8, 2 * 2 * 1024 // 8)
    assert f"s32[{','.join(map(str, slots))}]" in hlo
    assert copies(hlo, slots) == []


def decoding(model: Llama, steps: int):
    """(jitted, operands) of a loop of bare calls that decodes greedily: tokens [2, steps] and the
    cache."""
    graph, state = nnx.split(model)
    start = model.sharding.constrain(jnp.array([[3], [77]], jnp.int32), "BT")

    @functools.partial(jax.jit, donate_argnums=2)
    def run(state, token, cache):
        def step(carry, _):
            logits, cache = nnx.merge(graph, state)(*carry, implementation="xla")
            token = logits[:, 0].argmax(-1).astype(jnp.int32)[:, None]
            return (token, cache), token[:, 0]

        (_, cache), tokens = lax.scan(step, (token, cache), None, length=steps)
        return tokens.T, cache

    return run, (state, start, model.init_cache(2, 128))


@pytest.mark.parametrize("axis", ["tensor", "seq"])
@pytest.mark.parametrize("count", COUNTS)
def test_a_decoder_says_the_tokens_of_one_device_and_copies_no_mailbox(count, axis):
    with jax.default_matmul_precision("highest"):
        alone, operands = decoding(model_on(Sharding()), 64)
        expected = np.asarray(alone(*operands)[0])
        run, operands = decoding(model_on(sharding_of(count, axis, "peer")), 64)
        hlo = run.lower(*operands).compile().as_text()
        found = np.asarray(run(*operands)[0])
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(expected)) > 8
    check_exchanges(hlo, count)


# One token is no loop.
DISPATCHES = (16, 16, 1, 1, 16, 1, 16)


class Generation:
    """Greedy, of two sequences."""

    def __init__(self, model: Llama):
        self.split = SplitModel(model)
        self.state = start_state(model, model.init_cache(2, 128), np.full(2, 99, np.int32))

    def prefill(self, tokens: list[list[int]], num_tokens: list[int]) -> None:
        self.state = prefill(
            self.split.static, self.split.leaves, self.state, np.array(tokens, np.int32),
            np.array(num_tokens, np.int32), implementation="xla",
        )  # fmt: skip

    def decode(self, num_steps: int, call=decode):
        """One dispatch, or what else `call` makes of its arguments."""
        return call(
            self.split.static, self.split.leaves, self.state,
            SamplingArrays.create(SamplingParams(), 0, [0, 0]), np.full(16, -1, np.int32),
            num_steps=num_steps, num_logprobs=0, implementation="xla",
        )  # fmt: skip


def generated(model: Llama) -> np.ndarray:
    """[steps, 2], from dispatches of which none is waited for: each has mailboxes in memory that
    those before it may still be using."""
    generation, tokens = Generation(model), []
    generation.prefill([[3, 9, 27, 81], [77, 5, 6, 7]], [4, 4])
    generation.prefill([[2, 4], [8, 0]], [2, 1])
    for num_steps in DISPATCHES:
        generation.state, made = generation.decode(num_steps)
        tokens.append(made.tokens)
    return np.concatenate(jax.device_get(tokens))


@pytest.mark.parametrize("axis", ["tensor", "seq"])
@pytest.mark.parametrize("count", COUNTS)
def test_dispatches_say_the_tokens_of_nccl(count, axis):
    with jax.default_matmul_precision("highest"):
        expected = generated(model_on(sharding_of(count, axis, "xla")))
        model = model_on(sharding_of(count, axis, "peer"))
        found = [generated(model) for _ in range(3)]
        for num_steps in (1, 16):
            hlo = Generation(model).decode(num_steps, decode.lower).compile().as_text()
            check_exchanges(hlo, count)
    assert expected.shape == (sum(DISPATCHES), 2)
    assert len(np.unique(expected)) > 8
    for tokens in found:
        np.testing.assert_array_equal(tokens, expected)
