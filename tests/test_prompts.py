"""Prompts of all accepted forms, and those that are refused."""

from __future__ import annotations

import collections

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from naive_llama import BOS, ChatTokenizer, ToyTokenizer

from jaxdecode.errors import RequestError
from jaxdecode.prompts import encode_prompts

V = 64
TALK = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
TALK_IDS = [BOS, 20, 0, 1, 0, 2, 26]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("ab", [[BOS, 0, 1]]),
        (["ab", "c"], [[BOS, 0, 1], [BOS, 2]]),
        ([3, 4], [[3, 4]]),
        ((3, 4), [[3, 4]]),
        (range(3), [[0, 1, 2]]),
        (np.array([3, 4], np.uint8), [[3, 4]]),
        (np.array([[3, 4], [5, 6]]), [[3, 4], [5, 6]]),
        ([[3], (4, 5), np.array([6])], [[3], [4, 5], [6]]),
        ([np.int64(3), 4], [[3, 4]]),
        ([0, V - 1], [[0, V - 1]]),
        (TALK, [TALK_IDS]),
        ([TALK], [TALK_IDS]),
        (["a", [7, 8], TALK], [[BOS, 0], [7, 8], TALK_IDS]),
    ],
    ids=str,
)
def test_accepted_forms(prompts, expected):
    encoded = encode_prompts(ChatTokenizer(), prompts, V)
    assert encoded == expected
    assert {type(x) for ids in encoded for x in ids} == {int}


def test_ids_need_no_tokenizer():
    assert encode_prompts(None, [[1, 2], [3]], V) == [[1, 2], [3]]


FORMS = r"must be a str, a list of \{'role', 'content'\} or a list of token ids, found"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts is empty; give at least one prompt"),
        ((), "prompts is empty"),
        ([[]], "prompt 0 has no tokens; give at least one"),
        (np.array([], np.int32), "prompt 0 has no tokens"),
        ([[1], []], "prompt 1 has no tokens"),
        (None, "a prompt is a str, .* found NoneType"),
        (5, "a prompt is a str, .* found int"),
        (b"ab", "a prompt is a str, .* found bytes"),
        ({"role": "user"}, "a prompt is a str, .* found dict"),
        (np.array(3), "a prompt is a str, .* found ndarray"),
        (iter([1]), "a prompt is a str, .* found list_iterator"),
        ([b"ab"], f"prompt 0 {FORMS} bytes"),
        ([None], f"prompt 0 {FORMS} NoneType"),
        ([1.0], f"prompt 0 {FORMS} float"),
        ([[1.0]], f"prompt 0 {FORMS} list"),
        ([True, False], f"prompt 0 {FORMS} bool"),
        ([[1], [True]], f"prompt 1 {FORMS} list"),
        ([1, "a"], f"prompt 0 {FORMS} int"),
        ([1, {"role": "user"}], f"prompt 0 {FORMS} list"),
        (np.zeros((1, 2)), f"prompt 0 {FORMS} ndarray"),
        ([[[1]]], f"prompt 0 {FORMS} list"),
        ([64], "prompt 0 has token id 64, outside the model's vocabulary of 64"),
        ([[1], [2, -1, 99]], "prompt 1 has token id -1, outside the model's vocabulary of 64"),
        ([10**30], "prompt 0 has token id 1000000000000000000000000000000, outside"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_refused_forms_are_named(prompts, message):
    with pytest.raises(RequestError, match=message):
        encode_prompts(ToyTokenizer(), prompts, V)


def test_text_needs_a_tokenizer_and_a_conversation_a_template():
    with pytest.raises(RequestError, match="prompt 0 is a str, which needs a tokenizer"):
        encode_prompts(None, "a", V)
    with pytest.raises(RequestError, match="prompt 1 is a conversation, which needs a tokenizer"):
        encode_prompts(None, [[1], TALK], V)
    message = "prompt 0 is a conversation, and this tokenizer has no apply_chat_template"
    with pytest.raises(RequestError, match=message):
        encode_prompts(ToyTokenizer(), TALK, V)


def test_a_tokenizer_with_more_ids_than_the_model_is_caught():
    with pytest.raises(RequestError, match="the tokenizer and the model do not belong together"):
        encode_prompts(ToyTokenizer(), "a9", 61)


def test_text_that_continues_gets_no_second_beginning():
    prompts = ["ab", "ab", [BOS, 3], TALK]
    encoded = encode_prompts(ChatTokenizer(), prompts, V, filled=[0, 5, 5, 5])
    assert encoded == [[BOS, 0, 1], [0, 1], [BOS, 3], TALK_IDS[1:]]
    with pytest.raises(RequestError, match="prompt 0 has no tokens"):
        encode_prompts(ToyTokenizer(), "", V, filled=[5])


def test_a_tokenizer_without_a_beginning_loses_nothing():
    plain = collections.namedtuple("Plain", "encode")(lambda text: [1, 2])
    assert encode_prompts(plain, ["x"], V, filled=[5]) == [[1, 2]]


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 70)
    | st.floats()
    | st.text(max_size=2)
    | st.binary(max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=6,
)


@given(junk)
def test_anything_else_is_refused_or_encoded(prompts):
    try:
        encoded = encode_prompts(None, prompts, V)
    except RequestError:
        return
    assert encoded
    assert all(ids and all(0 <= x < V for x in ids) for ids in encoded)
