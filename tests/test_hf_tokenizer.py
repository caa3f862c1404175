"""Tokenizer files of a directory: read, written, and refused where they are damaged."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import SENTENCEPIECE, SMOLLM2, names_in, words, write_directory
from tokenizers import models

from jaxdecode import hf_tokenizer
from jaxdecode.errors import CheckpointError, TokenizerError
from jaxdecode.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def smollm2():
    return Tokenizer.from_gguf_metadata(SMOLLM2["metadata"])


@pytest.mark.parametrize("golden", [SMOLLM2, SENTENCEPIECE])
def test_what_is_saved_is_read_back_the_same(golden, tmp_path):
    tokenizer = Tokenizer.from_gguf_metadata(golden["metadata"])
    tokenizer.save(tmp_path / "new" / "directory")
    again = Tokenizer.from_directory(tmp_path / "new" / "directory")
    assert names_in(tmp_path / "new" / "directory") == ["tokenizer.json", "tokenizer_config.json"]
    for name in ("bos_id", "eos_ids", "vocab_size", "chat_template"):
        assert getattr(again, name) == getattr(tokenizer, name)
    for case in golden["cases"]:
        if "text" in case:
            assert again.encode(case["text"]) == tokenizer.encode(case["text"])
        ids = case["ids"] if golden is SENTENCEPIECE else tokenizer.encode(case["text"])
        assert again.decode(ids) == tokenizer.decode(ids)


def test_saving_replaces_what_is_there(tmp_path, smollm2):
    write_directory(tmp_path, tokenizer_config__json={"bos_token": "<s>"})
    smollm2.save(tmp_path)
    assert Tokenizer.from_directory(tmp_path).vocab_size == smollm2.vocab_size


def test_saving_where_it_cannot_be_done(tmp_path, smollm2):
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenizerError, match=r"cannot create .*file: File exists"):
        smollm2.save(tmp_path / "file")
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(TokenizerError, match=r"cannot write .*tokenizer.json: Is a directory"):
        smollm2.save(tmp_path)
    assert names_in(tmp_path) == ["file", "tokenizer.json"]


def test_a_full_disk_leaves_the_old_file(tmp_path, smollm2):
    old = (write_directory(tmp_path) / "tokenizer.json").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(TokenizerError, match=r"cannot write .*tokenizer.json: File too large"):
            smollm2.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(tmp_path) == ["tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_bytes() == old


def test_a_directory_without_tokenizer_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert Tokenizer.from_directory(tmp_path) is None


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "vocab.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_a_tokenizer_of_another_kind(name, tmp_path):
    (tmp_path / name).write_text("{}")
    tried = "tried: tokenizer.json, tokenizer_config.json, special_tokens_map.json"
    with pytest.raises(TokenizerError, match=rf"has {name} but no .*{tried}.*save_pretrained"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("config", "special"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, None),
        ({"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>", "lstrip": True}}, None),
        ({"bos_token": None, "eos_token": "</s>"}, {"bos_token": "<s>", "eos_token": "b"}),
        (None, {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}),
    ],
)
def test_special_tokens_of_a_directory(config, special, tmp_path):
    write_directory(tmp_path, tokenizer_config__json=config, special_tokens_map__json=special)
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), 5)
    assert tokenizer.encode("a b") == [1, 3, 4]
    assert tokenizer.encode("a b", add_special_tokens=False) == [3, 4]


@pytest.mark.parametrize("has_bos", [True, False])
@pytest.mark.parametrize("flag", [True, False, None, "yes"])
def test_add_bos_token_overrules_the_post_processor(has_bos, flag, tmp_path):
    backend = words("<unk>", "<s>", "</s>", "a", bos="<s>" if has_bos else None)
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": flag}
    write_directory(tmp_path, backend, tokenizer_config__json=config)
    wanted = flag if isinstance(flag, bool) else has_bos
    assert Tokenizer.from_directory(tmp_path).encode("a") == ([1, 3] if wanted else [3])


def test_add_eos_token(tmp_path):
    config = {"eos_token": "</s>", "add_eos_token": True}
    backend = words("<unk>", "<s>", "</s>", "a")
    write_directory(tmp_path, backend, tokenizer_config__json=config)
    assert Tokenizer.from_directory(tmp_path).encode("a") == [3, 2]


def test_truncation_and_padding_left_in_a_file_do_nothing(tmp_path):
    backend = words("<unk>", "a")
    backend.enable_truncation(2)
    backend.enable_padding(length=9, pad_id=1)
    write_directory(tmp_path, backend)
    assert Tokenizer.from_directory(tmp_path).encode("a a a") == [1, 1, 1]


@pytest.mark.parametrize(
    ("config", "jinja", "expected"),
    [
        ({}, None, None),
        ({"chat_template": TEMPLATE}, None, TEMPLATE),
        ({"chat_template": "old"}, TEMPLATE, TEMPLATE),
        ({"chat_template": [{"name": "tool", "template": "x"}]}, None, "x"),
        (
            {
                "chat_template": [
                    {"name": "tool", "template": "x"},
                    {"name": "default", "template": TEMPLATE},
                ]
            },
            None,
            TEMPLATE,
        ),
        ({"chat_template": {"default": TEMPLATE, "tool": "x"}}, None, TEMPLATE),
        ({"chat_template": {"rag": "y", "tool": "x"}}, None, None),
    ],
)
def test_chat_template_of_a_directory(config, jinja, expected, tmp_path):
    write_directory(tmp_path, tokenizer_config__json=config, chat_template__jinja=jinja)
    assert Tokenizer.from_directory(tmp_path).chat_template == expected


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"tokenizer__json": ""}, "tokenizer.json is damaged or no tokenizer file"),
        (
            {"tokenizer__json": "{}"},
            "damaged.*download it again, with tokenizer_config.json and spec",
        ),
        ({"tokenizer__json": "[" * 100_000}, "tokenizer.json is damaged"),
        ({"tokenizer__json": "<html>not found</html>"}, "tokenizer.json is damaged"),
        ({"tokenizer__json": "version https://git-lfs.github.com/spec/v1"}, "git lfs pull"),
        ({"tokenizer_config__json": "{"}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config__json": "[" * 100_000}, "tokenizer_config.json is not valid JSON"),
        ({"tokenizer_config__json": "[]"}, "tokenizer_config.json must hold a JSON object.*list"),
        ({"special_tokens_map__json": "3"}, "special_tokens_map.json must hold.*found int"),
        ({"tokenizer_config__json": {"bos_token": 7}}, "bos_token must be a string, found 7"),
        ({"tokenizer_config__json": {"eos_token": "<x>"}}, "eos_token '<x>' is not in the vocab"),
        ({"special_tokens_map__json": {"eos_token": "<x>"}}, "tokens_map.json: eos_token '<x>'"),
        ({"tokenizer_config__json": {"eos_ids": [1, "2"]}}, "eos_ids must be a list of token ids"),
        ({"tokenizer_config__json": {"eos_ids": [5]}}, "eos_ids 5 is no token of this vocabulary"),
        ({"tokenizer_config__json": {"chat_template": 1}}, "chat_template must be a string.*int"),
        (
            {"tokenizer_config__json": {"chat_template": [{"name": "default", "template": 1}]}},
            "chat_template must be a string.*int",
        ),
    ],
)
def test_damaged_files_are_named(files, match, tmp_path):
    write_directory(tmp_path, **files)
    with pytest.raises(TokenizerError, match=match) as caught:
        Tokenizer.from_directory(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value, CheckpointError)


def test_files_that_are_no_text_or_no_files(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_bytes(b'{"\xff"}')
    with pytest.raises(TokenizerError, match=r"tokenizer.json is not UTF-8 text \(byte 2\)"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(TokenizerError, match="is not a plain file"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").rmdir()
    os.mkfifo(tmp_path / "tokenizer.json")  # reading it would wait for ever
    with pytest.raises(TokenizerError, match="is not a plain file"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "No")))
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(TokenizerError, match=r"cannot read .*tokenizer.json: No"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("name", sorted(hf_tokenizer._MAX_BYTES))
def test_giant_files_are_not_read(name, tmp_path, monkeypatch):
    monkeypatch.setitem(hf_tokenizer._MAX_BYTES, name, 3 << 20)
    write_directory(tmp_path)
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(TokenizerError, match=f"{name} is larger than 3 MB"):
        Tokenizer.from_directory(tmp_path)


def test_empty_vocabulary(tmp_path):
    write_directory(tmp_path, tokenizers.Tokenizer(models.BPE()))
    with pytest.raises(TokenizerError, match="empty vocabulary"):
        Tokenizer.from_directory(tmp_path)


@settings(derandomize=True, max_examples=300)
@given(st.data())
def test_any_tokenizer_json_loads_or_is_refused(data):
    text = words("<unk>", "<s>", "a", bos="<s>").to_str()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 12)))
    values = st.sampled_from(["-1", "1e99", "null", "[]"])
    middle = data.draw(st.one_of(st.text(max_size=4), values))
    try:
        backend = hf_tokenizer._parse_backend(Path("x"), text[:start] + middle + text[end:])
    except TokenizerError:
        return
    tokenizer = Tokenizer(backend)
    with contextlib.suppress(TokenizerError):  # a vocabulary without an unknown token, say
        tokenizer.decode(tokenizer.encode("a b"))
