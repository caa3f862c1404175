"""SamplingParams refuses what is out of range, by name."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from jaxdecode.errors import RequestError
from jaxdecode.sampling import MAX_LOGPROBS, MAX_STOPS, SamplingParams


def test_defaults_are_greedy_and_plain():
    params = SamplingParams()
    assert dataclasses.asdict(params) == {
        "max_tokens": 128, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
        "repetition_penalty": 1.0, "stop": (), "stop_token_ids": None, "ignore_eos": False,
        "seed": None, "logprobs": None,
    }  # fmt: skip
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 1
    with pytest.raises(TypeError):
        SamplingParams(128)


INTEGERS = {
    "max_tokens": (1, 2**31 - 1),
    "top_k": (0, 2**31 - 1),
    "seed": (0, 2**63 - 1),
    "logprobs": (0, MAX_LOGPROBS),
}
# name: (low, low allowed, high, high allowed)
NUMBERS = {
    "temperature": (0, True, 1e4, True),
    "top_p": (0, False, 1, True),
    "min_p": (0, True, 1, False),
    "repetition_penalty": (0, False, 1e4, True),
}
anything = st.one_of(
    st.integers(),
    st.integers(-5, 5),
    st.floats(),
    st.floats(-0.5, 1.5),
    st.booleans(),
    st.text(max_size=3),
    st.sampled_from([10**12, 10**400, -(10**400), 1 << 63, math.nan, math.inf, -math.inf]),
    st.sampled_from([np.int32(3), np.int64(-1), np.float32(0.5), np.float64("nan"), np.bool_(1)]),
    st.sampled_from([[], (1,), 1j, b"1", Fraction(1, 3), jnp.float32]),
)


def is_integer(x):
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


@pytest.mark.parametrize("name", INTEGERS)
@given(value=anything)
def test_integers_outside_their_range_are_refused(name, value):
    low, high = INTEGERS[name]
    if is_integer(value) and low <= value <= high:
        stored = getattr(SamplingParams(**{name: value}), name)
        assert type(stored) is int
        assert stored == value
    else:
        with pytest.raises(RequestError, match=f"{name} must be an integer from {low} to {high}"):
            SamplingParams(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@given(value=anything)
def test_numbers_outside_their_range_are_refused(name, value):
    low, low_allowed, high, high_allowed = NUMBERS[name]
    number = is_integer(value) or isinstance(value, (float, np.floating, Fraction))
    allowed = number and (
        low < value < high or (low_allowed and value == low) or (high_allowed and value == high)
    )
    if allowed:
        stored = getattr(SamplingParams(**{name: value}), name)
        assert type(stored) is float
        assert stored == pytest.approx(float(value))
    else:
        with pytest.raises(RequestError, match=f"{name} must be a number (from|above) 0 to"):
            SamplingParams(**{name: value})


@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS])
def test_ends_of_each_range(name):
    if name in INTEGERS:
        low, high = INTEGERS[name]
        inside, outside = [low, high], [low - 1, high + 1]
    else:
        low, low_allowed, high, high_allowed = NUMBERS[name]
        inside = [x for x, allowed in ((low, low_allowed), (high, high_allowed)) if allowed]
        outside = [math.nextafter(low, -1), math.nextafter(high, math.inf)]
        outside += [x for x in (low, high) if x not in inside]
    for value in inside:
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in outside:
        with pytest.raises(RequestError, match=f"{name} must be"):
            SamplingParams(**{name: value})


@pytest.mark.parametrize("value", [0, 1, None, "yes", np.bool_(True)], ids=repr)
def test_ignore_eos_is_a_bool(value):
    with pytest.raises(RequestError, match="ignore_eos must be True or False"):
        SamplingParams(ignore_eos=value)


def test_stop_strings_are_normalised():
    assert SamplingParams(stop="\n\n").stop == ("\n\n",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=("x",) * MAX_STOPS).stop == ("x",) * MAX_STOPS


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("", "stop must hold non-empty strings, found ''"),
        (["a", ""], "stop must hold non-empty strings, found ''"),
        (["a", 3], "stop must hold non-empty strings, found 3"),
        (b"ab", "stop must hold non-empty strings, found 97"),
        (None, "stop must be a sequence of strings, found None"),
        (5, "stop must be a sequence of strings, found 5"),
        (["x"] * (MAX_STOPS + 1), f"stop takes at most {MAX_STOPS} strings, found {MAX_STOPS + 1}"),
    ],
)
def test_bad_stop_strings_are_refused(stop, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(stop=stop)


def test_stop_token_ids_are_plain_integers():
    ids = SamplingParams(stop_token_ids=np.array([3, 5])).stop_token_ids
    assert ids == (3, 5)
    assert {type(x) for x in ids} == {int}
    assert SamplingParams(stop_token_ids=[]).stop_token_ids == ()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (7, "stop_token_ids must be a sequence of ids, found 7"),
        ([1, -1], "stop_token_ids must be an integer from 0 to 2147483647, found -1"),
        ([2**31], "stop_token_ids must be an integer"),
        ([1.0], "stop_token_ids must be an integer"),
        ([True], "stop_token_ids must be an integer"),
        ("12", "stop_token_ids must be an integer .* found '1'"),
    ],
)
def test_bad_stop_token_ids_are_refused(ids, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(stop_token_ids=ids)


def test_messages_stay_short():
    with pytest.raises(RequestError) as caught:
        SamplingParams(max_tokens=10**400)
    assert len(str(caught.value)) < 200
