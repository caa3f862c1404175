"""From the metadata of a GGUF file of architecture "llama" to a LlamaConfig."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import numpy as np

from jaxdecode.checkpoint.gguf_header import GgufHeader, StoredValue, quoted
from jaxdecode.errors import CheckpointError, ConfigError, UnsupportedRopeError
from jaxdecode.models.config import ROPE_KINDS, LlamaConfig, RopeScaling

ROPE_FREQS = "rope_freqs.weight"
# What llama.cpp's converter writes for Llama 3.1 (factor 8) and 3.2 (32); the rest they share.
_LLAMA3 = tuple(
    RopeScaling(
        kind="llama3",
        factor=factor,
        original_max_positions=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    for factor in (8.0, 32.0)
)
_MAX_PER_LAYER = 4096
# Each of them changes the arithmetic of the layer in a way that no LLaMA model uses.
_REFUSED = (
    "expert_count",
    "attention.scale",
    "attention.max_alibi_bias",
    "attention.clamp_kqv",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "rope.scaling.yarn_log_multiplier",
)


def config_from_header(
    header: GgufHeader, dtype: str, rope_freqs: np.ndarray | None
) -> LlamaConfig:
    """The configuration that a GGUF file's metadata describes.

    Args:
      header: the checked header.
      dtype: LlamaConfig.dtype of the result.
      rope_freqs: the tensor of that name, one divisor per rotary pair; None if there is none.

    Raises:
      ConfigError: another architecture, or a value that is missing, of the wrong type, out of range
        or of a feature this library does not have; UnsupportedRopeError for the rotary embedding.
      CheckpointError: the file is one part of several, or has no embedding.
    """
    meta = _Metadata(header)
    _check_supported(meta)
    num_heads = meta.integer("llama.attention.head_count")
    embed_dim = meta.integer("llama.embedding_length")
    head_dim = meta.integer("llama.attention.key_length", embed_dim // max(num_heads, 1))
    theta = meta.number("llama.rope.freq_base", 10_000.0)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if meta.integer(key, head_dim) != head_dim:
            meta.wrong(key, f"the head dimension {head_dim}")
    max_positions = meta.integer("llama.context_length")
    try:
        return LlamaConfig(
            vocab_size=_vocab_size(meta),
            embed_dim=embed_dim,
            ffw_dim=meta.integer("llama.feed_forward_length"),
            num_layers=meta.integer("llama.block_count"),
            num_q_heads=num_heads,
            num_kv_heads=meta.integer("llama.attention.head_count_kv", num_heads),
            head_dim=head_dim,
            max_positions=max_positions,
            norm_eps=meta.number("llama.attention.layer_norm_rms_epsilon"),
            rope_theta=theta,
            rope_scaling=_rope_scaling(meta, rope_freqs, theta, head_dim, max_positions),
            window=meta.integer("llama.attention.sliding_window", 0) or None,
            tie_embeddings="output.weight" not in header.tensors,
            dtype=dtype,
            bos_id=meta.optional_id("tokenizer.ggml.bos_token_id"),
            eos_ids=_eos_ids(meta),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise ConfigError(
            f"{header.path}: the metadata describes no usable model: {error}; convert it again"
        ) from None


class _Metadata:
    """Typed access to the metadata; every complaint names the file and the key."""

    def __init__(self, header: GgufHeader):
        self.header = header

    def value(self, key: str) -> Any:
        stored = self.header.values.get(key)
        if isinstance(stored, StoredValue) and (stored.length or 0) > _MAX_PER_LAYER:
            raise ConfigError(
                f"{self.header.path}: {key} must be one value or one per layer, found an array of "
                f"{stored.length}; convert the model again"
            )
        return self.header.value(key)

    def wrong(self, key: str, allowed: str) -> NoReturn:
        found = self.value(key)
        raise ConfigError(
            f"{self.header.path}: {key} must be {allowed}, found "
            f"{'nothing' if found is None else quoted(found)}; convert the model again"
        )

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer; an array (one item per layer) counts when its items are all equal."""
        found = self.value(key)
        if found is None and default is not None:
            return default
        if isinstance(found, list) and found and found.count(found[0]) == len(found):
            found = found[0]
        if isinstance(found, bool) or not isinstance(found, int):
            self.wrong(key, "one integer, the same for every layer")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        found = self.value(key)
        if found is None and default is not None:
            return default
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            self.wrong(key, "a number")
        if not math.isfinite(found):
            self.wrong(key, "a finite number")
        return float(found)

    def text(self, key: str, default: str | None = None) -> str:
        found = self.value(key)
        if found is None and default is not None:
            return default
        if not isinstance(found, str):
            self.wrong(key, "a string")
        return found

    def optional_id(self, key: str) -> int | None:
        return None if self.value(key) is None else self.integer(key)


