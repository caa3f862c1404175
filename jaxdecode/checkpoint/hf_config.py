"""Hugging Face's config.json and generation_config.json, to a LlamaConfig and back.

Only what is understood is accepted: a value that is out of range, names code to run, or asks for a
feature this library lacks is refused by name, never skipped.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from jaxdecode.checkpoint.files import read_json, resolve_inside, shown
from jaxdecode.checkpoint.hf_rope import rope_from_hf, rope_to_hf
from jaxdecode.errors import ConfigError
from jaxdecode.models.config import DTYPES, LlamaConfig

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
_MAX_BYTES = 1 << 20
_MODEL_TYPES = ("llama", "mistral")
# Each makes other software import code that came with the model.
_CODE_KEYS = ("auto_map", "custom_pipelines", "_attn_implementation_internal")
_PLAIN_IMPLEMENTATIONS = (
    "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention",
)  # fmt: skip
# Field of LlamaConfig -> key of config.json.
_KEYS = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "ffw_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_q_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "window": "sliding_window",
    "bos_id": "bos_token_id",
    "eos_ids": "eos_token_id",
    "dtype": "torch_dtype",
}
_REQUIRED = ("vocab_size", "embed_dim", "ffw_dim", "num_layers", "num_q_heads")


def read_config(directory: Path) -> LlamaConfig:
    """The configuration of a Hugging Face model directory.

    The ids that end a text are generation_config.json's where that file gives them.

    Raises:
      ConfigError: a value is missing, out of range, or asks for something unsupported;
        UnsupportedRopeError for the rotary embedding.
      CheckpointError: config.json is missing or not strict JSON; PathError if it lies elsewhere.
    """
    data = read_json(resolve_inside(directory, CONFIG_NAME), _MAX_BYTES)
    generation = {}
    if os.path.lexists(directory / GENERATION_CONFIG_NAME):
        generation = read_json(resolve_inside(directory, GENERATION_CONFIG_NAME), _MAX_BYTES)
    ids = {key: generation[key] for key in ("bos_token_id", "eos_token_id") if key in generation}
    ids = {key: value for key, value in ids.items() if value is not None}
    return config_from_hf(data | ids, directory / CONFIG_NAME)


def config_from_hf(data: dict[str, Any], path: Path) -> LlamaConfig:
    """The configuration in config.json's dictionary; `path` is for messages. Raises ConfigError."""
    _check_supported(data, path)
    given = _defaults(data)
    given |= {field: data[key] for field, key in _KEYS.items() if data.get(key) is not None}
    # LLaMA has no window whatever the file says; Mistral's is 4096 unless the file says null.
    mistral = data["model_type"] == "mistral"
    given["window"] = data.get("sliding_window", 4096) if mistral else None
    for field in _REQUIRED:
        if given.get(field) is None:
            raise ConfigError(f"{path}: {_KEYS[field]} is missing; download the file again")
    if not isinstance(given.get("tie_embeddings", False), bool):
        raise _wrong(path, data, "tie_word_embeddings", "true or false")
    if given["dtype"] not in DTYPES:
        raise _wrong(path, data, "torch_dtype", f"one of {', '.join(DTYPES)}")
    given["eos_ids"] = _eos_ids(given.get("eos_ids"), path)
    theta, scaling = rope_from_hf(data, path)
    try:
        return LlamaConfig(rope_theta=theta, rope_scaling=scaling, **given)
    except ValueError as error:
        raise ConfigError(f"{path}: {_in_words_of_the_file(str(error))}") from None


def _defaults(data: dict[str, Any]) -> dict[str, Any]:
    """What transformers assumes of keys that are absent, where LlamaConfig would not."""
    mistral = data["model_type"] == "mistral"
    return {
        "num_kv_heads": 8 if mistral else data.get("num_attention_heads"),
        "max_positions": 131_072 if mistral else 2048,
        "norm_eps": 1e-6,
        "dtype": "float32" if data.get("dtype") is None else data["dtype"],
    }


def _check_supported(data: dict[str, Any], path: Path) -> None:
    for key, value in data.items():
        if value is not None and _names_code(key, value):
            raise ConfigError(
                f"{path}: {shown(key)} asks to run code that comes with the model, which this "
                "library never does; use a checkpoint of a plain LLaMA or Mistral model"
            )
    model_type = data.get("model_type")
    if model_type not in _MODEL_TYPES:
        raise _wrong(path, data, "model_type", "llama or mistral, the architectures supported here")
    for key in ("quantization_config", "compression_config"):
        if data.get(key) is not None:
            raise ConfigError(
                f"{path}: {key} announces quantised weights, which are supported in GGUF files "
                "only; use a checkpoint in bfloat16, float16 or float32"
            )
    for key in ("attention_bias", "mlp_bias"):
        if data.get(key) not in (None, False):
            raise _wrong(path, data, key, "false: layers with a bias are not supported")
    if data.get("hidden_act", "silu") != "silu":
        raise _wrong(path, data, "hidden_act", "silu, the only activation supported")
    layer_types = data.get("layer_types")
    if isinstance(layer_types, list) and any(kind != layer_types[0] for kind in layer_types):
        raise _wrong(path, data, "layer_types", "the same for all layers")


def _names_code(key: str, value: object) -> bool:
    return key in _CODE_KEYS or (
        "attn_implementation" in key
        and isinstance(value, str)
        and value not in _PLAIN_IMPLEMENTATIONS
    )


def _eos_ids(value: Any, path: Path) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in ids):
        raise _wrong(path, {"eos_token_id": value}, "eos_token_id", "a token id or a list of them")
    return tuple(dict.fromkeys(ids))


def _wrong(path: Path, data: dict[str, Any], key: str, allowed: str) -> ConfigError:
    found = shown(repr(data[key])) if key in data else "nothing"
    return ConfigError(f"{path}: {key} must be {allowed}; found {found}")


def _in_words_of_the_file(message: str) -> str:
    """LlamaConfig's complaint with its fields under the names that they have in config.json."""
    return re.sub(r"[a-z_]+", lambda match: _KEYS.get(match[0], match[0]), message)


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """What config.json says of `config`, in the spelling that transformers 4 and 5 both read."""
    data: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM" if config.window is None else "MistralForCausalLM"],
        "model_type": "llama" if config.window is None else "mistral",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    data |= {key: getattr(config, field) for field, key in _KEYS.items()}
    data |= rope_to_hf(config) | generation_config_to_hf(config)
    if config.window is None:
        del data["sliding_window"]
    else:
        del data["attention_bias"], data["mlp_bias"]
    return data


def generation_config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """What generation_config.json says of `config`: the ids that begin and end a text."""
    ids = list(config.eos_ids)
    return {
        "bos_token_id": config.bos_id,
        "eos_token_id": ids[0] if len(ids) == 1 else ids or None,
    }


def write_config(directory: Path, config: LlamaConfig) -> None:
    """Write config.json and generation_config.json."""
    for name, data in (
        (CONFIG_NAME, config_to_hf(config)),
        (GENERATION_CONFIG_NAME, generation_config_to_hf(config)),
    ):
        (directory / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
