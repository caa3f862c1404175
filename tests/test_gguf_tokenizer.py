"""Tokenizers from GGUF metadata give the tokens that their makers' own programs give."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import SENTENCEPIECE, SMOLLM2
from tokenizers import pre_tokenizers

from jaxdecode import gguf_tokenizer
from jaxdecode.errors import TokenizerError
from jaxdecode.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def smollm2():
    return Tokenizer.from_gguf_metadata(SMOLLM2["metadata"])


@pytest.fixture(scope="module")
def sentencepiece():
    return Tokenizer.from_gguf_metadata(SENTENCEPIECE["metadata"])


def test_smollm2_gives_the_tokens_of_transformers(smollm2):
    assert len(SMOLLM2["cases"]) >= 200
    full_ids = SMOLLM2["full_ids"]
    for case in SMOLLM2["cases"]:
        ids = smollm2.encode(case["text"])
        assert [full_ids[i] for i in ids] == case["ids"], case["text"]
        assert smollm2.decode(ids) == case["decoded"], case["text"]
    assert sum("needs_digit_rule" in case for case in SMOLLM2["cases"]) >= 10


def test_smollm2_special_tokens(smollm2):
    names = {i: smollm2.backend.id_to_token(i) for i in (smollm2.bos_id, *smollm2.eos_ids)}
    assert list(names.values()) == ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    assert smollm2.decode([*smollm2.encode("hi"), *smollm2.eos_ids]) == "hi"
    assert "<|im_start|>" in smollm2.chat_template


def test_sentencepiece_gives_the_tokens_of_sentencepiece(sentencepiece):
    encoded = [case for case in SENTENCEPIECE["cases"] if "text" in case]
    assert len(encoded) >= 200
    for case in encoded:
        ids = sentencepiece.encode(case["text"], add_special_tokens=False)
        assert ids == case["ids"], case["text"]
    for case in SENTENCEPIECE["cases"]:
        assert sentencepiece.decode(case["ids"]) == case["decoded"], case["ids"]
    assert any(3 <= i < 259 for case in encoded for i in case["ids"])  # bytes


def test_sentencepiece_special_tokens(sentencepiece):
    assert (sentencepiece.bos_id, sentencepiece.eos_ids) == (1, (2,))
    assert sentencepiece.encode("the")[0] == 1  # by default, as llama.cpp does
    assert sentencepiece.decode([1, *sentencepiece.encode("the"), 2]) == "the"
    # As for any tokenizer of this kind: names of special tokens in a text are those tokens.
    assert sentencepiece.encode("</s>", add_special_tokens=False) == [2]


def sentencepiece_metadata(pieces):
    """`pieces`, best first, as a SentencePiece model with bytes."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 257 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [2] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.add_space_prefix": False,
    }


def joined_by_score(text, pieces):
    """What SentencePiece does: join the best neighbours, of equal ones the leftmost."""
    parts = list(text)
    while True:
        unions = [a + b for a, b in itertools.pairwise(parts)]
        ranks = [pieces.index(union) if union in pieces else len(pieces) for union in unions]
        best = min(ranks, default=len(pieces))
        if best == len(pieces):
            return parts
        at = ranks.index(best)
        parts[at : at + 2] = [unions[at]]


@settings(derandomize=True, max_examples=500)
@given(
    st.permutations(
        [w for n in (2, 3, 4) for w in map("".join, itertools.product("ab", repeat=n))]
    ),
    st.integers(0, 28),
    st.text("ab", max_size=16),
)
def test_merges_from_scores_are_those_of_sentencepiece(longer, count, text):
    pieces = [*longer[:count], "a", "b"]
    tokenizer = Tokenizer.from_gguf_metadata(sentencepiece_metadata(pieces))
    assert tokenizer.backend.encode(text).tokens == joined_by_score(text, pieces)


def test_text_that_spells_a_byte_token_is_text():
    pieces = ["<0", "x4", "<0x4", "1>", *"<0x41>"]
    tokenizer = Tokenizer.from_gguf_metadata(sentencepiece_metadata(list(dict.fromkeys(pieces))))
    assert tokenizer.backend.encode("<0x41>").tokens == ["<0x4", "1>"]
    assert tokenizer.decode(tokenizer.encode("<0x41>")) == "<0x41>"


