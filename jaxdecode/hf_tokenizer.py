"""Tokenizer files of a Hugging Face model directory: reading and writing.

Everything read here is untrusted. File names are fixed, sizes are capped, and JSON values are
checked for their type before use.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import tokenizers

from jaxdecode.errors import TokenizerError
from jaxdecode.tokenizer import Tokenizer, library_errors, set_affixes

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_FOREIGN_FILES = ("tokenizer.model", "vocab.json")
_MAX_BYTES = {
    "tokenizer.json": 128 << 20,
    "tokenizer_config.json": 16 << 20,
    "special_tokens_map.json": 1 << 20,
    "chat_template.jinja": 1 << 20,
}


def read_directory(path: Path) -> Tokenizer | None:
    """See `Tokenizer.from_directory`."""
    text = _read_text(path / "tokenizer.json")
    if text is None:
        _refuse_other_formats(path)
        return None
    backend = _parse_backend(path / "tokenizer.json", text)
    config = _read_json_object(path / "tokenizer_config.json")
    special = _read_json_object(path / "special_tokens_map.json")
    bos_id = _special_id(path, backend, config, special, "bos_token")
    eos_id = _special_id(path, backend, config, special, "eos_token")
    _follow_config_flags(backend, config, bos_id, eos_id)
    try:
        return Tokenizer(
            backend,
            bos_id=bos_id,
            eos_ids=_eos_ids(path, config, eos_id),
            chat_template=_chat_template(path, config),
        )
    except TokenizerError as error:
        raise TokenizerError(f"{path / 'tokenizer_config.json'}: {error}") from None


def write_directory(tokenizer: Tokenizer, directory: Path) -> None:
    """See `Tokenizer.save`."""
    backend = tokenizer.backend
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.bos_id is not None:
        config["bos_token"] = backend.id_to_token(tokenizer.bos_id)
    if tokenizer.eos_ids:
        config["eos_token"] = backend.id_to_token(tokenizer.eos_ids[0])
    if len(tokenizer.eos_ids) > 1:
        config["eos_ids"] = list(tokenizer.eos_ids)
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TokenizerError(f"cannot create {directory}: {error.strerror or error}") from None
    _write_atomically(directory / "tokenizer.json", backend.to_str(pretty=True))
    _write_atomically(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def _refuse_other_formats(path: Path) -> None:
    """Raises if there are tokenizer files, but not the one needed."""
    found = [name for name in (*_FOREIGN_FILES, *TOKENIZER_FILES) if (path / name).exists()]
    if not found:
        return
    raise TokenizerError(
        f"{path} has {' and '.join(found)} but no tokenizer.json, the one format read here (tried: "
        f"{', '.join(TOKENIZER_FILES)}). Take tokenizer.json from the model's download page, or "
        "make it with the transformers library: AutoTokenizer.from_pretrained(DIR)"
        ".save_pretrained(DIR). Prompts given as token ids need no tokenizer."
    )


def _parse_backend(path: Path, text: str) -> tokenizers.Tokenizer:
    with library_errors(
        f"{path} is damaged or no tokenizer file; download it again, with "
        f"{' and '.join(TOKENIZER_FILES[1:])}"
    ):
        backend = tokenizers.Tokenizer.from_str(text)
        backend.encode("a")  # some damage shows only in use
    if backend.get_vocab_size() == 0:
        raise TokenizerError(f"{path} has an empty vocabulary; download it again")
    return backend


def _read_text(path: Path) -> str | None:
    """The file as text; None if there is none."""
    limit = _MAX_BYTES[path.name]
    try:
        if not path.exists():
            return None
        if not path.is_file():
            raise TokenizerError(f"{path} is not a plain file")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise TokenizerError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > limit:
        raise TokenizerError(f"{path} is larger than {limit >> 20} MB, so it is no tokenizer file")
    if data.startswith(b"version https://git-lfs"):
        raise TokenizerError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` there"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 text (byte {error.start})") from None


def _read_json_object(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not valid JSON: {error}. Download it again") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


def _special_id(
    path: Path,
    backend: tokenizers.Tokenizer,
    config: dict[str, Any],
    special: dict[str, Any],
    key: str,
) -> int | None:
    """Id of `bos_token` or `eos_token`, written as a string or as {"content": string}."""
    name = "tokenizer_config.json" if config.get(key) is not None else "special_tokens_map.json"
    value = config[key] if config.get(key) is not None else special.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is None:
        return None
    if not isinstance(value, str):
        raise TokenizerError(f"{path / name}: {key} must be a string, found {value!r:.100}")
    token_id = backend.token_to_id(value)
    if token_id is None:
        raise TokenizerError(
            f"{path / name}: {key} {value!r:.100} is not in the vocabulary of tokenizer.json; the "
            "files must come from the same model"
        )
    return token_id


def _eos_ids(path: Path, config: dict[str, Any], eos_id: int | None) -> list[int]:
    """eos_token's id, then the further ids that `write_directory` notes under "eos_ids"."""
    ids = config.get("eos_ids", [])
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**32 for i in ids):
        raise TokenizerError(
            f"{path / 'tokenizer_config.json'}: eos_ids must be a list of token ids, found "
            f"{ids!r:.100}"
        )
    return ids if eos_id is None else [eos_id, *ids]


def _follow_config_flags(
    backend: tokenizers.Tokenizer, config: dict[str, Any], bos_id: int | None, eos_id: int | None
) -> None:
    """add_bos_token and add_eos_token, where given, overrule tokenizer.json's post-processor."""
    ids = backend.encode("a").ids
    has_bos = bos_id is not None and ids[:1] == [bos_id]
    has_eos = eos_id is not None and ids[-1:] == [eos_id]
    want_bos = bos_id is not None and _flag(config, "add_bos_token", has_bos)
    want_eos = eos_id is not None and _flag(config, "add_eos_token", has_eos)
    if (want_bos, want_eos) != (has_bos, has_eos):
        set_affixes(
            backend, bos_id=bos_id if want_bos else None, eos_id=eos_id if want_eos else None
        )


def _flag(config: dict[str, Any], key: str, default: bool) -> bool:
    value = config.get(key)
    return value if isinstance(value, bool) else default


def _chat_template(path: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the config's: a string, or named ones of which "default" counts."""
    text = _read_text(path / "chat_template.jinja")
    if text is not None:
        return text
    value = config.get("chat_template")
    if isinstance(value, list):
        pairs = [item for item in value if isinstance(item, dict)]
        value = {item.get("name"): item.get("template") for item in pairs}
    if isinstance(value, dict):
        only = next(iter(value.values())) if len(value) == 1 else None
        value = value.get("default", only)
    if value is not None and not isinstance(value, str):
        raise TokenizerError(
            f"{path / 'tokenizer_config.json'}: chat_template must be a string or a list of named "
            f"templates, found {type(value).__name__}"
        )
    return value


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise TokenizerError(f"cannot write {path}: {error.strerror or error}") from None
