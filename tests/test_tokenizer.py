"""What every tokenizer does, wherever it comes from: encode, decode, check, write a chat."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import SENTENCEPIECE, SMOLLM2, words, write_directory
from tokenizers import models

from jaxdecode.errors import RequestError, TokenizerError
from jaxdecode.tokenizer import Tokenizer, library_errors


@pytest.fixture(scope="module")
def smollm2():
    return Tokenizer.from_gguf_metadata(SMOLLM2["metadata"])


@pytest.fixture(scope="module")
def sentencepiece():
    return Tokenizer.from_gguf_metadata(SENTENCEPIECE["metadata"])


def test_vocab_size_reaches_the_largest_id(tmp_path):
    text = words("<unk>", "a").to_str().replace('"a":1', '"a":70000')
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path, tokenizer__json=text))
    assert tokenizer.vocab_size == 70_001


def test_errors_of_the_library_are_ours(tmp_path):
    # A post-processor that names a token it does not define: a panic in Rust.
    text = words("<unk>", "<s>", "a", bos="<s>").to_str().replace('"<s>":{', '"<t>":{')
    with pytest.raises(TokenizerError, match=r"is damaged or no tokenizer file.*no entry found"):
        Tokenizer.from_directory(write_directory(tmp_path, tokenizer__json=text))
    no_unknown = tokenizers.Tokenizer(models.WordLevel({"a": 0}))
    with pytest.raises(TokenizerError, match=r"cannot encode this text: .*[Mm]issing"):
        Tokenizer(no_unknown).encode("b")


def test_an_interrupt_is_no_error_of_the_library():
    with pytest.raises(KeyboardInterrupt), library_errors("x"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("bad", [-1, 1220, 2**31, 2**70])
def test_decoding_ids_outside_the_vocabulary(bad, smollm2):
    with pytest.raises(RequestError, match=rf"token id {bad} is not in .* of 1220 tokens"):
        smollm2.decode([1, bad])


def test_only_valid_text_can_be_encoded(smollm2):
    with pytest.raises(RequestError, match="must be a str, found bytes"):
        smollm2.encode(b"x")
    with pytest.raises(RequestError, match="half of a surrogate pair at character 2"):
        smollm2.encode("ab\ud83d")


def test_special_ids_of_another_vocabulary_are_refused():
    with pytest.raises(TokenizerError, match="bos_id 9 is no token"):
        Tokenizer(words("<unk>", "a"), bos_id=9)
    with pytest.raises(TokenizerError, match="eos_ids 3 is no token"):
        Tokenizer(words("<unk>", "a"), eos_ids=[1, 3])


@settings(derandomize=True, max_examples=300)
@given(st.text(max_size=40))
def test_text_survives_encoding_and_decoding(text):
    tokenizer = Tokenizer.from_gguf_metadata(SENTENCEPIECE["metadata"])
    if "▁" in text or any(name in text for name in ("<s>", "</s>", "<unk>")):
        return
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("golden", [SMOLLM2, SENTENCEPIECE])
def test_more_ids_never_change_the_text_before(golden):
    @settings(derandomize=True, max_examples=300)
    @given(st.lists(st.integers(0, len(golden["metadata"]["tokenizer.ggml.tokens"]) - 1)))
    def check(ids):
        whole = tokenizer.decode(ids)
        for n in range(len(ids)):
            assert whole.startswith(tokenizer.decode(ids[:n]).rstrip("\ufffd"))

    tokenizer = Tokenizer.from_gguf_metadata(golden["metadata"])
    check()


def test_every_bad_byte_is_judged_alone(sentencepiece):
    face = [3 + byte for byte in "🥲".encode()]
    assert sentencepiece.decode([*face, *face[:2]]) == "🥲\ufffd\ufffd"
    # Bytes that spell the name of a byte token are text.
    assert sentencepiece.decode([3 + byte for byte in b"<0x41>"]) == "<0x41>"


def test_a_template_that_writes_bos_gives_one_bos(tmp_path):
    backend = words("<unk>", "<s>", "</s>", "a", bos="<s>")
    backend.add_special_tokens(["<s>", "</s>"])
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    for template, expected in [
        ("{{ bos_token }} {{ messages[0].content }}{{ eos_token }}", [1, 3, 2]),
        ("{{ messages[0].content }}{{ '?' if add_generation_prompt }}", [0]),
        ("{{ bos_token }}{{ bos_token }}{{ messages[0].content }}", [1, 3]),
    ]:
        write_directory(
            tmp_path, backend, tokenizer_config__json=config | {"chat_template": template}
        )
        tokenizer = Tokenizer.from_directory(tmp_path)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}]) == expected
    answer = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=False
    )
    assert answer == [1, 3]


def test_smollm2_chat(smollm2):
    ids = smollm2.apply_chat_template([{"role": "user", "content": "Hi"}])
    text = smollm2.backend.decode(ids, skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert ids.count(smollm2.bos_id) == 3
