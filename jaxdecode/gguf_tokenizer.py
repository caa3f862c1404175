"""A tokenizer from a GGUF file's metadata, which lists tokens, merges or scores, and token types.

Two kinds exist for the models served here: "gpt2", BPE over bytes, and "llama", SentencePiece BPE.
The meaning of every key is that of llama.cpp, which defined the format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from jaxdecode.errors import TokenizerError
from jaxdecode.tokenizer import Tokenizer, set_affixes

_MAX_TOKENS = 1 << 20
_MAX_MERGES = 1 << 22
_MAX_TOKEN_CHARS = 1024
_MAX_TOTAL_CHARS = 1 << 24

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# Ends of a text or a turn, by name: many files declare only one of the several that a model uses.
_END_NAMES = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<EOT>",
    "▁<EOT>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001  DeepSeek writes it so
)


class _PreTokenizer(NamedTuple):
    """How text is cut before merging: by each pattern in turn, matches and gaps becoming pieces."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token is taken whole
    add_bos: bool = False


_DIGIT = r"\p{N}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"|\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"|\p{N}" + _REST
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_PRE_TOKENIZERS = {
    "default": _PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "roberta-bpe"), _PreTokenizer((_GPT2,))),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        _PreTokenizer((_DIGIT, _GPT2)),
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3"),
        _PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _PreTokenizer((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), _PreTokenizer((_QWEN2,))),
    "tekken": _PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "deepseek-coder": _PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", _DIGIT)
    ),
}


def read_metadata(meta: Mapping[str, Any]) -> Tokenizer:
    """See `Tokenizer.from_gguf_metadata`."""
    kind = meta.get("tokenizer.ggml.model")
    tokens = _tokens(meta)
    types = _token_types(meta, len(tokens))
    if kind == "gpt2":
        backend, add_bos = _byte_level(meta, tokens)
    elif kind == "llama":
        backend, add_bos = _sentencepiece(meta, tokens, types), True
    else:
        raise TokenizerError(
            f"tokenizer.ggml.model is {kind!r:.100}; this library knows 'gpt2' (byte-level BPE) "
            "and 'llama' (SentencePiece BPE)"
        )
    _add_special_tokens(backend, tokens, types)
    bos_id = _token_id(meta, "bos", tokens)
    eos_id = _token_id(meta, "eos", tokens)
    if kind == "llama":
        bos_id = _by_name(tokens, 1, "<s>") if bos_id is None else bos_id
        eos_id = _by_name(tokens, 2, "</s>") if eos_id is None else eos_id
    want_bos = _flag(meta, "add_bos_token", add_bos)
    want_eos = _flag(meta, "add_eos_token", False)
    set_affixes(backend, bos_id=bos_id if want_bos else None, eos_id=eos_id if want_eos else None)
    return Tokenizer(
        backend,
        bos_id=bos_id,
        eos_ids=_end_ids(meta, eos_id, tokens, types),
        chat_template=_chat_template(meta),
    )


