"""The decoder against float64 NumPy, and against itself in other portions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from naive_llama import CONFIG, jitted, naive_logits, random_model, random_params

from jaxdecode.models.config import LlamaConfig, RopeScaling
from jaxdecode.models.kv_cache import KVCache
from jaxdecode.models.llama import Llama
from jaxdecode.models.params import param_shapes

B, T, CAPACITY = 3, 24, 128
TOKENS = np.random.default_rng(7).integers(0, CONFIG.vocab_size, (B, T))
COUNTS = np.array([24, 9, 1])
# Trained lengths so short that scaling matters within T tokens.
VARIANTS = {
    "grouped-query": {"num_layers": 2},
    "multi-head": {"num_kv_heads": 4},
    "multi-query, tied": {"num_kv_heads": 1, "tie_embeddings": True},
    "wide heads": {"head_dim": 12},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "theta": {"rope_theta": 5e5, "norm_eps": 1e-2},
    "linear": {"rope_scaling": RopeScaling(kind="linear", factor=4.0)},
    "llama3": {
        "rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_max_positions=16),
    },
    "yarn": {"rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_max_positions=64)},
}


def config_of(name: str) -> LlamaConfig:
    return dataclasses.replace(CONFIG, **{"num_layers": 1} | VARIANTS[name])


def prefilled(model: Llama, tokens=TOKENS, counts=COUNTS):
    """(logits [B, T, V], cache) of ragged rows."""
    return jitted(model)(tokens, model.init_cache(len(tokens), CAPACITY), counts)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_naive_decoder(name):
    config = config_of(name)
    logits, cache = prefilled(random_model(config))
    assert logits.shape == (B, T, config.vocab_size)
    assert logits.dtype == jnp.float32
    assert np.asarray(cache.lengths).tolist() == COUNTS.tolist()
    for row, (tokens, count) in enumerate(zip(TOKENS, COUNTS, strict=True)):
        expected = naive_logits(random_params(config), config, tokens[:count])
        np.testing.assert_allclose(logits[row, :count], expected, atol=1e-4)


def test_the_variants_matter():
    """Each of them moves the logits by more than the tolerance above."""
    plain = dataclasses.replace(CONFIG, num_layers=1)
    base = naive_logits(random_params(plain), plain, TOKENS[0])
    for name in ("window", "window of one", "theta", "linear", "llama3", "yarn"):
        moved = naive_logits(random_params(plain), config_of(name), TOKENS[0]) - base
        assert np.abs(moved).max() > 1e-2, name


@pytest.mark.parametrize("name", ["grouped-query", "window"])
def test_prefill_equals_token_by_token(name):
    model = random_model(config_of(name))
    at_once, filled = prefilled(model)
    run, cache = jitted(model), model.init_cache(B, CAPACITY)
    for t in range(T):
        logits, cache = run(TOKENS[:, t : t + 1], cache, (t < COUNTS).astype(np.int32))
        active = t < COUNTS
        np.testing.assert_allclose(logits[active, 0], at_once[active, t], atol=2e-5)
    assert np.asarray(cache.lengths).tolist() == COUNTS.tolist()
    for stepwise, whole in zip(cache.keys + cache.values, filled.keys + filled.values, strict=True):
        np.testing.assert_allclose(stepwise, whole, atol=1e-5)


def test_a_prompt_in_two_portions_equals_one():
    model, run = random_model(), jitted(random_model())
    whole, _ = prefilled(model)
    first = np.minimum(COUNTS, 7)
    # The same width for both, so that nothing new is compiled.
    _, cache = run(TOKENS, model.init_cache(B, CAPACITY), first)
    rest = np.stack([np.roll(row, -n) for row, n in zip(TOKENS, first, strict=True)])
    logits, cache = run(rest, cache, COUNTS - first)
    assert np.asarray(cache.lengths).tolist() == COUNTS.tolist()
    for row in range(2):
        n, count = first[row], COUNTS[row]
        np.testing.assert_allclose(logits[row, : count - n], whole[row, n:count], atol=2e-5)


def test_a_ragged_batch_equals_its_rows_alone():
    model = random_model()
    together, _ = prefilled(model)
    for row in range(B):
        alone, _ = prefilled(model, TOKENS[row : row + 1], COUNTS[row : row + 1])
        count = COUNTS[row]
        np.testing.assert_allclose(alone[0, :count], together[row, :count], atol=2e-5)


def test_padding_changes_nothing():
    model = random_model()
    logits, cache = prefilled(model)
    noise = np.random.default_rng(9).integers(0, CONFIG.vocab_size, TOKENS.shape)
    padded = np.where(np.arange(T) < COUNTS[:, None], TOKENS, noise)
    assert (padded != TOKENS).any()
    other_logits, other_cache = prefilled(model, padded)
    assert bits(cache) == bits(other_cache)
    for row, count in enumerate(COUNTS):
        np.testing.assert_array_equal(logits[row, :count], other_logits[row, :count])


def test_last_logits_are_the_last_real_rows_of_all():
    model = random_model()
    everything, cache = prefilled(model)
    last, same_cache = jitted(model)(TOKENS, model.init_cache(B, CAPACITY), COUNTS, "last")
    assert last.shape == (B, 1, CONFIG.vocab_size)
    assert last.dtype == jnp.float32
    expected = everything[np.arange(B), COUNTS - 1]
    np.testing.assert_allclose(last[:, 0], expected, atol=1e-5)
    assert np.abs(expected - everything[:, -1])[1:].max() > 0.1
    np.testing.assert_array_equal(cache.lengths, same_cache.lengths)


@pytest.mark.parametrize("width", [1, T])
@pytest.mark.parametrize("logits", ["all", "last"])
def test_idle_rows_stay_as_they_are_to_the_bit(width, logits):
    model = random_model()
    _, cache = prefilled(model)
    idle = np.array([1, 0, 0]) * width
    out, after = jitted(model)(TOKENS[:, :width], cache, idle, logits)
    assert np.isfinite(out).all()
    assert np.asarray(after.lengths).tolist() == [COUNTS[0] + width, COUNTS[1], COUNTS[2]]
    for old, new in zip(cache.keys + cache.values, after.keys + after.values, strict=True):
        np.testing.assert_array_equal(old[1:], new[1:])
        assert not np.array_equal(old[0], new[0])


def test_a_call_in_which_all_rows_idle_changes_nothing():
    model = random_model()
    _, cache = prefilled(model)
    _, after = jitted(model)(TOKENS[:, :1], cache, np.zeros(B, np.int32))
    assert bits(cache) == bits(after)


def test_num_tokens_defaults_to_all():
    model = random_model(config_of("wide heads"))
    graph, state = nnx.split(model)
    call = jax.jit(lambda state, cache, n: nnx.merge(graph, state)(TOKENS, cache, num_tokens=n))
    default = call(state, model.init_cache(B, CAPACITY), None)
    given = call(state, model.init_cache(B, CAPACITY), jnp.full(B, T, jnp.int32))
    assert np.asarray(default[1].lengths).tolist() == [T] * B
    np.testing.assert_allclose(default[0], given[0], atol=1e-5)


def test_past_capacity_lengths_tell_and_what_was_there_stays():
    model = random_model()
    _, cache = prefilled(model)
    # Row 0 ends at capacity exactly, row 1 goes one past it.
    full = dataclasses.replace(cache, lengths=jnp.array([CAPACITY - T, CAPACITY - T + 1, 5]))
    _, after = jitted(model)(TOKENS, full, np.full(B, T))
    assert np.asarray(after.overflowed).tolist() == [False, True, False]
    for old, new in zip(full.keys + full.values, after.keys + after.values, strict=True):
        np.testing.assert_array_equal(old[0, : CAPACITY - T], new[0, : CAPACITY - T])
        np.testing.assert_array_equal(old[1, : CAPACITY - T + 1], new[1, : CAPACITY - T + 1])


def test_nan_in_one_sequence_stays_there():
    good = random_params(CONFIG)
    poison = 5
    tokens = np.where(TOKENS == poison, 6, TOKENS)
    tokens[1, 3] = poison
    embed = good["embed"].copy()
    embed[poison] = np.nan
    bad = Llama.from_params(
        CONFIG, {k: jnp.asarray(v) for k, v in (good | {"embed": embed}).items()}
    )
    logits, _ = prefilled(bad, tokens)
    healthy, _ = prefilled(random_model(), tokens)
    assert np.isnan(logits[1, 3:9]).all()
    assert np.isfinite(logits[1, :3]).all()
    # Some CPUs compute a vector that holds a NaN, another sequence's, in another way.
    np.testing.assert_allclose(logits[[0, 2]], healthy[[0, 2]], rtol=0, atol=5e-5)


def test_bfloat16_is_near_float32_and_scores_in_float32():
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    model = random_model(half)
    assert model.dtype == jnp.bfloat16
    logits, cache = prefilled(model)
    assert logits.dtype == jnp.float32
    assert {x.dtype for x in cache.keys + cache.values} == {jnp.dtype("bfloat16")}
    rounded = {
        k: np.asarray(jnp.asarray(v, "bfloat16"), np.float32)
        for k, v in random_params(half).items()
    }
    expected = naive_logits(rounded, half, TOKENS[0])
    assert np.abs(logits[0] - expected).max() < 0.05 * np.abs(expected).max()
    # Scores are not rounded to bfloat16 on their way.
    assert (logits != logits.astype("bfloat16").astype(np.float32)).any()


def test_the_cache_may_have_a_type_of_its_own():
    model = random_model()
    cache = model.init_cache(B, CAPACITY, dtype="bfloat16")
    logits, after = jitted(model)(TOKENS, cache, COUNTS)
    assert after.keys[0].dtype == jnp.bfloat16
    expected, _ = prefilled(model)
    assert np.abs(logits - expected)[0].max() < 0.1 * np.abs(expected).max()
    assert model.init_cache(1, 1).keys[0].dtype == jnp.float32


@pytest.mark.parametrize("tied", [False, True])
def test_param_shapes_are_those_of_the_module(tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    model = nnx.eval_shape(lambda: Llama(config))
    state = {
        ".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model))
    }
    shapes = param_shapes(config)
    assert state == shapes
    assert ("head" in shapes) is not tied
    assert next(iter(shapes)) == "embed"
    assert sum(int(np.prod(s)) for s in shapes.values()) == config.num_parameters


def test_random_models_follow_their_seed_and_dtype():
    config = dataclasses.replace(CONFIG, num_layers=1)
    make = jax.jit(lambda key: Llama(config, rngs=nnx.Rngs(key)).params())
    one, same, other = (make(jax.random.key(seed)) for seed in (1, 1, 2))
    assert bits(one) == bits(same)
    assert bits(one) != bits(other)
    assert {x.dtype for x in one.values()} == {jnp.dtype("float32")}
    half = jax.eval_shape(lambda: Llama(config, dtype="bfloat16").params())
    assert {x.dtype for x in half.values()} == {jnp.dtype("bfloat16")}
    # Each weight keeps the size of what it is applied to.
    assert 0.5 < np.std(one["layers.0.mlp.down"]) * config.ffw_dim**0.5 < 1.5
    assert not np.array_equal(one["layers.0.attn.kv"][:, 0], one["layers.0.attn.kv"][:, 1])


def test_params_and_from_params_are_inverse():
    config = config_of("multi-query, tied")
    params = {k: jnp.asarray(v) for k, v in random_params(config).items()}
    model = Llama.from_params(config, params)
    assert list(model.params()) == list(param_shapes(config))
    for name, leaf in model.params().items():
        assert leaf is params[name]
    assert model.config == config


def test_from_params_makes_no_random_weights(monkeypatch):
    drawn = []
    normal = jax.random.normal

    def watched(key, shape, dtype):
        draw = normal(key, shape, dtype)
        drawn.append(isinstance(draw, jax.core.Tracer))
        return draw

    monkeypatch.setattr(jax.random, "normal", watched)
    params = {k: jnp.asarray(v) for k, v in random_params(CONFIG).items()}
    Llama.from_params(CONFIG, params)
    assert all(drawn)  # abstract ones only
    jax.random.normal(jax.random.key(0), (2,), "float32")
    assert not all(drawn)  # and a real one would show


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": None}, r"parameter head: found None, expected \(32, 64\)"),
        ({"layers.1.attn.q": None}, r"layers\.1\.attn\.q: found None, expected \(32, 4, 8\)"),
        ({"layers.2.attn.q": (32, 4, 8)}, r"parameter layers\.2\.attn\.q: found .*, expected None"),
        ({"extra": (1,)}, r"parameter extra: found \(1,\), expected None"),
        ({"embed": (65, 32)}, r"parameter embed: found \(65, 32\), expected \(64, 32\)"),
        ({"head": (64, 32)}, r"parameter head: found \(64, 32\), expected \(32, 64\)"),
        ({"final_norm.scale": ()}, r"parameter final_norm\.scale: found \(\), expected \(32,\)"),
    ],
    ids=str,
)  # fmt: skip
def test_from_params_names_what_does_not_fit(change, message):
    params = {k: jnp.asarray(v) for k, v in random_params(CONFIG).items()}
    for name, shape in change.items():
        if shape is None:
            del params[name]
        else:
            params[name] = jnp.zeros(shape)
    with pytest.raises(ValueError, match=message):
        Llama.from_params(CONFIG, params)


def test_a_head_beside_tied_embeddings_is_refused():
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    with pytest.raises(ValueError, match=r"parameter head: found .* expected None"):
        Llama.from_params(tied, random_params(CONFIG))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": "first"}, ValueError, "logits must be 'all' or 'last', found 'first'"),
        ({"tokens": TOKENS[:2]}, ValueError, "tokens has 2 rows but the cache 3"),
        ({"implementation": "fast"}, ValueError, "implementation must be None or one of"),
        ({"num_splits": 0}, ValueError, "num_splits must be an integer >= 1"),
        ({"cache_dtype": "int8"}, TypeError, "must be one of .*float32.*found q int8"),
        ({"tokens": TOKENS[0]}, TypeError, r"tokens must be an integer array .*found \(24,\)"),
        ({"num_tokens": 3}, ValueError, r"num_tokens must be an array of shape \(3,\), found 3"),
        ({"num_tokens": np.array([3])}, ValueError, r"of shape \(3,\), found \(1,\)"),
        ({"num_tokens": np.ones(3)}, TypeError, "num_tokens must be integers, found dtype float64"),
        ({"num_tokens": np.ones(3, bool)}, TypeError, "num_tokens must be .*found dtype bool"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(arguments, error, message):
    model, arguments = random_model(), dict(arguments)
    tokens = jnp.asarray(arguments.pop("tokens", TOKENS), jnp.int32)
    cache = model.init_cache(B, CAPACITY, arguments.pop("cache_dtype", None))
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda tokens, cache: model(tokens, cache, **arguments), tokens, cache)


def test_a_cache_of_another_model_is_refused():
    model, deeper = random_model(), dataclasses.replace(CONFIG, num_layers=CONFIG.num_layers + 1)
    cache = KVCache.create(deeper, B, CAPACITY, "float32")
    with pytest.raises(ValueError, match="the cache has 3 layers but the model 2"):
        model(jnp.asarray(TOKENS, jnp.int32), cache)


def test_counts_outside_the_call_are_clipped():
    model = random_model()
    outside = prefilled(model, counts=np.array([T + 5, 9, -4]))
    inside = prefilled(model, counts=np.array([T, 9, 0]))
    assert bits(outside) == bits(inside)
    assert outside[1].lengths.tolist() == [T, 9, 0]


def test_known_lengths_past_capacity_are_an_error_outside_jit():
    model = random_model(config_of("wide heads"))
    cache = dataclasses.replace(model.init_cache(1, 128), lengths=jnp.array([128], jnp.int32))
    with pytest.raises(ValueError, match=r"kv_len must lie in \[0, 128\].*found \[129\]"):
        model(jnp.zeros((1, 1), jnp.int32), cache)


def test_init_cache_refuses_no_room():
    with pytest.raises(ValueError, match="batch_size and capacity must be at least 1"):
        random_model().init_cache(1, 0)
    cache = random_model().init_cache(2, 200)
    assert isinstance(cache, KVCache)
    assert (cache.batch_size, cache.capacity) == (2, 256)
