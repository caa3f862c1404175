"""Generation over a mesh gives what one device gives, and shows nothing of the rows that idle.

Sequences reach past 128 and 256 tokens, so that the cache lies on several devices along `seq`.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from generation_runs import SAMPLED, TOKENIZER, cached, tokens_until
from meshes import make_mesh, sharded_model, size_name
from naive_llama import CONFIG, random_model
from test_decode_loop import compilations

from jaxdecode.errors import RequestError
from jaxdecode.generation import generate, stream_generate
from jaxdecode.models.llama import Llama
from jaxdecode.sampling import SamplingParams

MODEL = dataclasses.replace(
    CONFIG, num_layers=1, num_q_heads=8, num_kv_heads=4, head_dim=8, eos_ids=()
)
LONG = [i * 7 % 60 for i in range(250)]
PROMPTS = [[5], [7, 1, 33, 20, 8, 2, 41], LONG]
# One compilation serves them all: the number of log-probabilities is static, the rest is not.
GREEDY = {"max_tokens": 12, "logprobs": 2, "ignore_eos": True}
WAYS = pytest.mark.parametrize("params", [GREEDY, GREEDY | SAMPLED], ids=["greedy", "sampled"])
MIXED, ROWS = (2, 2, 2), (4, 1, 2)


def model_on(sizes: tuple[int, int, int] | None) -> Llama:
    return random_model(MODEL) if sizes is None else sharded_model(MODEL, make_mesh(sizes))


def run(sizes, prompts=PROMPTS, tokenizer=None, *, cache=None, **params):
    return generate(model_on(sizes), tokenizer, prompts, SamplingParams(**params), cache=cache)


@functools.cache
def on_one_device(ways: tuple) -> list:
    return run(None, PROMPTS, TOKENIZER, **dict(ways))


def same(found, expected) -> None:
    assert len(found) == len(expected)
    for got, wanted in zip(found, expected, strict=True):
        assert (got.tokens, got.text) == (wanted.tokens, wanted.text)
        assert got.finish_reason == wanted.finish_reason
        for one, other in zip(got.logprobs, wanted.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
            values = [[logprob for _, logprob in way.top] for way in (one, other)]
            assert values[0] == pytest.approx(values[1], abs=1e-4)


@WAYS
@pytest.mark.parametrize("sizes", [MIXED, ROWS, (1, 1, 8)], ids=size_name)
def test_the_tokens_are_those_of_one_device(sizes, params):
    same(run(sizes, PROMPTS, TOKENIZER, **params), on_one_device(tuple(params.items())))


def test_references_differ():
    """Or the comparisons would show little."""
    greedy, sampled = (on_one_device(tuple(p.items())) for p in (GREEDY, GREEDY | SAMPLED))
    texts = [result.text for result in greedy + sampled]
    assert len(set(texts)) == 6
    assert all(len(set(text)) > 2 for text in texts)


def test_a_second_call_compiles_nothing():
    run(MIXED, **GREEDY)
    with compilations() as counts:
        run(MIXED, [[9], [3] * 248, [4] * 5, [1]], **GREEDY | SAMPLED)
    assert counts == {}


def test_rows_that_fill_up_the_batch_show_nowhere():
    results = run(MIXED, **GREEDY)
    assert [len(result.tokens) for result in results] == [12, 12, 12]
    assert results[0].stats.generated_tokens == 36
    assert results[0].stats.prompt_tokens == sum(map(len, PROMPTS))
    # The cache has the fourth row, which stays empty.
    assert cached(results[0]) == [13, 19, 262, 0]
    for layer in results[0].cache.keys + results[0].cache.values:
        assert not np.asarray(layer)[3].any()
        assert np.asarray(layer)[2].any()


@WAYS
def test_continuing_a_cache_equals_one_long_run(params):
    whole = on_one_device(tuple(params.items()))
    room = model_on(MIXED).init_cache(4, 512)
    first = run(MIXED, cache=room, **params | {"max_tokens": 5})
    cache = first[0].cache
    cache = cache.truncate(cache.lengths - 1)  # gives the last token again, as the prompt
    again = [result.tokens[-1:] for result in first]
    second = run(MIXED, again, cache=cache, **params | {"max_tokens": 7})
    for one, two, all_ in zip(first, second, whole, strict=True):
        assert one.tokens + two.tokens == all_.tokens
    assert cached(second[0]) == [13, 19, 262, 0]


@WAYS
def test_streaming(params):
    chunks = list(
        stream_generate(
            model_on(ROWS), TOKENIZER, LONG, SamplingParams(**params), prefill_step_size=128
        )
    )
    expected = on_one_device(tuple(params.items()))[2]
    assert "".join(chunk.text for chunk in chunks) == expected.text
    same([chunks[-1].result], [expected])
    assert cached(chunks[-1].result) == [262, 0, 0, 0]


def test_a_stop_string_ends_its_own_row_only():
    free = on_one_device(tuple(GREEDY.items()))
    stop = free[1].text[3:5]
    results = run(MIXED, PROMPTS, TOKENIZER, **GREEDY, stop=stop)
    same(results, run(None, PROMPTS, TOKENIZER, **GREEDY, stop=stop))
    assert results[1].finish_reason == "stop"
    kept = [
        len(prompt) + (tokens_until(stop, whole.tokens) if stop in whole.text else 12)
        for prompt, whole in zip(PROMPTS, free, strict=True)
    ]
    assert cached(results[0]) == [*kept, 0]
    assert kept[1] < len(PROMPTS[1]) + 12


def test_stop_tokens_end_rows_and_generation_goes_on_for_the_others():
    stops = [result.tokens[3] for result in on_one_device(tuple(GREEDY.items()))[:2]]
    results = run(MIXED, **GREEDY, stop_token_ids=stops)
    same(results, run(None, **GREEDY, stop_token_ids=stops))
    assert {result.finish_reason for result in results} == {"stop", "length"}


@pytest.mark.parametrize(
    "other",
    [(1, 2, 2), (1, 1, 8), (2, 2, 1), None],
    ids=lambda sizes: size_name(sizes or (1, 1, 1)),
)
def test_a_cache_of_another_mesh_is_refused(other):
    cache = model_on(other).init_cache(4, 128)
    with pytest.raises(RequestError, match=r"the cache lies on .*, but the model on the mesh data"):
        run(MIXED, cache=cache, **GREEDY)
    cache = model_on(MIXED).init_cache(4, 128)
    with pytest.raises(RequestError, match=r"the cache lies on the mesh data=2, tensor=2, seq=2,"):
        run(other, cache=cache, **GREEDY)


def test_the_devices_of_a_mesh_in_another_order_are_another_mesh():
    cache = model_on(MIXED).init_cache(4, 128)
    model = sharded_model(MODEL, make_mesh(MIXED, backwards=True))
    with pytest.raises(RequestError, match="the cache lies on"):
        generate(model, None, PROMPTS, SamplingParams(), cache=cache)


def test_rows_and_capacity_of_a_cache_of_ones_own():
    model = model_on(MIXED)
    with pytest.raises(ValueError, match=r"batch_size=3 must be a multiple of data=2 .* make 4"):
        model.init_cache(3, 128)
    with pytest.raises(RequestError, match=r"2 rows but there are 3 prompts, which take 4 rows on"):
        run(MIXED, cache=model.init_cache(2, 128), **GREEDY)
    cache = model.init_cache(4, 300)
    assert cache.capacity == 512  # whole blocks of 128 on each device
    first = run(MIXED, [*PROMPTS, [1]], cache=cache, **GREEDY)
    with pytest.raises(RequestError, match="holds tokens in more than 3 of its 4 rows, but there"):
        run(MIXED, cache=first[0].cache, **GREEDY)
    with pytest.raises(RequestError, match="holds 262 tokens of its capacity 512; a prompt of 250"):
        run(MIXED, [*PROMPTS, [1]], cache=first[0].cache, **GREEDY)
    message = r"exceed the 512 positions .* cache=model.init_cache\(4, 550\) to go beyond"
    with pytest.raises(RequestError, match=message):
        run(MIXED, max_tokens=300)
