"""Streaming, prefill in portions, and threads."""

from __future__ import annotations

import concurrent.futures

import jax
import numpy as np
import pytest
from generation_runs import SAMPLED, TOKENIZER, cached, naive_greedy, run_one, stream

from jaxdecode.results import Chunk


# Streaming
@pytest.mark.parametrize("dispatch", [1, 3, 8])
@pytest.mark.parametrize(
    "params", [{"ignore_eos": True}, SAMPLED, {"stop": "...", "ignore_eos": True}], ids=str
)
def test_streaming_gives_what_generate_gives(dispatch, params):
    if "stop" in params:
        params = params | {"stop": TOKENIZER.decode(naive_greedy((7, 1, 33), 30))[12:14]}
    expected = run_one([7, 1, 33], TOKENIZER, max_tokens=20, **params)
    chunks = stream([7, 1, 33], TOKENIZER, max_tokens=20, dispatch=dispatch, **params)
    assert {type(chunk) for chunk in chunks} == {Chunk}
    assert [chunk.token for chunk in chunks] == expected.tokens
    assert "".join(chunk.text for chunk in chunks) == expected.text
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert [c.result for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert {chunk.logprobs for chunk in chunks} == {None}
    last = chunks[-1]
    assert last.finish_reason == expected.finish_reason == last.result.finish_reason
    assert last.result.tokens == expected.tokens
    assert last.result.text == expected.text
    assert cached(last.result) == cached(expected)


def test_streamed_logprobs_are_those_of_the_result():
    chunks = stream([5], max_tokens=10, logprobs=3)
    assert [chunk.logprobs for chunk in chunks] == chunks[-1].result.logprobs
    assert chunks[-1].result.logprobs == run_one([5], max_tokens=10, logprobs=3).logprobs


def test_streaming_continues_from_a_cache():
    first = stream([5], max_tokens=5, ignore_eos=True)[-1].result
    second = stream([9], max_tokens=5, ignore_eos=True, cache=first.cache)[-1].result
    assert second.tokens == naive_greedy((5, *first.tokens, 9), 5)


def test_streamed_text_is_never_taken_back():
    """Text that may begin a stop string waits, and none of the stop string comes out."""
    text = TOKENIZER.decode(naive_greedy((5,), 30))
    stop = text[10:14]
    shown = ""
    for chunk in stream([5], TOKENIZER, max_tokens=30, ignore_eos=True, stop=stop):
        shown += chunk.text
        assert text[: text.index(stop)].startswith(shown)
    assert shown == text[: text.index(stop)]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33, 50])
def test_prefill_in_portions_equals_prefill_at_once(length):
    prompt = np.random.default_rng(length).integers(0, 60, length).tolist()
    seen = []
    params = {"max_tokens": 6, "ignore_eos": True}
    small = stream(prompt, step=16, on_prefill=lambda *x: seen.append(x), **params)
    assert [c.token for c in small] == naive_greedy(tuple(prompt), 6)
    assert seen == [(min(end, length), length) for end in range(16, length + 16, 16)]
    whole = stream(prompt, **params)
    assert [c.token for c in whole] == [c.token for c in small]
    caches = [jax.tree.leaves(chunks[-1].result.cache) for chunks in (small, whole)]
    for a, b in zip(*caches, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


# Threads
def test_threads_with_one_model_do_not_disturb_each_other():
    seeds = [1, 2, 1, 2]

    def work(seed):
        params = {"max_tokens": 25, "ignore_eos": True, "temperature": 1.0, "seed": seed}
        return [run_one([5, seed], **params).tokens for _ in range(5)]

    expected = {seed: work(seed)[0] for seed in (1, 2)}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for seed, found in zip(seeds, pool.map(work, seeds), strict=True):
            assert found == [expected[seed]] * 5