def _check_supported(meta: _Metadata) -> None:
    path = meta.header.path
    architecture = meta.text("general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"{path}: the architecture is {quoted(architecture)}, supported is only 'llama' "
            "(LLaMA, CodeLlama, SmolLM, Mistral)"
        )
    num_parts = meta.integer("split.count", 1)
    if num_parts > 1:
        raise CheckpointError(
            f"{path}: one of {num_parts} parts of a model; "
            "join them with `llama-gguf-split --merge` and load the result"
        )
    for name in _REFUSED:
        if meta.number(f"llama.{name}", 0.0):
            meta.wrong(f"llama.{name}", "absent or 0: this library does not have that feature")
    if meta.value("llama.attention.causal") is False:
        meta.wrong("llama.attention.causal", "true: this library only decodes")


def _vocab_size(meta: _Metadata) -> int:
    """Rows of the embedding, which the metadata may not contradict."""
    header = meta.header
    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(
            f"{header.path}: no tensor 'token_embd.weight' among {len(header.tensors)}; "
            "the file holds only a vocabulary, or no language model"
        )
    rows = header.tensors["token_embd.weight"].shape[0]
    if meta.integer("llama.vocab_size", rows) != rows:
        meta.wrong("llama.vocab_size", f"{rows}, the rows of 'token_embd.weight'")
    tokens = header.values.get("tokenizer.ggml.tokens")
    if isinstance(tokens, StoredValue) and (tokens.length or 0) > rows:
        raise ConfigError(
            f"{header.path}: the tokenizer has {tokens.length} tokens, the embedding {rows} rows; "
            "convert the model again"
        )
    return rows


def _eos_ids(meta: _Metadata) -> tuple[int, ...]:
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    ids = [meta.optional_id(key) for key in keys]
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def _rope_scaling(
    meta: _Metadata,
    rope_freqs: np.ndarray | None,
    theta: float,
    head_dim: int,
    max_positions: int,
) -> RopeScaling | None:
    """As llama.cpp reads it: a factor without a type is linear, and 0 or 1 stretches nothing."""
    path = meta.header.path
    # Older files spell the linear factor rope.scale_linear.
    factor = meta.number("llama.rope.scaling.factor", meta.number("llama.rope.scale_linear", 0.0))
    kind = meta.text("llama.rope.scaling.type", "linear" if factor else "none")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedRopeError(
            f"{path}: the rotary embedding is scaled by {quoted(kind)}, known are none, "
            f"{', '.join(ROPE_KINDS)}"
        )
    if kind == "none" or factor in (0.0, 1.0):
        return _llama3_scaling(path, rope_freqs, theta, head_dim)
    if rope_freqs is not None:
        raise UnsupportedRopeError(
            f"{path}: both llama.rope.scaling.type {kind!r} and {ROPE_FREQS!r} scale the rotary "
            "embedding, and only one may; convert the model again"
        )
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    # -1 is llama.cpp's word for unset.
    if meta.number("llama.rope.scaling.yarn_ext_factor", -1.0) not in (-1.0, 1.0):
        meta.wrong("llama.rope.scaling.yarn_ext_factor", "absent or 1")
    strength = meta.number("llama.rope.scaling.attn_factor", 1.0)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_positions=meta.integer(
            "llama.rope.scaling.original_context_length", max_positions
        ),
        beta_fast=meta.number("llama.rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=meta.number("llama.rope.scaling.yarn_beta_slow", 1.0),
        # The file's factor multiplies the usual one, where ours replaces it.
        attention_factor=None
        if strength == 1.0
        else strength * (0.1 * math.log(max(factor, 1.0)) + 1.0),
    )


def _llama3_scaling(
    path: object, rope_freqs: np.ndarray | None, theta: float, head_dim: int
) -> RopeScaling | None:
    """Recognise Llama 3.1's scaling by its divisors: the file holds those, not their parameters."""
    if rope_freqs is None:
        return None
    if rope_freqs.shape == (head_dim // 2,):
        if np.all(rope_freqs == 1):
            return None
        for scaling in _LLAMA3:
            expected = llama3_divisors(scaling, theta, head_dim)
            if np.allclose(rope_freqs, expected, rtol=1e-4, atol=0):
                return scaling
    raise UnsupportedRopeError(
        f"{path}: the divisors in {ROPE_FREQS!r} are not those of Llama 3.1 or 3.2 (factor 8 or "
        "32, frequency factors 1 and 4, original length 8192), and no others are known"
    )


def llama3_divisors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """Llama 3.1's divisor of each rotary frequency, float64 [H / 2].

    1 for the fast ones, `scaling.factor` for the slow ones, between the two in between.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # A theta that is out of range makes NaN here and is complained about later.
    with np.errstate(all="ignore"):
        wavelength = 2 * math.pi * np.power(theta, np.arange(0, head_dim, 2) / head_dim)
        turns = (scaling.original_max_positions or 0) / wavelength
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return 1 / ((1 - smooth) / scaling.factor + smooth)
