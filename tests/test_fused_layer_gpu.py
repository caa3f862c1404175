"""A layer from one attention to the next in one kernel, on a GPU: its results, its turns, and a
decoder that runs its layers so.

The letters are those of layer_config.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_fused_layer import EPS, distance, operands, plainly
from test_llama_gpu import compare

from jaxdecode.decode_loop import SplitModel, decode, start_state
from jaxdecode.models import fused_layers
from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.llama import Llama
from jaxdecode.models.random_model import random_model
from jaxdecode.pallas_kernels import fused_layer
from jaxdecode.sampling import SamplingArrays, SamplingParams

pytestmark = pytest.mark.gpu

LIMITS = {"bfloat16": 1e-2, "float16": 2e-3}
CASES = [
    ("llama-3.1-8b", "bfloat16"),
    ("llama-3.1-8b", "float16"),
    ("codellama-34b", "bfloat16"),
    ("llama-2-7b", "bfloat16"),
    ("odd", "bfloat16"),
    ("odd", "float16"),
    ("small", "bfloat16"),
    ("small", "float16"),
]


@jax.jit
def run(attended, x, weights, slots, turn):
    return fused_layer.run(attended, x, weights, slots, turn, EPS)


def start(weights):
    """The slots before the first turn."""
    assert fused_layer.why_not(weights) is None
    return fused_layer.new_slots(jnp.zeros(0), weights)


def reference(attended, x, weights):
    """x and the projections in float64, rounded to their dtype where `plain` stores a result."""
    kind = jnp.finfo(x.dtype)

    def rounded(x):
        # XLA may leave out a conversion there and back.
        return jax.lax.reduce_precision(x, kind.nexp, kind.nmant)

    def normed(x, scale):
        normal = x / jnp.sqrt(jnp.mean(jnp.square(x)) + EPS)
        return rounded(rounded(normal) * scale)

    def exact(*leaves):
        wide = [leaf.astype(jnp.float64) for leaf in leaves]
        attended, x, o, gate_up, down, mlp_scale, next_scale, *projections = wide
        x = rounded(x + rounded(attended @ o))
        gate, up = jnp.split(rounded(normed(x, mlp_scale) @ gate_up), 2)
        x = rounded(x + rounded(rounded(gate / (1 + jnp.exp(-gate)) * up) @ down))
        following = normed(x, next_scale)
        return x, rounded(jnp.concatenate([following @ weight for weight in projections]))

    with jax.enable_x64(True):
        found = jax.jit(exact)(*jax.tree.leaves((attended, x, weights)))
        return [np.asarray(each) for each in found]


def check(found, *inputs) -> None:
    """Each result by its distance from the reference, and from that of the plain formula."""
    limit = LIMITS[inputs[1].dtype.name]
    rivals, expected = jax.jit(plainly)(*inputs), reference(*inputs)
    for one, rival, wanted in zip(found, rivals, expected, strict=True):
        assert (one.shape, one.dtype) == (wanted.shape, inputs[1].dtype)
        assert np.isfinite(np.asarray(one).astype(np.float32)).all()
        assert distance(one, wanted) <= min(limit, 1.5 * distance(rival, wanted) + 1e-4)


def assert_same_bits(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(*(np.asarray(x).view(np.uint16) for x in (one, other)))


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_against_the_reference(name, dtype):
    inputs = operands(name, dtype)
    slots = start(inputs[2])
    assert "decoder_layer" in run.lower(*inputs, slots, 1).as_text()
    check(run(*inputs, slots, 1)[:2], *inputs)


def test_the_check_sees_a_missing_step_and_a_swap_of_scales():
    attended, x, weights = operands("odd")
    *found, _ = run(attended, x, weights, start(weights), 1)
    swapped = weights._replace(mlp_scale=weights.next_scale, next_scale=weights.mlp_scale)
    for wrong in (swapped, weights._replace(down=weights.down.at[-128:].set(0))):
        with pytest.raises(AssertionError):
            check(found, attended, x, wrong)


@pytest.mark.parametrize("turns", [(1, 2, 3, 4), (1, 2, 7, 2**31 - 1)], ids=str)
def test_calls_that_share_slots(turns):
    slots = start(operands("odd")[2])
    for seed, turn in enumerate(turns):
        inputs = operands("odd", seed=seed)
        *found, slots = run(*inputs, slots, turn)
        check(found, *inputs)


def test_what_earlier_turns_left_in_the_slots_does_no_harm():
    inputs = operands("odd")
    clean = start(inputs[2])
    *expected, _ = run(*inputs, clean, 5)
    *_, dirty = run(*operands("odd", seed=1), clean, 4)
    values = jax.random.bits(jax.random.key(0), clean.shape, jnp.uint32).astype(jnp.int32)
    # Every number in them is another turn's, be it a value or beside one.
    for slots in (dirty, jnp.full_like(clean, 4), jnp.full_like(clean, -1), values | 2**30):
        *found, _ = run(*inputs, slots, 5)
        assert_same_bits(found, expected)


def test_repeats_have_equal_bits():
    layers = [operands("llama-3.1-8b", seed=seed) for seed in range(4)]
    attended, x, weights = layers[0]

    @jax.jit
    def repeat(attended, x, slots, all_weights):
        def chain(slots, turn):
            row, rest = x, attended
            for i, weights in enumerate(all_weights):
                row, rest, slots = fused_layer.run(
                    rest[: attended.size], row, weights, slots, turn + i, EPS
                )
            return slots, (row, rest)

        turns = jnp.arange(250, dtype=jnp.int32) * len(all_weights) + 1
        return jax.lax.scan(chain, slots, turns)[1]

    found = repeat(attended, x, start(weights), [weights for *_, weights in layers])
    for each in map(np.asarray, found):
        assert np.isfinite(each.astype(np.float32)).all()
        bits = each.view(np.uint16)
        np.testing.assert_array_equal(bits, np.broadcast_to(bits[:1], bits.shape))


# A decoder
CONFIG = LlamaConfig(
    vocab_size=4096, embed_dim=2048, num_layers=4, num_q_heads=16, num_kv_heads=4, head_dim=128,
    ffw_dim=5632, dtype="bfloat16",
)  # fmt: skip
LENGTH = 64


@functools.cache
def decoder() -> Llama:
    return random_model(CONFIG)


def forced(tokens: np.ndarray):
    """Log-probabilities [LENGTH, V] after each of the tokens, and whether layers are fused."""
    model = decoder()
    graph, state = nnx.split(model)

    def run(state, cache, tokens):
        def step(cache, token):
            logits, cache = nnx.merge(graph, state)(token[None, None], cache)
            return cache, jax.nn.log_softmax(logits[0, 0])

        return jax.lax.scan(step, cache, tokens)[1]

    operands = state, model.init_cache(1, 128), jnp.asarray(tokens, jnp.int32)
    lowered = jax.jit(run).lower(*operands)
    return lowered.compile()(*operands), "decoder_layer" in lowered.as_text()


@functools.cache
def generated() -> np.ndarray:
    """What the loop of generation decodes greedily, with fused layers; the first token is 0."""
    model = decoder()
    split, state = (
        SplitModel(model),
        start_state(model, model.init_cache(1, 128), np.array([LENGTH], np.int32)),
    )
    sampling = SamplingArrays.create(SamplingParams(), 0, [0])
    _, made = decode(
        split.static, split.leaves, state, sampling, jnp.full(16, -1, jnp.int32),
        num_steps=LENGTH, num_logprobs=0, implementation=None,
    )  # fmt: skip
    assert np.asarray(made.finite).all()
    return np.asarray(made.tokens)[:, 0]


@functools.cache
def fused():
    found, is_fused = forced(generated())
    assert is_fused
    return found


def test_the_loop_of_generation_decodes_the_likeliest_tokens():
    tokens, likeliest = generated(), fused()
    top, ids = map(np.asarray, jax.lax.top_k(likeliest[:-1], 2))
    clear = top[:, 0] - top[:, 1] > 0.1
    assert clear.mean() > 0.3
    np.testing.assert_array_equal(tokens[1:][clear], ids[clear, 0])


def test_a_decoder_says_the_same_without_fused_layers(monkeypatch):
    found = fused()
    monkeypatch.setattr(fused_layers, "why_not", lambda *_: "not here")
    expected, is_fused = forced(generated())
    assert not is_fused
    compare(found, expected)


def test_steps_with_a_donated_cache():
    model = decoder()
    graph, state = nnx.split(model)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(state, cache, token):
        logits, cache = nnx.merge(graph, state)(token[None, None], cache)
        return jax.nn.log_softmax(logits[0, 0]), cache

    cache, rows = model.init_cache(1, 128), []
    for token in generated():
        given = cache.keys[0]
        row, cache = step(state, cache, jnp.int32(token))
        assert given.is_deleted()
        rows.append(row)
    compare(jnp.stack(rows), fused())