def test_sentencepiece_flags():
    meta = SENTENCEPIECE["metadata"] | {
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = Tokenizer.from_gguf_metadata(meta)
    ids = tokenizer.encode("the")
    assert ids[-1] == 2
    assert "".join(map(tokenizer.backend.id_to_token, ids[:-1])) == "the"
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


def byte_level_metadata(*more, **keys):
    """A vocabulary of the 256 bytes and `more`; keys are written without "tokenizer.ggml."."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *more]
    if "merges" not in keys:
        tokens.append("ab")
    meta = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b"],
    }
    meta |= {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    return {key: value for key, value in meta.items() if value is not None}


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("default", "12345 it's!", ["123", "45", " it", "'", "s", "!"]),
        ("gpt-2", "12345 it's  a!\n\nb", ["12345", " it", "'s", " ", " a", "!", "\n", "\n", "b"]),
        ("smollm", "a  12 it's", ["a", "  ", "1", "2", " it", "'s"]),
        ("smollm", "a\U00016ff4\U00016ff5", ["a", "\U00016ff4", "\U00016ff5"]),  # new digits
        ("llama-bpe", "12345 IT'S\n\n .a", ["123", "45", " IT", "'S", "\n\n", " .", "a"]),
        ("llama3", "x.y(z)", ["x", ".y", "(z", ")"]),
        ("dbrx", "1234", ["123", "4"]),
        ("qwen2", "123 it's\n\n b", ["1", "2", "3", " it", "'s", "\n\n", " b"]),
        ("tekken", "CamelCase12 ABc", ["Camel", "Case", "1", "2", " ABc"]),
        ("deepseek-coder", "f(x)\n12 日本y z", [*"f(x)\n12", " ", "日本", "y", " z"]),
    ],
)
def test_text_is_cut_into_words_as_the_model_expects(pre, text, expected):
    tokenizer = Tokenizer.from_gguf_metadata(byte_level_metadata(pre=pre))
    cuts = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cuts] == expected
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_known_way_of_cutting_is_valid():
    for name in gguf_tokenizer._PRE_TOKENIZERS:
        tokenizer = Tokenizer.from_gguf_metadata(byte_level_metadata(pre=name))
        assert tokenizer.decode(tokenizer.encode("it's 1 日本\n")) == "it's 1 日本\n"


def test_llama3_takes_whole_words_and_begins_with_bos():
    meta = byte_level_metadata("he", "hello", merges=["h e"], pre="llama-bpe", bos_token_id=257)
    tokens = meta["tokenizer.ggml.tokens"]
    h, e, n = (tokens.index(c) for c in "hen")
    tokenizer = Tokenizer.from_gguf_metadata(meta)
    assert tokenizer.encode("hello") == [257, 257]
    assert tokenizer.encode("hen", add_special_tokens=False) == [256, n]
    plain = Tokenizer.from_gguf_metadata(meta | {"tokenizer.ggml.pre": "dbrx"})
    assert plain.encode("hello")[0] == 256
    without = meta | {"tokenizer.ggml.add_bos_token": False}
    assert Tokenizer.from_gguf_metadata(without).encode("he") == [256]
    assert h != e


def test_token_types_of_gguf():
    types = [1] * 256 + [3, 4, 3, 1, 1]  # the last two: no control tokens
    meta = byte_level_metadata(
        "<|eot_id|>", "   ", "<|end|>", "<EOT>", pre="gpt-2", token_type=types, eos_token_id=258
    )
    tokenizer = Tokenizer.from_gguf_metadata(meta)
    assert tokenizer.encode("a   <|eot_id|>b")[1:3] == [257, 256]
    assert tokenizer.decode(tokenizer.encode("a   <|eot_id|>b")) == "a   b"
    assert tokenizer.eos_ids == (258, 256)
    assert tokenizer.bos_id is None
    declared = meta | {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 6}
    assert Tokenizer.from_gguf_metadata(declared).eos_ids == (258, 5, 6, 256)


def test_old_files_do_not_declare_the_ids():
    meta = {
        key: value
        for key, value in SENTENCEPIECE["metadata"].items()
        if not key.endswith("_token_id")
    }
    tokenizer = Tokenizer.from_gguf_metadata(meta)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert tokenizer.encode("the")[0] == 1


def test_sentencepiece_merges_may_be_listed():
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁ab"]
    meta = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b", "▁ ab"],
    }
    tokenizer = Tokenizer.from_gguf_metadata(meta)
    assert tokenizer.encode("ab") == [1, 7]
    assert tokenizer.encode("xyz") == [1, 3, 0]  # no bytes to fall back on: one <unk>
    meta = meta | {"tokenizer.ggml.token_type": [1] * 8, "tokenizer.ggml.unknown_token_id": 0}
    assert Tokenizer.from_gguf_metadata(meta).encode("x")[-1] == 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": None}, "ggml.model is None"),
        ({"model": "bert"}, "ggml.model is 'bert'.*knows 'gpt2'"),
        ({"pre": "klingon"}, "ggml.pre is 'klingon'.*llama-bpe.*smollm.*Hugging Face"),
        ({"tokens": None}, "ggml.tokens must be a list, found NoneType"),
        ({"tokens": []}, "ggml.tokens has 0 entries; 1 to"),
        ({"tokens": ["a", 1]}, r"ggml.tokens\[1\] must be of type str, found 1"),
        ({"tokens": ["a", "b", "ab", "a"]}, r"lists 'a' twice \(ids 0 and 3\)"),
        ({"tokens": ["a" * 1025]}, "a token of 1025 characters"),
        ({"tokens": ["a"] * ((1 << 20) + 1)}, "1048577 entries; 1 to 1048576"),
        ({"token_type": [1, 1]}, "token_type has 2 entries, but tokenizer.ggml.tokens has 257"),
        ({"token_type": [1.0] * 257}, r"token_type\[0\] must be of type int, found 1.0"),
        ({"merges": None}, "merges must be a list, found NoneType"),
        ({"merges": ["ab"]}, "merges has 'ab', which is not two tokens"),
        ({"merges": ["a b c"]}, "merges has 'a b c', which is not two tokens"),
        ({"merges": ["a c"]}, "merges has 'a c', which is not two tokens"),
        ({"bos_token_id": 257}, r"bos_token_id is 257; .*257 token ids"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eot_token_id": True}, "eot_token_id is True"),
        ({"add_bos_token": 1}, "add_bos_token must be true or false, found 1"),
    ],
)
def test_damaged_gguf_metadata_is_refused(changes, match):
    meta = byte_level_metadata(**{"pre": "gpt-2"} | changes)
    with pytest.raises(TokenizerError, match=match):
        Tokenizer.from_gguf_metadata(meta)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"scores": None}, "scores must be a list, found NoneType"),
        ({"scores": [0.0] * 3}, "scores has 3 entries, but tokenizer.ggml.tokens has 1000"),
        ({"scores": [float("nan")] * 1000}, "scores must be finite, found nan"),
        ({"unknown_token_id": 1000}, "unknown_token_id is 1000"),
        ({"add_space_prefix": "yes"}, "add_space_prefix must be true or false"),
    ],
)
def test_damaged_sentencepiece_metadata_is_refused(changes, match):
    changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(TokenizerError, match=match):
        Tokenizer.from_gguf_metadata(SENTENCEPIECE["metadata"] | changes)


def test_chat_template_of_gguf_must_be_text():
    meta = byte_level_metadata() | {"tokenizer.chat_template": ["x"]}
    with pytest.raises(TokenizerError, match="chat_template must be a string, found list"):
        Tokenizer.from_gguf_metadata(meta)


@settings(derandomize=True, max_examples=200)
@given(st.data())
def test_any_gguf_metadata_loads_or_is_refused(data):
    meta = dict(data.draw(st.sampled_from([SENTENCEPIECE["metadata"], byte_level_metadata()])))
    junk = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 2**70),
        st.floats(),
        st.text(max_size=3),
        st.lists(st.one_of(st.text(max_size=2), st.integers(-9, 9), st.floats()), max_size=4),
    )
    for key in data.draw(st.lists(st.sampled_from(sorted(meta)), max_size=3)):
        value = meta[key]
        if isinstance(value, list) and value and data.draw(st.booleans()):
            value = list(value)
            value[data.draw(st.integers(0, len(value) - 1))] = data.draw(junk)
            meta[key] = value
        else:
            meta[key] = data.draw(junk)
    try:
        tokenizer = Tokenizer.from_gguf_metadata(meta)
    except TokenizerError:
        return
    tokenizer.decode(tokenizer.encode("some text"))


def test_a_full_vocabulary_loads_in_under_a_second():
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [a + b for a in letters for b in letters]
    quads = [p + q for p in pairs for q in pairs[:72]]
    merges = [f"{p[0]} {p[1]}" for p in pairs] + [f"{q[:2]} {q[2:]}" for q in quads]
    meta = byte_level_metadata(*pairs, *quads, merges=merges, pre="smollm")
    assert len(meta["tokenizer.ggml.tokens"]) > 49_000
    start = time.process_time()
    tokenizer = Tokenizer.from_gguf_metadata(meta)
    assert time.process_time() - start < 1
    assert len(tokenizer.encode("abab")) == 1
