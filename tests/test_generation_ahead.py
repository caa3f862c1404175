"""Tokens that are begun before the last ones are read, as on devices beside the host."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_runs import (
    PROMPTS,
    SAMPLED,
    TOKENIZER,
    cached,
    naive_greedy,
    run,
    run_one,
    stream,
)
from naive_llama import CONFIG, random_model, random_params

from jaxdecode import decode_loop, generation
from jaxdecode.errors import NonFiniteLogitsError
from jaxdecode.models.llama import Llama

TEXT = TOKENIZER.decode(naive_greedy(tuple(PROMPTS[0]), 30))
EOS = naive_greedy(tuple(PROMPTS[1]), 30)[10]
ENDS = {
    "length": {"ignore_eos": True},
    "stop string": {"ignore_eos": True, "stop": TEXT[2:5]},
    "stop id": {"stop_token_ids": (EOS,)},
    "sampled": SAMPLED,
    "penalty": {"ignore_eos": True, "repetition_penalty": 1.3, "logprobs": 2},
}


@pytest.fixture
def ahead(monkeypatch):
    """Call it, and what is generated from then on is generated ahead."""
    return lambda: monkeypatch.setattr(generation, "_has_own_processor", lambda array: True)


@pytest.fixture
def events(monkeypatch):
    """What a run does with the device, in order."""
    found = []

    def noted(name, call):
        return lambda *args, **options: (found.append(name), call(*args, **options))[1]

    monkeypatch.setattr(generation, "decode", noted("begin", generation.decode))
    monkeypatch.setattr(jax, "device_get", noted("read", jax.device_get))
    return found


@pytest.mark.parametrize("end", ENDS)
def test_results_are_the_same(end, ahead):
    expected = run(PROMPTS, TOKENIZER, max_tokens=20, **ENDS[end])
    ahead()
    found = run(PROMPTS, TOKENIZER, max_tokens=20, **ENDS[end])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.text == theirs.text
        assert ours.finish_reason == theirs.finish_reason
        assert ours.logprobs == theirs.logprobs
        assert cached(ours) == cached(theirs)
    follow = [[4, 4], [9], [3, 2, 1]]
    again = [run(follow, max_tokens=9, cache=x[0].cache) for x in (found, expected)]
    assert [r.tokens for r in again[0]] == [r.tokens for r in again[1]]


def test_the_next_tokens_are_begun_before_the_last_are_read(ahead, events):
    run_one([5], max_tokens=20, ignore_eos=True)
    assert events == ["begin", "read"] * 3
    events.clear()
    ahead()
    run_one([5], max_tokens=20, ignore_eos=True)
    assert events == ["begin", "begin", "read", "begin", "read", "read"]


@pytest.mark.parametrize("max_tokens", [1, 8, 16])
def test_nothing_is_begun_past_the_last_token(max_tokens, ahead, events):
    ahead()
    run_one([5], max_tokens=max_tokens, ignore_eos=True)
    assert events.count("begin") == events.count("read") == -(-max_tokens // 8)


def test_after_its_end_a_sequence_costs_one_dispatch_more(ahead, events):
    ahead()
    result = run_one(PROMPTS[0], TOKENIZER, max_tokens=100, ignore_eos=True, stop=TEXT[2:5])
    assert len(result.tokens) == 5
    assert events == ["begin", "begin", "read"]
    assert cached(result) == [len(PROMPTS[0]) + 5]


def test_a_row_that_met_its_stop_string_idles(ahead):
    ahead()
    results = run(PROMPTS, TOKENIZER, max_tokens=60, ignore_eos=True, stop=TEXT[2:5])
    assert [len(r.tokens) for r in results] == [5, 60, 60]
    for layer in results[0].cache.keys:
        written = np.flatnonzero(np.asarray(layer)[0].any(axis=(1, 2)))
        assert written.tolist() == list(range(len(PROMPTS[0]) + 2 * 8))


@pytest.mark.parametrize("dispatch", [1, 3])
def test_a_stream_gives_what_generate_gives(dispatch, ahead):
    options = {"max_tokens": 20, "ignore_eos": True, "stop": TEXT[7:9]}
    expected = run_one(PROMPTS[0], TOKENIZER, **options)
    ahead()
    chunks = stream(PROMPTS[0], TOKENIZER, dispatch=dispatch, **options)
    assert [chunk.token for chunk in chunks] == expected.tokens
    assert "".join(chunk.text for chunk in chunks) == expected.text
    assert chunks[-1].result.finish_reason == "stop"


def test_what_is_not_finite_is_found(ahead):
    params = {name: jnp.asarray(w) for name, w in random_params(CONFIG).items()}
    model = Llama.from_params(CONFIG, params | {"embed": jnp.full_like(params["embed"], jnp.nan)})
    ahead()
    with pytest.raises(NonFiniteLogitsError, match="token 0"):
        run([[5]], model=model, max_tokens=20)


def test_the_clock_goes_on_while_a_stream_is_read(ahead):
    """Else the device would seem to generate in no time."""

    def seconds():
        chunks = generation.stream_generate(
            random_model(), None, [5], generation.SamplingParams(max_tokens=24, ignore_eos=True)
        )
        for number, chunk in enumerate(chunks):
            if number in (0, 8):
                time.sleep(0.5)
            last = chunk
        return last.result.stats.generation_seconds

    assert seconds() < 0.5
    ahead()
    assert 1 <= seconds() < 2


def test_a_model_is_hashed_once(monkeypatch):
    """jit wants the hash of what is static at each call, and that of a model takes long."""
    graph = type(decode_loop.SplitModel(random_model()).static.graph)
    hashed, of_graph = [], graph.__hash__
    monkeypatch.setattr(graph, "__hash__", lambda self: (hashed.append(self), of_graph(self))[1])
    run_one([5], max_tokens=9, ignore_eos=True)
    assert len(hashed) == 1
    static = decode_loop.SplitModel(random_model()).static
    assert hash(static) == hash(decode_loop.SplitModel(random_model()).static)
    assert len(hashed) == 3
