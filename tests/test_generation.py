"""Tokens and texts of generate, against a loop that caches nothing."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from generation_runs import (
    PROMPTS,
    SAMPLED,
    SMALL,
    TOKENIZER,
    cached,
    naive_greedy,
    next_logits,
    run,
    run_one,
    tokens_until,
)
from naive_llama import BOS, CONFIG, EOS, ChatTokenizer, ToyTokenizer, random_model

from jaxdecode.models.kv_cache import KVCache
from jaxdecode.models.llama import Llama
from jaxdecode.results import Result, TokenLogprobs


def test_weights_may_be_numpy_arrays():
    params = {name: np.asarray(array) for name, array in random_model().params().items()}
    model = Llama.from_params(CONFIG, params)
    kept = {"max_tokens": 5, "ignore_eos": True}
    expected = run_one([5], **kept).tokens
    assert run_one([5], model=model, **kept).tokens == expected
    assert run_one([5], model=model, cache=model.init_cache(1, 16), **kept).tokens == expected


def test_added_tokens_of_other_tokenizers_are_text():
    """Those of transformers count them in their length, not in their vocab_size."""

    class WithAddedTokens(ToyTokenizer):
        vocab_size = 10

        def __len__(self) -> int:
            return CONFIG.vocab_size

    kept = {"max_tokens": 20, "ignore_eos": True}
    expected = run_one([5], TOKENIZER, **kept)
    assert max(expected.tokens) >= WithAddedTokens.vocab_size
    assert run_one([5], WithAddedTokens(), **kept).text == expected.text


# Greedy and sampled tokens
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_a_loop_that_caches_nothing(penalty):
    results = run(PROMPTS, max_tokens=30, ignore_eos=True, repetition_penalty=penalty)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.tokens == naive_greedy(tuple(prompt), 30, penalty)
        assert result.finish_reason == "length"
    assert naive_greedy((5,), 30, 1.0) != naive_greedy((5,), 30, 1.3)


def test_sampling_equals_a_loop_that_caches_nothing():
    results = run(PROMPTS, max_tokens=12, ignore_eos=True, temperature=0.8, seed=9)
    for prompt, result in zip(PROMPTS, results, strict=True):
        sequence = list(prompt)
        for _ in range(12):
            key = jax.random.fold_in(jax.random.key(9), 0)
            noise = jax.random.gumbel(jax.random.fold_in(key, len(sequence)), (CONFIG.vocab_size,))
            sequence.append(int(np.argmax(next_logits(sequence) / 0.8 + np.asarray(noise))))
        assert result.tokens == sequence[len(prompt) :]


@pytest.mark.parametrize("params", [{}, SAMPLED, SAMPLED | {"repetition_penalty": 1.5}], ids=str)
def test_a_batch_equals_single_runs(params):
    together = run(PROMPTS, max_tokens=25, ignore_eos=True, **params)
    shuffled = run(PROMPTS[::-1], max_tokens=25, ignore_eos=True, **params)[::-1]
    for prompt, result, other in zip(PROMPTS, together, shuffled, strict=True):
        assert result.tokens == run_one(prompt, max_tokens=25, ignore_eos=True, **params).tokens
        assert result.tokens == other.tokens


def test_seeds_reproduce_and_differ():
    params = {"max_tokens": 20, "ignore_eos": True, "temperature": 1.0}
    first, second, other = (run_one([5], seed=seed, **params) for seed in (4, 4, 5))
    assert first.tokens == second.tokens != other.tokens
    assert (first.seed, other.seed) == (4, 5)
    assert run_one([5], seed=4 + 2**32, **params).tokens != first.tokens


def test_results_without_a_seed_name_the_one_they_used():
    params = {"max_tokens": 20, "ignore_eos": True, "temperature": 1.0}
    first, second = run_one([5], **params), run_one([5], **params)
    assert first.seed != second.seed
    assert first.tokens != second.tokens
    for result in (first, second):
        assert run_one([5], seed=result.seed, **params).tokens == result.tokens


def test_the_same_prompt_twice_gives_two_samples_each_reproducible():
    params = {"max_tokens": 20, "ignore_eos": True, "temperature": 1.0, "seed": 8}
    first, between, second = (r.tokens for r in run([[5], [7], [5]], **params))
    assert first != second
    assert [r.tokens for r in run([[5], [5], [7]], **params)] == [first, second, between]
    assert run_one([5], **params).tokens == first
    assert run_one([7], **params).tokens == between


def test_greedy_does_not_tell_the_same_prompts_apart():
    assert len({tuple(r.tokens) for r in run([[5]] * 3, max_tokens=8)}) == 1


# Where a text ends
@pytest.mark.parametrize("max_tokens", [1, 7, 8, 9, 17])
def test_max_tokens(max_tokens):
    result = run_one([5], max_tokens=max_tokens, ignore_eos=True)
    assert result.tokens == naive_greedy((5,), 30)[:max_tokens]
    assert result.finish_reason == "length"
    assert cached(result) == [1 + max_tokens]


def test_stop_token_ids_end_each_row_where_it_meets_one():
    expected = [naive_greedy(tuple(prompt), 30) for prompt in PROMPTS]
    stops = [expected[0][2], expected[1][11]]
    results = run(PROMPTS, TOKENIZER, max_tokens=30, stop_token_ids=stops)
    for result, whole in zip(results, expected, strict=True):
        end = next((i for i, token in enumerate(whole) if token in stops), None)
        assert result.tokens == whole[: 30 if end is None else end + 1]
        assert result.finish_reason == ("length" if end is None else "stop")
        text = result.tokens if end is None else result.tokens[:-1]
        assert result.text == TOKENIZER.decode(text)
    assert cached(results[0]) == [
        len(p) + len(r.tokens) for p, r in zip(PROMPTS, results, strict=True)
    ]
    assert len({len(r.tokens) for r in results}) == 3


def test_many_stop_token_ids():
    whole = naive_greedy((5,), 30)
    unused = [token for token in range(200) if token not in whole]
    stops = [*unused[:20], whole[9]]
    assert (
        run_one([5], max_tokens=30, stop_token_ids=stops).tokens
        == whole[: whole.index(whole[9]) + 1]
    )
    assert run_one([5], max_tokens=30, stop_token_ids=unused[:20]).tokens == whole


def seed_that_samples_eos() -> tuple[int, list[int]]:
    """A seed, and the tokens up to its first eos, of which there are a few."""
    for seed in range(50):
        tokens = run_one([5], max_tokens=20, ignore_eos=True, temperature=3.0, seed=seed).tokens
        if EOS in tokens[3:] and EOS not in tokens[:3]:
            return seed, tokens[: tokens.index(EOS) + 1]
    raise AssertionError("no seed samples an eos")


def test_the_eos_of_the_config_ends_a_text_unless_ignored():
    seed, tokens = seed_that_samples_eos()
    params = {"max_tokens": 20, "temperature": 3.0, "seed": seed}
    result = run_one([5], TOKENIZER, **params)
    assert result.tokens == tokens
    assert result.finish_reason == "stop"
    assert result.text == TOKENIZER.decode(tokens[:-1])
    assert cached(result) == [1 + len(tokens)]
    # Ids of one's own replace it.
    assert len(run_one([5], stop_token_ids=(), **params).tokens) == 20


def test_an_eos_as_the_last_token_allowed_is_a_stop():
    seed, tokens = seed_that_samples_eos()
    result = run_one([5], max_tokens=len(tokens), temperature=3.0, seed=seed)
    assert (result.tokens, result.finish_reason) == (tokens, "stop")


def test_without_an_eos_in_the_config_the_tokenizers_counts():
    model = random_model(SMALL)
    whole = run_one([5], max_tokens=10, model=model).tokens
    tokenizer = ToyTokenizer()
    tokenizer.eos_ids = (whole[4],)
    expected = whole[: whole.index(whole[4]) + 1]
    assert run_one([5], tokenizer, max_tokens=10, model=model).tokens == expected
    assert run_one([5], tokenizer, max_tokens=10, model=model, ignore_eos=True).tokens == whole


@pytest.mark.parametrize(("start", "length"), [(0, 1), (3, 2), (6, 4), (7, 1), (14, 5), (24, 3)])
def test_stop_strings_end_a_text_also_across_dispatches(start, length):
    whole = naive_greedy((7, 1, 33), 30)
    text = TOKENIZER.decode(whole)
    stop = text[start : start + length]
    end = tokens_until(stop, whole)
    params = {"max_tokens": 30, "ignore_eos": True, "stop": ["never?", stop]}
    result = run_one([7, 1, 33], TOKENIZER, **params)
    assert result.text == text[: text.index(stop)]
    assert result.tokens == whole[:end]
    assert result.finish_reason == "stop"
    assert cached(result) == [3 + end]


def test_a_stop_string_never_completed_is_text():
    text = TOKENIZER.decode(naive_greedy((5,), 10))
    result = run_one([5], TOKENIZER, max_tokens=10, ignore_eos=True, stop=text[-3:] + "?")
    assert (result.text, result.finish_reason) == (text, "length")


# What the caller gets
def test_results_hold_what_they_promise():
    results = run(["abc", "Z", "ab"], TOKENIZER, max_tokens=5, temperature=1.0, seed=3)
    assert [type(r) for r in results] == [Result] * 3
    for result in results:
        assert result.text == TOKENIZER.decode(result.tokens)
        assert result.logprobs is None
        assert result.seed == 3
        assert result.cache is results[0].cache
        assert result.stats.prompt_tokens == 4 + 2 + 3
        assert result.stats.generated_tokens == sum(len(r.tokens) for r in results)
        assert {type(token) for token in result.tokens} == {int}
    assert isinstance(results[0].cache, KVCache)
    assert cached(results[0]) == [
        n + len(r.tokens) for n, r in zip((4, 2, 3), results, strict=True)
    ]


def test_without_a_tokenizer_there_is_no_text():
    assert run_one([5], max_tokens=3).text == ""


def test_prompts_of_all_forms_agree():
    ids = [BOS, 0, 1, 2]
    expected = run_one(ids, max_tokens=6).tokens
    for prompt in ("abc", ["abc"], ids, np.array(ids), [ids], np.array([ids])):
        (result,) = run(prompt, TOKENIZER, max_tokens=6)
        assert result.tokens == expected
    talk = [{"role": "user", "content": "Hi"}]
    templated = run_one(ChatTokenizer().encode("uHiA"), max_tokens=6).tokens
    for prompt in (talk, [talk]):
        (result,) = run(prompt, ChatTokenizer(), max_tokens=6)
        assert result.tokens == templated


@pytest.mark.parametrize("k", [0, 3])
def test_logprobs_are_of_the_models_own_logits(k):
    params = {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.5, "seed": 2}
    result = run_one([5, 6], max_tokens=10, ignore_eos=True, logprobs=k, **params)
    sequence = [5, 6]
    for token, found in zip(result.tokens, result.logprobs, strict=True):
        logits = next_logits(sequence)
        logprobs = logits - logits.max()
        logprobs -= np.log(np.exp(logprobs).sum())
        assert isinstance(found, TokenLogprobs)
        assert found.logprob == pytest.approx(logprobs[token], abs=1e-4)
        assert len(found.top) == min(k, CONFIG.vocab_size)
        best = np.argsort(-logprobs)[: len(found.top)]
        np.testing.assert_allclose([p for _, p in found.top], logprobs[best], atol=1e-4)
        for likely, logprob in found.top:
            assert logprob == pytest.approx(logprobs[likely], abs=1e-4)
        sequence.append(token)
    assert result.tokens == run_one([5, 6], max_tokens=10, ignore_eos=True, **params).tokens


def test_logprobs_of_more_tokens_than_there_are():
    result = run_one([5], max_tokens=2, model=random_model(SMALL), logprobs=100)
    for found in result.logprobs:
        assert sorted(token for token, _ in found.top) == list(range(CONFIG.vocab_size))
        assert sum(np.exp([p for _, p in found.top])) == pytest.approx(1, abs=1e-4)