def _byte_level(meta: Mapping[str, Any], tokens: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
    name = meta.get("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise TokenizerError(
            f"tokenizer.ggml.pre is {name!r:.100}; this library knows "
            f"{', '.join(sorted(_PRE_TOKENIZERS))}. Another way to cut text into words would give "
            "the model tokens it was not trained on; use the model's Hugging Face directory instead"
        )
    pre = _PRE_TOKENIZERS[name]
    vocab = _vocab(tokens)
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, _merges(meta, vocab), ignore_merges=pre.ignore_merges)
    )
    cuts = [
        # The published tokenizers cut digits with their own class; its list of digits differs.
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == _DIGIT
        else pre_tokenizers.Split(Regex(pattern), "isolated")
        for pattern in pre.patterns
    ]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _sentencepiece(
    meta: Mapping[str, Any], tokens: list[str], types: list[int]
) -> tokenizers.Tokenizer:
    vocab = _vocab(tokens)
    if "tokenizer.ggml.merges" in meta:
        merges = _merges(meta, vocab)
    else:
        merges = _merges_from_scores(vocab, _scores(meta, len(tokens)), types)
    unknown_id = _token_id(meta, "unknown", tokens)
    if unknown_id is None:
        unknown_id = types.index(_UNKNOWN) if _UNKNOWN in types else None
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab,
            merges,
            unk_token=None if unknown_id is None else tokens[unknown_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = _flag(meta, "add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges_from_scores(
    vocab: dict[str, int], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """The merges that SentencePiece would do: into every token from any two others, best first."""
    # Control and byte tokens never come from text; user-defined ones are found before merging.
    plain = {
        token: token_id
        for token, token_id in vocab.items()
        if types[token_id] not in (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
    }
    found = [
        (-scores[token_id], token_id, token[:cut], token[cut:])
        for token, token_id in plain.items()
        for cut in range(1, len(token))
        if token[:cut] in plain and token[cut:] in plain
    ]
    found.sort()
    return [(left, right) for _, _, left, right in found]


def _add_special_tokens(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Tokens that are found in text before anything else: control tokens and user-defined ones."""
    hidden = (_CONTROL, _UNKNOWN)
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in hidden
        ]
    )
    # User-defined tokens are text (runs of spaces, say), so decoding must show them.
    backend.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _USER_DEFINED
        ]
    )


def _end_ids(
    meta: Mapping[str, Any], eos_id: int | None, tokens: list[str], types: list[int]
) -> list[int]:
    declared = [eos_id, _token_id(meta, "eot", tokens), _token_id(meta, "eom", tokens)]
    named = [
        token_id
        for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == _CONTROL and token in _END_NAMES
    ]
    return [i for i in declared if i is not None] + named


def _list(meta: Mapping[str, Any], key: str, kind: type, limit: int) -> list[Any]:
    """meta[key], checked to be a list of `kind` with at most `limit` entries."""
    values = meta.get(key)
    if not isinstance(values, list | tuple):
        raise TokenizerError(f"{key} must be a list, found {type(values).__name__}")
    if not 0 < len(values) <= limit:
        raise TokenizerError(f"{key} has {len(values)} entries; 1 to {limit} are allowed")
    for index, value in enumerate(values):
        if type(value) is not kind:
            raise TokenizerError(
                f"{key}[{index}] must be of type {kind.__name__}, found {value!r:.100}"
            )
    return list(values)


def _tokens(meta: Mapping[str, Any]) -> list[str]:
    tokens = _list(meta, "tokenizer.ggml.tokens", str, _MAX_TOKENS)
    longest = max(map(len, tokens))
    if longest > _MAX_TOKEN_CHARS or sum(map(len, tokens)) > _MAX_TOTAL_CHARS:
        raise TokenizerError(
            f"tokenizer.ggml.tokens has a token of {longest} characters and "
            f"{sum(map(len, tokens))} in all; at most {_MAX_TOKEN_CHARS} and {_MAX_TOTAL_CHARS} "
            "are allowed"
        )
    return tokens


def _token_types(meta: Mapping[str, Any], count: int) -> list[int]:
    if "tokenizer.ggml.token_type" not in meta:
        return [_NORMAL] * count
    types = _list(meta, "tokenizer.ggml.token_type", int, _MAX_TOKENS)
    _check_count("tokenizer.ggml.token_type", types, count)
    return types


def _scores(meta: Mapping[str, Any], count: int) -> list[float]:
    scores = _list(meta, "tokenizer.ggml.scores", float, _MAX_TOKENS)
    _check_count("tokenizer.ggml.scores", scores, count)
    bad = next((score for score in scores if not math.isfinite(score)), None)
    if bad is not None:
        raise TokenizerError(f"tokenizer.ggml.scores must be finite, found {bad}")
    return scores


def _check_count(key: str, values: list[Any], count: int) -> None:
    if len(values) != count:
        raise TokenizerError(
            f"{key} has {len(values)} entries, but tokenizer.ggml.tokens has {count}; the file is "
            "damaged"
        )


def _vocab(tokens: list[str]) -> dict[str, int]:
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for token_id, token in enumerate(tokens) if vocab[token] != token_id)
        raise TokenizerError(
            f"tokenizer.ggml.tokens lists {twice!r:.100} twice (ids {tokens.index(twice)} and "
            f"{vocab[twice]}); every token must be unique"
        )
    return vocab


def _merges(meta: Mapping[str, Any], vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for line in _list(meta, "tokenizer.ggml.merges", str, _MAX_MERGES):
        left, _, right = line.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise TokenizerError(
                f"tokenizer.ggml.merges has {line!r:.100}, which is not two tokens of the "
                "vocabulary whose union is a third; the file is damaged"
            )
        merges.append((left, right))
    return merges


def _token_id(meta: Mapping[str, Any], name: str, tokens: list[str]) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = meta.get(key)
    if token_id is not None and (type(token_id) is not int or not 0 <= token_id < len(tokens)):
        raise TokenizerError(
            f"{key} is {token_id!r:.100}; it must be one of the {len(tokens)} token ids "
            f"(0 <= id < {len(tokens)})"
        )
    return token_id


def _by_name(tokens: list[str], token_id: int, name: str) -> int | None:
    """`token_id` if it is the token that old files do not declare."""
    return token_id if tokens[token_id : token_id + 1] == [name] else None


def _flag(meta: Mapping[str, Any], name: str, default: bool) -> bool:
    value = meta.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise TokenizerError(f"tokenizer.ggml.{name} must be true or false, found {value!r:.100}")
    return value


def _chat_template(meta: Mapping[str, Any]) -> str | None:
    template = meta.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(
            f"tokenizer.chat_template must be a string, found {type(template).__name__}"
        )
    return template
