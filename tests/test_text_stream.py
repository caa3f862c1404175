"""Text that comes token by token is the text that comes at once, cut at the first stop string."""

from __future__ import annotations

import random

import pytest
import tokenizer_cases
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from jaxdecode.errors import RequestError
from jaxdecode.text_stream import TextStream, find_stop
from jaxdecode.tokenizer import Tokenizer

WRONG = "\ufffd"


BYTE_LEVEL = Tokenizer.from_gguf_metadata(tokenizer_cases.SMOLLM2["metadata"])
SENTENCEPIECE = Tokenizer.from_gguf_metadata(tokenizer_cases.SENTENCEPIECE["metadata"])
TOKENIZERS = {"byte level": BYTE_LEVEL, "sentencepiece": SENTENCEPIECE}
# Tokens of one byte each are what splits characters; special ones are left out when decoding.
BYTES = {
    "byte level": [i for i in range(BYTE_LEVEL.vocab_size) if len(BYTE_LEVEL.decode([i, i])) == 2],
    "sentencepiece": list(range(3, 259)),
}
# A byte that continues a character, and never begins one.
UNDECODABLE = {"byte level": BYTE_LEVEL.backend.token_to_id("Ģ"), "sentencepiece": 3 + 0x80}
TEXTS = [
    "naïve café",
    "日本語 and 한국어",
    "😀😁😂🤣 👨‍👩‍👧",
    "   a  b   ",
    "it's 12345!\n\n",
    f"a{WRONG}b{WRONG}",
]

thorough = settings(derandomize=True, max_examples=400)


def cut(text, stop):
    """The definition: the stop string that is complete first, and the longest of those."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@st.composite
def token_ids(draw, name):
    """Ids of random kinds: any at all, single bytes, special ones, and those of real text."""
    tokenizer = TOKENIZERS[name]
    anything = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12)
    single_bytes = st.lists(st.sampled_from(BYTES[name]), max_size=12)
    special = st.lists(st.sampled_from(sorted(tokenizer._special_ids)), max_size=3)
    text = st.one_of(st.sampled_from(TEXTS), st.text(max_size=8))
    real = text.map(lambda t: tokenizer.encode(t, add_special_tokens=False))
    parts = draw(st.lists(st.one_of(anything, single_bytes, special, real), max_size=6))
    return [i for part in parts for i in part]


@st.composite
def ids_and_stops(draw):
    """A tokenizer's name, ids, and stop strings of which most occur in the text."""
    name = draw(st.sampled_from(sorted(TOKENIZERS)))
    ids = draw(token_ids(name))
    text = TOKENIZERS[name].decode(ids)
    position = st.integers(0, max(0, len(text) - 1))
    inside = st.tuples(position, st.integers(1, 6)).map(lambda p: text[p[0] : p[0] + p[1]])
    stops = st.lists(st.one_of(inside, inside, st.text(max_size=3)), max_size=3)
    return name, ids, tuple(s for s in draw(stops) if s)


def run(tokenizer, ids, stop=(), prompt_ids=()):
    """The pieces of text, the last being `finish`'s, and the stream."""
    stream = TextStream(tokenizer.decode, stop, prompt_ids)
    pieces = []
    for token_id in ids:
        if stream.stopped:
            break
        pieces.append(stream.push(token_id))
    return [*pieces, stream.finish()], stream


@thorough
@given(ids_and_stops())
@example(("sentencepiece", [3 + b for b in "日本".encode()], ("本",)))
@example(("byte level", BYTE_LEVEL.encode("😀😁"), ("😁",)))
def test_pieces_are_the_whole_text_up_to_the_first_stop(case):
    name, ids, stop = case
    tokenizer = TOKENIZERS[name]
    pieces, stream = run(tokenizer, ids, stop)
    whole = tokenizer.decode(ids)
    assert "".join(pieces) == stream.text == cut(whole, stop)
    assert stream.stopped == (cut(whole, stop) != whole) == any(s in whole for s in stop)


@thorough
@given(ids_and_stops())
def test_the_stop_is_found_at_the_token_that_completes_it(case):
    name, ids, stop = case
    stop = tuple(s for s in stop if WRONG not in s)  # such a one may still become a character
    tokenizer = TOKENIZERS[name]
    _, stream = run(tokenizer, ids, stop)
    expected = next(
        (n for n in range(1, len(ids) + 1) if find_stop(tokenizer.decode(ids[:n]), stop)), None
    )
    assert stream.stop_tokens == expected
    assert stream.num_tokens == (len(ids) if expected is None else expected)


