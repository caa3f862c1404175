"""The decoder on every mesh of up to eight devices: the logits and tokens of one device."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_runs import count_compiles
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import ALL_SIZES, dealt, make_mesh, sharded_model, size_name
from naive_llama import CONFIG, jitted, random_model, random_params

from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.kv_cache import BLOCK, KVCache
from jaxdecode.models.llama import Llama
from jaxdecode.models.params import param_letters
from jaxdecode.models.sharding import fit_mesh

# Rows to fill eight devices of `data`: at borders of the blocks that are dealt, in a second round
# of dealing, and one that idles.
B, CAPACITY = 8, 16 * BLOCK
LENGTHS = np.array([9 * BLOCK + 5, 1, BLOCK - 1, 700, BLOCK, 3 * BLOCK + 7, CAPACITY - 2, 0])
IDLE = 3
TOKENS = np.random.default_rng(11).integers(0, CONFIG.vocab_size, (B, 600))

GROUPED_QUERY = dataclasses.replace(CONFIG, num_layers=1, num_q_heads=4, num_kv_heads=2, head_dim=8)
MULTI_QUERY = dataclasses.replace(GROUPED_QUERY, num_kv_heads=1)
MULTI_HEAD = dataclasses.replace(GROUPED_QUERY, num_q_heads=8, num_kv_heads=8)
TOLERANCE = 3e-5


def on_mesh(config: LlamaConfig, sizes: tuple[int, int, int], **options) -> Llama:
    return sharded_model(config, make_mesh(sizes, **options))


@functools.cache
def filled(config: LlamaConfig) -> KVCache:
    """Rows of LENGTHS random tokens, on one device; NaN past them."""
    rng = np.random.default_rng(5)
    shape = (B, CAPACITY, config.num_kv_heads, config.head_dim)
    dead = (np.arange(CAPACITY) >= LENGTHS[:, None])[..., None, None]
    keys, values = (
        tuple(
            jnp.asarray(np.where(dead, np.nan, rng.standard_normal(shape)), config.dtype)
            for _ in range(config.num_layers)
        )
        for _ in range(2)
    )
    return KVCache(keys, values, jnp.asarray(LENGTHS, jnp.int32))


@pytest.mark.parametrize("sizes", [(1, 2, 4), (2, 2, 2)], ids=size_name)
def test_gradients_are_those_of_one_device(sizes):
    """Of everything that a bare call exchanges."""
    tokens = jnp.asarray(TOKENS[:2, :5])

    def gradients(model):
        def loss(model):
            return jnp.sum(jax.nn.log_softmax(model(tokens, model.init_cache(2, BLOCK))[0])[..., 3])

        return nnx.jit(nnx.grad(loss))(model)

    expected, found = (
        jax.tree.map(np.asarray, nnx.to_pure_dict(gradients(model)))
        for model in (random_model(GROUPED_QUERY), on_mesh(GROUPED_QUERY, sizes))
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), found, expected)


def spread(cache: KVCache, model: Llama, block: int = BLOCK) -> KVCache:
    """The same cache, each device holding what is dealt to it."""
    parts, named = model.sharding.parts("S"), model.sharding.named

    def deal(layers):
        return tuple(jax.device_put(dealt(x, parts, block), named("BSKH")) for x in layers)

    lengths = jax.device_put(np.asarray(cache.lengths), named("B"))
    return KVCache(deal(cache.keys), deal(cache.values), lengths, parts)


def assert_same_cache(got: KVCache, expected: KVCache) -> None:
    np.testing.assert_array_equal(got.lengths, expected.lengths)
    for x, y in zip(got.keys + got.values, expected.keys + expected.values, strict=True):
        np.testing.assert_allclose(x, dealt(y, got.num_parts, BLOCK), atol=1e-5)


def decoded(model: Llama, cache: KVCache, steps: int = 3):
    """Greedy tokens [rows, steps] and their logits, of all rows but the idle one; the cache."""
    tokens, scores = [TOKENS[:, :1]], []
    active = (np.arange(B) != IDLE).astype(np.int32)
    for _ in range(steps):
        out, cache = jitted(model)(tokens[-1], cache, active)
        scores.append(out)
        tokens.append(out[:, 0].argmax(-1)[:, None])
    return np.hstack(tokens[1:])[active > 0], np.hstack(scores)[active > 0], cache


@functools.cache
def decoded_on_one_device(config: LlamaConfig):
    return decoded(random_model(config), filled(config))


def check_decoding(config: LlamaConfig, model: Llama) -> None:
    tokens, logits, cache = decoded_on_one_device(config)
    got_tokens, got_logits, got_cache = decoded(model, spread(filled(config), model))
    np.testing.assert_allclose(got_logits, logits, atol=TOLERANCE)
    np.testing.assert_array_equal(got_tokens, tokens)
    assert_same_cache(got_cache, cache)


# Every mesh
@pytest.mark.parametrize("sizes", ALL_SIZES, ids=size_name)
def test_decoding_on_any_mesh(sizes):
    """With the fewest KV heads that fit."""
    config = {1: MULTI_QUERY, 2: GROUPED_QUERY}.get(sizes[1], MULTI_HEAD)
    check_decoding(config, on_mesh(config, sizes))


@pytest.mark.parametrize(
    ("config", "sizes"), [(GROUPED_QUERY, (1, 1, 8)), (MULTI_HEAD, (2, 2, 2))],
    ids=["grouped-query", "multi-head"],
)  # fmt: skip
def test_decoding_with_more_kv_heads(config, sizes):
    check_decoding(config, on_mesh(config, sizes))


def test_the_comparison_sees_a_cache_dealt_otherwise():
    tokens, logits, _ = decoded_on_one_device(MULTI_QUERY)
    model = on_mesh(MULTI_QUERY, (1, 1, 4))
    got_tokens, got_logits, _ = decoded(model, spread(filled(MULTI_QUERY), model, BLOCK // 2))
    assert not np.allclose(got_logits, logits, atol=100 * TOLERANCE)
    assert (got_tokens != tokens).any()


VARIANTS = {
    "window over several parts": ({"window": 300}, (1, 2, 4)),
    "window within a part": ({"window": 20}, (1, 1, 8)),
    "tied, two layers": ({"tie_embeddings": True, "num_layers": 2}, (1, 2, 2)),
    "tied, vocabulary that does not divide": (
        {"tie_embeddings": True, "vocab_size": 66, "eos_ids": ()}, (2, 2, 2),
    ),
    "vocabulary that does not divide": ({"vocab_size": 67, "eos_ids": ()}, (1, 2, 2)),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "sizes"), VARIANTS.values(), ids=VARIANTS)
def test_decoding_of_variants(changes, sizes):
    config = dataclasses.replace(GROUPED_QUERY, **changes)
    model = on_mesh(config, sizes)
    assert bool(model.sharding.whole) == ("vocab_size" in changes)
    check_decoding(config, model)


def test_windows_matter():
    plain = decoded_on_one_device(GROUPED_QUERY)[1]
    for window in (300, 20):
        config = dataclasses.replace(GROUPED_QUERY, window=window)
        assert not np.allclose(decoded_on_one_device(config)[1], plain, atol=100 * TOLERANCE)


def test_bfloat16_is_as_near_to_float32_as_on_one_device():
    half = dataclasses.replace(GROUPED_QUERY, dtype="bfloat16")
    exact = decoded(random_model(GROUPED_QUERY), filled(half), steps=1)[1]
    one = decoded(random_model(half), filled(half), steps=1)[1]
    model = on_mesh(half, (1, 2, 4))
    cache = spread(filled(half), model)
    assert cache.keys[0].dtype == model.dtype == jnp.bfloat16
    many = decoded(model, cache, steps=1)[1]
    assert many.dtype == np.float32
    assert abs(many - exact).max() < 2 * abs(one - exact).max() < 0.1 * abs(exact).max()


# Several tokens at once
def both(config: LlamaConfig, sizes: tuple[int, int, int], cache: KVCache):
    """(models, caches): on one device, and on a mesh with the same cache spread."""
    many = on_mesh(config, sizes)
    return (random_model(config), many), [cache, spread(cache, many)]


def step_both(models, caches, tokens, counts, logits="all") -> None:
    """Runs one step on both and compares the logits of the real tokens; replaces the caches."""
    outs = []
    for i, model in enumerate(models):
        out, caches[i] = jitted(model)(tokens, caches[i], counts, logits)
        outs.append(out)
    for row, count in enumerate(counts):
        real = slice(count if logits == "all" else min(count, 1))
        np.testing.assert_allclose(outs[1][row, real], outs[0][row, real], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("config", "sizes", "logits"),
    [(MULTI_QUERY, (1, 1, 4), "all"), (GROUPED_QUERY, (2, 2, 2), "last")],
    ids=["multi-query", "grouped-query"],
)
def test_a_prompt_in_portions_then_token_by_token(config, sizes, logits):
    """Written straight into the parts; the longest rows go round them more than once."""
    models, caches = both(config, sizes, random_model(config).init_cache(B, CAPACITY))
    width, counts = 200, np.array([600, 333, 128, 127, 1, 0, 513, 512])
    for start in range(0, counts.max(), width):
        step_both(
            models, caches, TOKENS[:, start : start + width], np.clip(counts - start, 0, width),
            logits,
        )  # fmt: skip
    assert_same_cache(caches[1], caches[0])
    for t in range(2):
        step_both(models, caches, TOKENS[:, t : t + 1], np.ones(B, int))
    assert np.asarray(caches[1].lengths).tolist() == (counts + 2).tolist()
    assert_same_cache(caches[1], caches[0])


@pytest.mark.parametrize(
    ("config", "sizes"),
    [(GROUPED_QUERY, (1, 2, 4)), (MULTI_QUERY, (2, 1, 2))],
    ids=["grouped-query", "multi-query"],
)
def test_guesses_that_are_taken_back(config, sizes):
    """Four guessed tokens a step, of which some stay; one row runs past its capacity."""
    models, caches = both(config, sizes, filled(config))
    guessed, kept = np.array([4, 4, 3, 0, 4, 2, 4, 1]), np.array([2, 0, 3, 0, 4, 1, 4, 1])
    for step in range(2):
        before = np.asarray(caches[0].lengths)
        step_both(models, caches, TOKENS[:, 4 * step : 4 * step + 4], guessed)
        for i, cache in enumerate(caches):
            assert np.asarray(cache.overflowed).tolist() == [row == 6 for row in range(B)]
            caches[i] = cache.truncate(before + kept)
        assert_same_cache(caches[1], caches[0])
    expected = np.minimum(LENGTHS + 2 * kept, CAPACITY)
    assert np.asarray(caches[1].lengths).tolist() == expected.tolist()


# Meshes of every make
@pytest.mark.parametrize(
    ("sizes", "axes", "options"),
    [
        ((2, 2, 2), ("data", "tensor", "seq"), dict(backwards=True)),
        ((2, 2, 2), ("data", "tensor", "seq"), dict(kind=AxisType.Explicit)),
        ((4, 2), ("seq", "tensor"), {}),
    ],
    ids=["devices backwards", "explicit axes", "two axes"],
)
def test_any_mesh_of_jax(sizes, axes, options):
    model = sharded_model(GROUPED_QUERY, make_mesh(sizes, axes, **options))
    check_decoding(GROUPED_QUERY, model)


def test_tokens_may_lie_anywhere_on_the_mesh():
    mesh = make_mesh((2, 2, 2), kind=AxisType.Explicit)
    model = sharded_model(GROUPED_QUERY, mesh)
    cache = spread(filled(GROUPED_QUERY), model)
    expected, _ = jitted(model)(TOKENS[:, :1], cache)
    tokens = jax.device_put(TOKENS[:, :1].astype(np.int32), NamedSharding(mesh, P()))
    np.testing.assert_array_equal(jitted(model)(tokens, cache)[0], expected)


def test_weights_that_lie_elsewhere_are_moved():
    sharding = fit_mesh(GROUPED_QUERY, make_mesh((1, 2, 2)))
    params = {name: jnp.asarray(w) for name, w in random_params(GROUPED_QUERY).items()}
    model = Llama.from_params(GROUPED_QUERY, params, sharding)
    _, logits, _ = decoded(model, spread(filled(GROUPED_QUERY), model), steps=1)
    _, expected, _ = decoded_on_one_device(GROUPED_QUERY)
    np.testing.assert_allclose(logits, expected[:, :1], atol=TOLERANCE)


def test_each_device_holds_its_part_of_weights_and_cache_only():
    model = on_mesh(GROUPED_QUERY, (2, 2, 2))
    _, cache = jitted(model)(TOKENS[:, :1], model.init_cache(B, CAPACITY))
    arrays = [(x, param_letters(model.config)[name]) for name, x in model.params().items()]
    arrays += [(x, "BSKH") for x in cache.keys + cache.values] + [(cache.lengths, "B")]
    for x, letters in arrays:
        local = model.sharding.local_shape(letters, x.shape)
        assert {part.data.shape for part in x.addressable_shards} == {local}
        assert len(x.addressable_shards) == 8
    assert cache.keys[0].addressable_data(0).size * 8 == cache.keys[0].size


def test_outside_of_jit_a_step_compiles_once():
    model = on_mesh(GROUPED_QUERY, (1, 2, 4))
    cache = spread(filled(GROUPED_QUERY), model)
    tokens, results = jnp.asarray(TOKENS[:, :1], jnp.int32), []

    def step():
        results.append(model(tokens, cache)[0])

    assert count_compiles(step) >= 1
    assert count_compiles(step) == 0
    expected, _ = jitted(model)(TOKENS[:, :1], cache)
    np.testing.assert_allclose(results[0], expected, atol=TOLERANCE)


# What is refused
def test_a_cache_in_other_parts_is_refused():
    one, many = random_model(GROUPED_QUERY), on_mesh(GROUPED_QUERY, (1, 2, 4))
    tokens = jnp.asarray(TOKENS[:, :1], jnp.int32)
    for model, other, parts, wanted in ((one, many, 4, 1), (many, one, 1, 4)):
        message = (
            f"the cache is cut into {parts} parts but the model's mesh wants {wanted}; "
            "make it with model.init_cache"
        )
        with pytest.raises(ValueError, match=message):
            model(tokens, other.init_cache(B, CAPACITY))


def test_a_context_of_explicit_axes_is_refused():
    mesh = make_mesh((1, 2, 4), kind=AxisType.Explicit)
    model = sharded_model(GROUPED_QUERY, mesh)
    cache, tokens = model.init_cache(B, CAPACITY), jnp.asarray(TOKENS[:, :1], jnp.int32)
    message = r"cannot run inside jax\.set_mesh of a mesh with Explicit axes; run it outside, or"
    with jax.set_mesh(mesh):
        for call in (lambda: model(tokens, cache), lambda: model.init_cache(B, 3 * CAPACITY)):
            with pytest.raises(ValueError, match=message):
                call()
        with jax.set_mesh(model.sharding.mesh):
            jax.eval_shape(model, tokens, model.init_cache(B, 3 * CAPACITY))
