"""Sampling against a naive NumPy one in Hugging Face's order, and its keys."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given

from jaxdecode.sampling import (
    SamplingArrays,
    SamplingParams,
    filter_logits,
    penalize,
    sample,
)

V = 24
NOWHERE = np.zeros((1, V), bool)
_filter, _sample, _penalize = jax.jit(filter_logits), jax.jit(sample), jax.jit(penalize)


def arrays(seed: int = 0, indices=(0,), **params) -> SamplingArrays:
    return SamplingArrays.create(SamplingParams(**params), seed, list(indices))


def kept(logits, **params) -> set[int]:
    """The tokens that the filters leave of one row."""
    sampling = arrays(**{"temperature": 1.0} | params)
    filtered = np.asarray(_filter(jnp.asarray(logits, jnp.float32)[None], sampling))[0]
    left = np.isfinite(filtered)
    np.testing.assert_array_equal(filtered[left], np.asarray(logits, np.float32)[left])
    return set(np.flatnonzero(left).tolist())


def draws(logits, positions, seen=NOWHERE, **params) -> list[int]:
    """Tokens drawn from one row of logits, at several positions."""
    sampling, logits = arrays(**params), jnp.asarray(logits, jnp.float32)[None]
    seen = jnp.asarray(seen)
    return [int(_sample(logits, seen, jnp.array([p], jnp.int32), sampling)[0]) for p in positions]


def naive_filter(logits, top_k=0, top_p=1.0, min_p=0.0) -> set[int]:
    """Top-k, then top-p of what is left, then min-p of that. Ties with the last one stay."""
    left = np.asarray(logits, np.float64)
    if top_k:
        kth = np.sort(left)[::-1][min(top_k, len(left)) - 1]
        left = np.where(left >= kth, left, -np.inf)
    if top_p < 1:
        total, last = 0.0, np.inf
        for token in np.argsort(-left, kind="stable"):
            if total >= top_p:
                break
            total += probabilities(left)[token]
            last = left[token]
        left = np.where(left >= min(last, left.max()), left, -np.inf)
    p = probabilities(left)
    return set(np.flatnonzero((p > 0) & (p >= min_p * p.max())).tolist())


def probabilities(logits):
    p = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return p / p.sum()


smooth = hnp.arrays(np.float32, V, elements=st.floats(-30, 30, width=32))
tied = hnp.arrays(np.int8, V, elements=st.integers(-3, 3)).map(lambda x: x.astype(np.float32) / 2)
filters = st.fixed_dictionaries(
    {},
    optional={
        "top_k": st.integers(0, V + 5),
        "top_p": st.floats(1e-6, 1.0),
        "min_p": st.floats(0, 0.999),
    },
)


# A sum of float32 probabilities may fall to either side of a threshold this near.
@given(st.one_of(smooth, tied), filters)
@example(np.zeros(V, np.float32), {"top_k": 2, "top_p": 0.6})
@example(np.r_[1.0, np.zeros(V - 1)].astype(np.float32), {"top_k": 3, "top_p": 0.1})
def test_filters_keep_what_the_naive_ones_keep(logits, params):
    near = 1e-5
    top_p, min_p = params.get("top_p", 1.0), params.get("min_p", 0.0)
    fewest = params | {"top_p": max(top_p - near, 0.0) if top_p < 1 else 1.0}
    fewest |= {"min_p": min(min_p * (1 + near), 1.0)}
    most = params | {"top_p": min(top_p + near, 1.0), "min_p": min_p * (1 - near)}
    assert naive_filter(logits, **fewest) <= kept(logits, **params) <= naive_filter(logits, **most)


def test_filters_by_hand():
    logits = np.log([0.4, 0.3, 0.2, 0.06, 0.04, *[1e-30] * (V - 5)])
    assert kept(logits) == set(range(V))
    assert kept(logits, top_k=2) == {0, 1}
    assert kept(logits, top_p=0.75) == {0, 1, 2}
    assert kept(logits, top_p=0.65) == {0, 1}
    assert kept(logits, min_p=0.4) == {0, 1, 2}
    # Top-k first: of 0.4 and 0.3 alone the first has more than half.
    assert kept(logits, top_k=2, top_p=0.55) == {0}
    assert kept(logits, top_p=0.55) == {0, 1}
    assert kept(logits, top_k=3, top_p=0.9, min_p=0.6) == {0, 1}


@pytest.mark.parametrize("top_k", [0, V, V + 1, 10**6, 2**31 - 1])
def test_top_k_of_the_vocabulary_or_more_keeps_all(top_k):
    assert kept(np.linspace(-5, 5, V), top_k=top_k) == set(range(V))


@pytest.mark.parametrize("top_p", [1e-50, 1e-30, 1e-6, 0.1])
def test_a_tiny_top_p_keeps_the_likeliest(top_p):
    assert kept(np.linspace(-5, 5, V), top_p=top_p) == {V - 1}


def test_top_p_of_one_keeps_what_rounding_would_drop():
    # Behind the first, the sum in float32 is 1 already.
    logits = np.r_[20.0, np.zeros(V - 1)]
    assert kept(logits, top_p=1.0, top_k=V) == set(range(V))


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999999}], ids=str)
def test_all_tokens_that_tie_with_the_last_one_kept_stay(params):
    logits = np.full(V, -1.0)
    logits[[3, 7, 20]] = 2.0
    assert kept(logits, **params) == {3, 7, 20}


def test_ties_at_the_edge_of_top_k_share_in_top_p():
    # Three tie for two places, so each has a third; two thirds are reached with two of them.
    logits = np.r_[np.zeros(3), np.full(V - 3, -1.0)]
    assert kept(logits, top_k=2, top_p=0.9) == {0, 1, 2}
    logits = np.r_[1.0, 0.0, 0.0, np.full(V - 3, -5.0)]
    # 0.58, 0.21, 0.21: the first alone does not reach 0.6, as 0.73 of two would.
    assert kept(logits, top_k=2, top_p=0.6) == {0, 1, 2}


@given(st.one_of(smooth, tied), st.sets(st.integers(0, V - 1)), st.floats(1e-4, 1e4))
def test_repetition_penalty_divides_or_multiplies_what_was_seen(logits, seen, penalty):
    mask = np.isin(np.arange(V), list(seen))
    got = _penalize(jnp.asarray(logits)[None], jnp.asarray(mask)[None], jnp.float32(penalty))
    expected = [
        x if i not in seen else (x * penalty if x < 0 else x / penalty)
        for i, x in enumerate(logits.tolist())
    ]
    np.testing.assert_allclose(np.asarray(got)[0], expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("penalty", [1e-300, 1e-38, 1e-30, 1e4])
@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_extreme_penalty_still_chooses_the_best(penalty, params, temperature):
    logits = np.r_[np.full(V - 2, -50.0), 9.0, 0.5]
    seen = NOWHERE.copy()
    seen[0, V - 2 if penalty < 1 else V - 1] = True
    found = draws(
        logits, range(5), seen, repetition_penalty=penalty, temperature=temperature, **params
    )
    assert set(found) == {V - 2}


def test_penalty_comes_before_temperature_and_filters():
    logits = np.r_[4.0, 3.0, np.zeros(V - 2)]
    seen = NOWHERE.copy()
    seen[0, 0] = True
    # 4 / 2 is below 3, so top-k of one leaves the second.
    for temperature in (0.0, 0.3, 5.0):
        params = {"temperature": temperature, "top_k": 1, "repetition_penalty": 2.0}
        assert draws(logits, range(3), seen, **params) == [1, 1, 1]
        assert draws(logits, range(3), **params) == [0, 0, 0]


def test_temperature_comes_before_top_p():
    logits = np.log([0.6, 0.3, 0.1, *[1e-30] * (V - 3)])
    assert set(draws(logits, range(300), temperature=1.0, top_p=0.5)) == {0}
    # At twice the temperature the first has 0.47.
    assert set(draws(logits, range(300), temperature=2.0, top_p=0.5)) == {0, 1}


def test_greedy_takes_the_first_of_the_likeliest():
    logits = np.zeros(V)
    logits[[5, 9]] = 3.0
    assert draws(logits, range(3)) == [5, 5, 5]
    # Filters do not matter to it.
    assert draws(logits, range(3), top_k=1, top_p=0.1, min_p=0.5) == [5, 5, 5]


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-40, 1e-38, 1e-30, 1e-3])
@pytest.mark.parametrize("params", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_a_tiny_temperature_is_greedy(temperature, params):
    logits = np.r_[np.linspace(-8, 8, V - 2), 9.0, -1e30]
    assert draws(logits, range(4), temperature=temperature, **params) == [V - 2] * 4
    assert draws(logits * 1e4, range(4), temperature=temperature, **params) == [V - 2] * 4


def test_a_huge_temperature_is_uniform():
    found = draws(np.linspace(-8, 8, V), range(400), temperature=1e4)
    assert set(found) == set(range(V))
    assert max(found.count(token) for token in range(V)) < 45


# Distribution: chi-square of many draws against the probabilities.
DRAWS = 20_000


def chi_square(counts, expected) -> float:
    """How far counts are from expected, in standard deviations of a chi-square distribution."""
    used = expected > 0
    assert counts[~used].sum() == 0, "a token without probability was drawn"
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum()
    freedom = used.sum() - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom))


def many(logits, positions, indices, **params):
    rows = len(positions)
    tiled = jnp.asarray(np.tile(np.asarray(logits, np.float32), (rows, 1)))
    sampling = arrays(seed=11, indices=indices, **params)
    tokens = _sample(tiled, jnp.zeros(tiled.shape, bool), jnp.asarray(positions), sampling)
    return np.bincount(np.asarray(tokens), minlength=V)


POSITIONS, SAME = np.arange(DRAWS, dtype=np.int32), np.zeros(DRAWS, np.int32)
LOGITS = np.random.default_rng(3).normal(0, 1.5, V)


@pytest.mark.parametrize(("positions", "indices"), [(POSITIONS, SAME), (SAME, POSITIONS)])
@pytest.mark.parametrize(
    "params",
    [{"temperature": 1.0}, {"temperature": 0.6}, {"temperature": 2.0, "top_k": 7}],
    ids=str,
)
def test_draws_follow_the_probabilities(positions, indices, params):
    counts = many(LOGITS, positions, indices, **params)
    scaled = LOGITS / params["temperature"]
    left = naive_filter(scaled, top_k=params.get("top_k", 0))
    p = probabilities(np.where(np.isin(np.arange(V), list(left)), scaled, -np.inf))
    assert abs(chi_square(counts, DRAWS * p)) < 5


def test_the_chi_square_sees_a_wrong_distribution():
    counts = many(LOGITS, POSITIONS, SAME, temperature=1.0)
    assert chi_square(counts, DRAWS * probabilities(LOGITS / 1.1)) > 10


# Keys: fold_in(fold_in(key(seed), sample index), position), and nothing else.
def test_the_key_is_made_of_seed_sample_index_and_position():
    logits = jnp.asarray(LOGITS, jnp.float32)
    for seed, index, position in [(0, 0, 0), (7, 3, 100), (2**32 - 1, 1, 2**31 - 1)]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), position)
        noise = jax.random.gumbel(key, (V,))
        expected = int(jnp.argmax(logits - logits.max() + noise))
        sampling = arrays(seed=seed, indices=[index], temperature=1.0)
        where = jnp.array([position], jnp.int32)
        assert int(_sample(logits[None], jnp.asarray(NOWHERE), where, sampling)[0]) == expected


def test_a_draw_does_not_depend_on_the_batch():
    rng = np.random.default_rng(5)
    logits = jnp.asarray(rng.normal(0, 1, (6, V)), jnp.float32)
    positions = np.array([5, 0, 5, 9, 1, 2], np.int32)
    indices = np.array([0, 1, 2, 0, 1, 0])
    params = {"temperature": 1.3, "top_k": 15, "top_p": 0.97}

    def tokens(rows):
        rows = np.array(rows)
        sampling = arrays(seed=3, indices=indices[rows].tolist(), **params)
        seen = jnp.zeros((len(rows), V), bool)
        return np.asarray(_sample(logits[rows], seen, jnp.asarray(positions[rows]), sampling))

    together = tokens(range(6))
    np.testing.assert_array_equal(tokens([4, 2, 0, 5, 1, 3]), together[[4, 2, 0, 5, 1, 3]])
    for row in range(6):
        assert tokens([row])[0] == together[row]


@pytest.mark.parametrize(
    "settings", [{"jax_default_prng_impl": "rbg"}, {"jax_enable_x64": True}], ids=str
)
def test_a_draw_does_not_depend_on_how_jax_is_set(settings):
    def tokens():
        sampling = arrays(seed=3, indices=[0, 1, 0], temperature=1.3, top_k=15)
        logits = jnp.asarray(np.tile(LOGITS, (3, 1)), jnp.float32)
        where = jnp.arange(3, dtype=jnp.int32)
        return np.asarray(sample(logits, jnp.zeros((3, V), bool), where, sampling))

    usual = {name: getattr(jax.config, name) for name in settings}
    expected = tokens()
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        np.testing.assert_array_equal(tokens(), expected)
    finally:
        for name, value in usual.items():
            jax.config.update(name, value)


@pytest.mark.parametrize("other", [{"seed": 2}, {"seed": 1 + 2**32}, {"indices": (1,)}], ids=str)
def test_seeds_and_sample_indices_make_other_draws(other):
    base = {"seed": 1, "indices": (0,), "temperature": 1.0}

    def sequence(seed, indices, temperature):
        sampling = arrays(seed, indices, temperature=temperature)
        logits, seen = jnp.zeros((1, V), jnp.float32), jnp.asarray(NOWHERE)
        at = [jnp.array([p], jnp.int32) for p in range(30)]
        return [int(_sample(logits, seen, p, sampling)[0]) for p in at]

    assert sequence(**base) == sequence(**base)
    agreeing = np.equal(sequence(**base), sequence(**base | other)).sum()
    assert agreeing < 10
    assert len(set(sequence(**base))) > 10  # and positions differ among themselves