@thorough
@given(ids_and_stops())
def test_nothing_uncertain_is_given_out(case):
    name, ids, stop = case
    tokenizer = TOKENIZERS[name]
    stream = TextStream(tokenizer.decode, stop)
    for n, token_id in enumerate(ids, 1):
        if stream.stopped:
            break
        stream.push(token_id)
        now = tokenizer.decode(ids[:n])
        assert now.startswith(stream.text)
        if not stream.stopped:
            certain = now[:-3] + now[-3:].rstrip(WRONG)
            begun = (certain[i:] for i in range(min(len(certain), len(stream.text))))
            assert not any(s.startswith(end) for end in begun for s in stop)


@thorough
@given(st.sampled_from(sorted(TOKENIZERS)), st.text(max_size=30))
def test_half_a_character_is_never_given_out(name, text):
    tokenizer = TOKENIZERS[name]
    pieces, _ = run(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    # These characters are not in the vocabulary, or are U+FFFD themselves.
    if tokenizer.decode(tokenizer.encode(text)).count(WRONG) == 0:
        assert not any(WRONG in piece for piece in pieces)


@thorough
@given(ids_and_stops(), st.data())
def test_text_after_a_prompt_is_what_the_ids_add_to_it(case, data):
    name, ids, _ = case
    tokenizer = TOKENIZERS[name]
    prompt = data.draw(token_ids(name))
    before = tokenizer.decode(prompt)
    if before.endswith(WRONG):
        return  # the prompt's last character is completed by the first ids: see below
    pieces, _ = run(tokenizer, ids, prompt_ids=prompt)
    assert "".join(pieces) == tokenizer.decode(prompt + ids)[len(before) :]


@settings(derandomize=True, max_examples=50)
@given(st.sampled_from(sorted(TOKENIZERS)), st.data())
def test_every_id_is_shown_after_a_few_more(name, data):
    """The hold-back is bounded, by three undecodable bytes, even for endless undecodable ones."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.sampled_from(BYTES[name]), min_size=1, max_size=300))
    stream = TextStream(tokenizer.decode)
    for n, token_id in enumerate(ids, 1):
        stream.push(token_id)
        assert len(tokenizer.decode(ids[:n])) - len(stream.text) <= 3


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@pytest.mark.parametrize("count", [*range(1, 70, 3), 1000])
def test_text_after_a_long_run_of_undecodable_bytes(name, count):
    tokenizer = TOKENIZERS[name]
    smile = tokenizer.encode("🥲", add_special_tokens=False)
    ids = [UNDECODABLE[name]] * count + smile[-3:] + smile * 2 + tokenizer.encode("end")
    pieces, _ = run(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_a_genuine_replacement_character_comes_out(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(f"a{WRONG}b", add_special_tokens=False)
    pieces, _ = run(tokenizer, ids)
    assert "".join(pieces[:-1]) == f"a{WRONG}b"  # without waiting for the end
    pieces, stream = run(tokenizer, ids[:-1])
    assert "".join(pieces) == f"a{WRONG}"
    assert pieces[-1] == WRONG
    assert not stream.stopped


def test_bytes_of_an_unfinished_character_come_at_the_end():
    stream = TextStream(SENTENCEPIECE.decode)
    euro = [3 + byte for byte in "€".encode()]
    assert [stream.push(i) for i in euro] == ["", "", "€"]
    assert [stream.push(i) for i in euro[:2]] == ["", ""]
    assert stream.finish() == WRONG * 2
    assert stream.finish() == ""
    assert stream.text == "€" + WRONG * 2


def test_sentencepiece_blanks():
    ids = SENTENCEPIECE.encode("the cat is", add_special_tokens=False)
    pieces, _ = run(SENTENCEPIECE, ids)
    assert "".join(pieces) == "the cat is"
    pieces, _ = run(SENTENCEPIECE, ids, prompt_ids=ids)
    assert "".join(pieces) == " the cat is"
    blank = SENTENCEPIECE.backend.token_to_id("▁")
    pieces, _ = run(SENTENCEPIECE, [blank, *ids])
    assert "".join(pieces) == " the cat is"
    # Special tokens are no text, so they do not use up the blank that is stripped.
    pieces, _ = run(SENTENCEPIECE, [1, 2, *ids, 2, *ids], prompt_ids=[1])
    assert "".join(pieces) == "the cat is the cat is"


def test_a_character_begun_in_the_prompt_is_finished():
    smile = [3 + byte for byte in "😀".encode()]
    pieces, _ = run(SENTENCEPIECE, smile[2:], prompt_ids=smile[:2])
    assert "".join(pieces) == "😀"


def test_stop_string_split_over_tokens_is_held_back():
    stream = TextStream(BYTE_LEVEL.decode, stop="STOP here")
    ids = BYTE_LEVEL.encode("go STO STOP here now")
    pieces = []
    while not stream.stopped:
        pieces.append(stream.push(ids[len(pieces)]))
    assert "".join(pieces) == "go STO "
    assert all("S" not in piece or "STO " in piece for piece in pieces)
    assert stream.stop_string == "STOP here"
    assert stream.stop_tokens == len(pieces) < len(ids)
    assert stream.finish() == ""


def test_a_possible_stop_that_does_not_come_is_given_out():
    stream = TextStream(BYTE_LEVEL.decode, stop=("</end>",))
    pieces = [stream.push(i) for i in BYTE_LEVEL.encode("a </en")]
    assert "".join(pieces) == "a "
    assert stream.finish() == "</en"
    assert not stream.stopped


def test_a_stop_string_of_undecodable_bytes_is_found_at_the_end():
    stream = TextStream(SENTENCEPIECE.decode, stop=WRONG)
    assert stream.push(3 + 0xE2) == ""
    assert not stream.stopped
    assert stream.finish() == ""
    assert stream.stopped
    assert stream.text == ""


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("xabcx", ("abc", "b"), (2, "b")),  # complete first
        ("xabcx", ("c", "abc"), (1, "abc")),  # complete together: the longest
        ("aab", ("ab",), (1, "ab")),
        ("abab", ("ab",), (0, "ab")),
        ("abc", ("x",), None),
        ("abc", (), None),
    ],
)
def test_first_stop_string(text, stop, expected):
    assert find_stop(text, stop) == expected
    start = len(text) if expected is None else expected[0]
    assert cut(text, stop) == text[:start]


def test_pushing_after_the_end_is_an_error():
    stream = TextStream(BYTE_LEVEL.decode, stop=("a",))
    stream.push(BYTE_LEVEL.encode("a")[0])
    with pytest.raises(RuntimeError, match="ended with a stop string"):
        stream.push(0)
    stream = TextStream(BYTE_LEVEL.decode)
    stream.finish()
    with pytest.raises(RuntimeError, match=r"ended with finish\(\)"):
        stream.push(0)


@pytest.mark.parametrize("stop", ["", ("a", "")])
def test_empty_stop_strings_are_refused(stop):
    with pytest.raises(RequestError, match="must not be empty"):
        TextStream(BYTE_LEVEL.decode, stop)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@pytest.mark.parametrize("kind", ["text", "bytes", "undecodable", "special"])
def test_work_per_token_does_not_grow(name, kind):
    tokenizer = TOKENIZERS[name]
    rng = random.Random(0)
    ids = {
        "text": rng.choices(range(tokenizer.vocab_size), k=2000),
        "bytes": rng.choices(BYTES[name], k=2000),
        "undecodable": [UNDECODABLE[name]] * 2000,
        "special": [tokenizer.eos_ids[0]] * 2000,
    }[kind]
    decoded = []

    def decode(some):
        decoded.append(len(some))
        return tokenizer.decode(some)

    stream = TextStream(decode, prompt_ids=ids)
    assert sum(decoded) < 200
    decoded.clear()
    for token_id in ids:
        stream.push(token_id)
    assert max(decoded) <= 33
    assert sum(decoded) <= 40 * len(ids)


def test_a_decoder_that_takes_back_whole_runs_of_bytes():
    """The tokenizers library does so: one unfinished character makes a run of bytes U+FFFD."""
    backend = tokenizers.Tokenizer.from_str(SENTENCEPIECE.backend.to_str())
    assert isinstance(backend.decoder, decoders.Sequence)
    text = "so 🥲🥰龍虎🥰😇鳳🙂亀🙃😉龍😌虎😍鳳🥰亀龍虎鳳亀🙃龍虎鳳 many 🥲 faces"
    ids = SENTENCEPIECE.encode(text, add_special_tokens=False)
    face = next(n for n in range(len(ids)) if SENTENCEPIECE.decode(ids[:n]) == "so 🥲")
    unfinished = ids[: face + 1]
    assert backend.decode(ids[:face]) == "so 🥲"
    assert backend.decode(unfinished) == "so " + WRONG * 5
    stream = TextStream(backend.decode)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == text
    assert not any(WRONG in piece for piece in pieces)
    # And one that never becomes a character does not stop the text.
    stream = TextStream(backend.decode)
    for token_id in [*unfinished, *SENTENCEPIECE.encode("and on", add_special_tokens=False)]:
        stream.push(token_id)
    assert stream.text.startswith("so 🥲")
    assert stream.text.endswith("and on")
