"""Continuing from a cache: the same as one long run."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from generation_runs import PROMPTS, SAMPLED, SMALL, TOKENIZER, cached, naive_greedy, run, run_one
from jax.sharding import AxisType
from naive_llama import BOS, jitted, random_model

from jaxdecode.errors import RequestError


def test_the_cache_holds_exactly_prompt_and_tokens():
    stops = [naive_greedy(tuple(PROMPTS[0]), 30)[3], naive_greedy(tuple(PROMPTS[1]), 30)[11]]
    results = run(PROMPTS, max_tokens=20, stop_token_ids=stops)
    cache = results[0].cache
    assert len({len(r.tokens) for r in results}) > 1
    for row, (prompt, result) in enumerate(zip(PROMPTS, results, strict=True)):
        sequence = prompt + result.tokens
        assert cached(result)[row] == len(sequence)
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(sequence)] = sequence
        _, fresh = jitted(random_model())(
            padded, random_model().init_cache(1, 128), [len(sequence)]
        )
        for got, expected in zip(cache.keys + cache.values, fresh.keys + fresh.values, strict=True):
            got, expected = np.asarray(got), np.asarray(expected)
            np.testing.assert_allclose(
                got[row, : len(sequence)], expected[0, : len(sequence)], atol=2e-5
            )


@pytest.mark.parametrize("params", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_continuing_equals_one_long_run(params):
    for split in (1, 8, 11):
        whole = run(PROMPTS, max_tokens=20, ignore_eos=True, **params)
        first = run(PROMPTS, max_tokens=split, ignore_eos=True, **params)
        cache = first[0].cache
        # The last token again, as the prompt: its logits are not kept.
        cache = cache.truncate(cache.lengths - 1)
        again = [r.tokens[-1:] for r in first]
        second = run(again, max_tokens=20 - split, ignore_eos=True, cache=cache, **params)
        for one, two, all_ in zip(first, second, whole, strict=True):
            assert one.tokens + two.tokens == all_.tokens
        assert cached(second[0]) == [len(p) + 20 for p in PROMPTS]


@pytest.mark.parametrize("params", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_conversation_equals_its_whole_text_at_once(params):
    history, cache = [], None
    room = random_model().init_cache(1, 128)
    for turn in (PROMPTS[1], PROMPTS[0], PROMPTS[2]):
        result = run_one(turn, max_tokens=7, ignore_eos=True, cache=cache or room, **params)
        at_once = run_one(history + turn, max_tokens=7, ignore_eos=True, **params)
        assert result.tokens == at_once.tokens
        history += turn + result.tokens
        cache = result.cache
        assert cached(result) == [len(history)]


def test_after_a_stop_string_a_conversation_goes_on():
    """What was generated past the stop string is forgotten."""
    text = TOKENIZER.decode(naive_greedy((7, 1, 33), 30))
    first = run_one([7, 1, 33], TOKENIZER, max_tokens=30, ignore_eos=True, stop=text[9:11])
    assert first.finish_reason == "stop"
    second = run_one([4, 4], max_tokens=10, ignore_eos=True, cache=first.cache)
    assert second.tokens == naive_greedy((7, 1, 33, *first.tokens, 4, 4), 10)


def test_a_row_that_met_its_stop_string_idles_from_the_next_dispatch_on():
    text = TOKENIZER.decode(naive_greedy(tuple(PROMPTS[0]), 30))
    results = run(PROMPTS, TOKENIZER, max_tokens=30, ignore_eos=True, stop=text[2:5])
    assert [len(r.tokens) for r in results] == [5, 30, 30]
    for layer in results[0].cache.keys:
        written = np.flatnonzero(np.asarray(layer)[0].any(axis=(1, 2)))
        assert written.tolist() == list(range(len(PROMPTS[0]) + 8))


def test_text_that_continues_gets_no_second_beginning():
    first = run_one("ab", TOKENIZER, max_tokens=4)
    assert cached(first) == [3 + 4]
    second = run_one("cd", TOKENIZER, max_tokens=4, cache=first.cache)
    assert cached(second) == [3 + 4 + 2 + 4]
    # Ids are taken as they are.
    third = run_one([BOS, 2], TOKENIZER, max_tokens=4, cache=second.cache)
    assert cached(third) == [3 + 4 + 2 + 4 + 2 + 4]


def test_an_empty_cache_of_ones_own_is_like_none():
    cache = random_model().init_cache(1, 100)
    assert run_one([5], max_tokens=9, ignore_eos=True, cache=cache).tokens == naive_greedy((5,), 9)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_continuing_under_a_mesh_that_the_model_is_not_on(kind):
    expected = run_one(PROMPTS[0], max_tokens=7, ignore_eos=True).tokens
    with jax.set_mesh(jax.make_mesh((2,), ("x",), axis_types=(kind,))):
        first = run_one(PROMPTS[0], max_tokens=3, ignore_eos=True)
        cache = first.cache.truncate(first.cache.lengths - 1)
        second = run_one(first.tokens[-1:], max_tokens=4, ignore_eos=True, cache=cache)
    assert first.tokens + second.tokens == expected


def test_a_cache_may_go_beyond_the_trained_positions():
    model = random_model(SMALL)
    with pytest.raises(RequestError, match="a prompt of 10 tokens and max_tokens=55 exceed the 64"):
        run_one([5] * 10, max_tokens=55, model=model)
    assert len(run_one([5] * 10, max_tokens=54, model=model).tokens) == 54
    result = run_one([5] * 10, max_tokens=55, model=model, cache=model.init_cache(1, 65))
    assert cached(result) == [65]
