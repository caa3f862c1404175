"""Requests that cannot be served say why, and with which numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from generation_runs import TOKENIZER, cached, run, run_one, stream
from naive_llama import CONFIG, random_model

from jaxdecode.errors import RequestError
from jaxdecode.generation import generate, stream_generate
from jaxdecode.models.kv_cache import KVCache
from jaxdecode.sampling import SamplingParams

TALK = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("prompts", "tokenizer", "message"),
    [
        ([], None, "prompts is empty; give at least one prompt"),
        ([[]], None, "prompt 0 has no tokens; give at least one"),
        ([[1], []], None, "prompt 1 has no tokens"),
        ([[1, 64]], None, "prompt 0 has token id 64, outside the model's vocabulary of 64"),
        ([[1], [-1]], None, "prompt 1 has token id -1, outside"),
        ("abc", None, "prompt 0 is a str, which needs a tokenizer"),
        (TALK, None, "prompt 0 is a conversation, which needs a tokenizer"),
        (TALK, TOKENIZER, "this tokenizer has no apply_chat_template"),
        (3.5, TOKENIZER, "a prompt is a str, a list of .* found float"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_served_are_named(prompts, tokenizer, message):
    with pytest.raises(RequestError, match=message):
        run(prompts, tokenizer, max_tokens=2)


def test_too_long_a_request_states_the_three_numbers():
    message = "a prompt of 10 tokens and max_tokens=503 exceed the 512 positions"
    with pytest.raises(RequestError, match=message):
        run([[1], [1] * 10], max_tokens=503)
    with pytest.raises(RequestError, match=r"a prompt of 600 tokens .* exceed the 512 positions"):
        run([[1] * 600], max_tokens=1)
    with pytest.raises(RequestError, match="max_tokens=2147483647"):
        run([[1]], max_tokens=2**31 - 1)


def test_a_cache_is_filled_to_its_last_slot_but_not_past_it():
    full = run_one(
        [5] * 8, max_tokens=120, ignore_eos=True, cache=random_model().init_cache(1, 128)
    )
    assert cached(full) == [128]
    assert not np.asarray(full.cache.overflowed).any()
    message = (
        "holds 3 tokens of its capacity 128; a prompt of 8 tokens and max_tokens=118 do not fit"
    )
    with pytest.raises(RequestError, match=message):
        run_one([5] * 8, max_tokens=118, cache=full.cache.truncate(3))
    with pytest.raises(RequestError, match="holds 128 tokens of its capacity 128"):
        run_one([5], max_tokens=1, cache=full.cache)
    # A refused request leaves the cache as it was.
    assert cached(
        run_one([5] * 8, max_tokens=117, cache=full.cache.truncate(3), ignore_eos=True)
    ) == [128]


def test_a_cache_of_another_batch_is_refused():
    with pytest.raises(RequestError, match="cache has 2 rows but there are 1 prompts"):
        run([[1]], max_tokens=2, cache=random_model().init_cache(2, 128))


@pytest.mark.parametrize(
    "fields", [{"num_layers": 1}, {"num_layers": 3}, {"num_kv_heads": 4}, {"head_dim": 4}], ids=str
)
def test_a_cache_of_another_model_is_refused(fields):
    cache = KVCache.create(dataclasses.replace(CONFIG, **fields), 1, 128, "float32")
    with pytest.raises(RequestError, match=r"cache has .* but the model \(2, 2, 8\)"):
        run([[1]], max_tokens=2, cache=cache)


def test_a_cache_given_away_is_refused():
    cache = random_model().init_cache(1, 128)
    shorter = cache.truncate(0)  # has other lengths, but the same keys and values
    run([[1]], max_tokens=2, cache=cache)
    for given_away in (cache, shorter):
        with pytest.raises(RequestError, match="cache was donated to an earlier call"):
            run([[1]], max_tokens=2, cache=given_away)


def test_of_two_streams_into_one_cache_the_second_is_refused():
    model, params = random_model(), SamplingParams(max_tokens=2, ignore_eos=True)
    cache = model.init_cache(1, 128)
    first, second = (stream_generate(model, None, [1], params, cache=cache) for _ in range(2))
    assert len(list(first)) > 0
    with pytest.raises(RequestError, match="cache was donated to an earlier call"):
        next(second)


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(RequestError, match="needs a tokenizer; without one use stop_token_ids"):
        run([[1]], max_tokens=2, stop="x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dispatch": 0}, "tokens_per_dispatch must be from 1 to 1024, found 0"),
        ({"dispatch": 10**9}, "tokens_per_dispatch must be from 1 to 1024, found 1000000000"),
        ({"step": 8}, "prefill_step_size must be a power of two from 16, found 8"),
        ({"step": 48}, "prefill_step_size must be a power of two from 16, found 48"),
    ],
)
def test_streaming_checks_its_sizes(arguments, message):
    with pytest.raises(RequestError, match=message):
        stream([1], **arguments)


def test_a_batch_of_prompts_goes_in_pieces_of_the_size_asked_for():
    prompts = [list(range(1, 40)), [5]]
    params = SamplingParams(max_tokens=3)
    whole = generate(random_model(), None, prompts, params)
    pieces = generate(random_model(), None, prompts, params, prefill_step_size=16)
    assert [x.tokens for x in pieces] == [x.tokens for x in whole]
    with pytest.raises(RequestError, match="a power of two from 16, found 17"):
        generate(random_model(), None, prompts, params, prefill_step_size=17)


def test_streaming_takes_one_prompt_and_checks_before_it_is_read():
    with pytest.raises(
        RequestError, match="stream_generate takes one prompt, found 2; use generate"
    ):
        stream_generate(random_model(), None, [[1], [2]])
    with pytest.raises(RequestError, match="prompt 0 has token id 99"):
        stream_generate(random_model(), None, [99])


def test_unknown_implementations_are_refused():
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        generate(random_model(), None, [1], implementation="fast")
