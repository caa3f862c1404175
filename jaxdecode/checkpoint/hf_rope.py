"""Rotary-embedding settings in config.json, in both of Hugging Face's spellings.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 one `rope_parameters`.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from jaxdecode.checkpoint.files import shown
from jaxdecode.errors import ConfigError, UnsupportedRopeError
from jaxdecode.models.config import ROPE_KINDS, LlamaConfig, RopeScaling

_KNOWN_KINDS = ("default", *ROPE_KINDS)
_DEFAULT_THETA = 10_000.0
_ORIGINAL = "original_max_position_embeddings"
# Key of config.json -> field of RopeScaling, for each kind.
_KEYS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        _ORIGINAL: "original_max_positions",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        _ORIGINAL: "original_max_positions",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
}
_REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
# Keys without an effect here: the kind and the base are read apart, and `finetuned` is a remark.
_OTHER_KEYS = ("rope_type", "type", "rope_theta", "finetuned", "mscale", "mscale_all_dim")
_ALL_KEYS = {key for keys in _KEYS.values() for key in keys} | set(_OTHER_KEYS)


def rope_from_hf(data: dict[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    """(base of the frequencies, scaling) in config.json's dictionary; `path` is for messages.

    Raises:
      UnsupportedRopeError: an unknown or unsupported kind, a missing or impossible value, or two
        spellings that contradict each other.
    """
    if data.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise _unsupported(path, "partial_rotary_factor", data["partial_rotary_factor"])
    old, new = data.get("rope_scaling"), data.get("rope_parameters")
    theta = data.get("rope_theta")
    if new is None:
        return _parse("rope_scaling", {} if old is None else old, theta, data, path)
    result = _parse("rope_parameters", new, theta, data, path)
    others = _parse("rope_scaling", old, result[0], data, path) if old else result
    if others != result or (theta is not None and theta != result[0]):
        raise UnsupportedRopeError(
            f"{path}: rope_parameters contradicts rope_theta and rope_scaling; "
            "keep the one that the model was trained with and delete the other"
        )
    return result


def _parse(
    name: str, given: Any, theta: Any, data: dict[str, Any], path: Path
) -> tuple[float, RopeScaling | None]:
    """The setting in one spelling: the dictionary `given`, found under `name`."""
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: {name} must be an object or null; found {shown(repr(given))}")
    values = {key: value for key, value in given.items() if value is not None}
    kind = _kind(name, values, path)
    if values.pop("partial_rotary_factor", 1) != 1:
        raise _unsupported(path, f"{name}.partial_rotary_factor", given["partial_rotary_factor"])
    for key in values:
        if key not in _ALL_KEYS:
            raise _unsupported(path, f"{name}.{shown(key)}", values[key])
    theta = values.get("rope_theta", _DEFAULT_THETA if theta is None else theta)
    if isinstance(theta, bool) or not isinstance(theta, (int, float)):
        raise ConfigError(f"{path}: rope_theta must be a number; found {shown(repr(theta))}")
    theta = float(theta)
    if kind == "default":
        return theta, None
    for key in _REQUIRED[kind]:
        if key not in values:
            raise UnsupportedRopeError(f"{path}: {name} of kind {kind!r} needs {key}")
    return theta, _scaling(name, kind, values, data, path)


def _kind(name: str, values: dict[str, Any], path: Path) -> str:
    """The kind of scaling, refused unless it is one of the supported ones."""
    kind = values.get("rope_type", values.get("type", "default"))
    if values.get("type", kind) != kind:
        raise UnsupportedRopeError(
            f"{path}: {name} has two kinds, rope_type {shown(repr(kind))} and type "
            f"{shown(repr(values['type']))}; keep the right one"
        )
    if kind == "dynamic":
        raise UnsupportedRopeError(
            f"{path}: {name} of kind 'dynamic' changes the rotation of earlier tokens as the text "
            "grows, so the keys in a cache would go stale; supported are " + ", ".join(_KNOWN_KINDS)
        )
    if kind not in _KNOWN_KINDS:
        raise UnsupportedRopeError(
            f"{path}: {name} has the unknown kind {shown(repr(kind))}; supported are "
            + ", ".join(_KNOWN_KINDS)
        )
    return kind


def _scaling(
    name: str, kind: str, values: dict[str, Any], data: dict[str, Any], path: Path
) -> RopeScaling:
    # Some files give the trained length beside the scaling rather than in it.
    outside = data.get(_ORIGINAL)
    if outside is not None and values.setdefault(_ORIGINAL, outside) != outside:
        raise UnsupportedRopeError(
            f"{path}: {_ORIGINAL} is {shown(repr(outside))}, but in {name} it is "
            f"{shown(repr(values[_ORIGINAL]))}; keep the one that the model was trained with"
        )
    fields = {field: values[key] for key, field in _KEYS[kind].items() if key in values}
    if kind != "linear":
        fields.setdefault("original_max_positions", data.get("max_position_embeddings"))
        if not isinstance(fields.get("truncate", True), bool):
            raise ConfigError(f"{path}: {name}.truncate must be true or false")
    try:
        scaling = RopeScaling(kind=kind, **fields)  # type: ignore[arg-type]  # checked by _kind
        return _with_mscale(scaling, values)
    except (ArithmeticError, TypeError, ValueError) as error:
        problem = str(error).replace("original_max_positions", _ORIGINAL)
        raise UnsupportedRopeError(f"{path}: {name}: {problem}") from None


def _with_mscale(scaling: RopeScaling, values: dict[str, Any]) -> RopeScaling:
    """yarn's attention factor in DeepSeek's spelling, as the ratio of two scales."""
    scales = values.get("mscale"), values.get("mscale_all_dim")
    if scaling.kind != "yarn" or scaling.attention_factor is not None or not all(scales):
        return scaling
    log = math.log(scaling.factor)
    over, under = (0.1 * float(scale) * log + 1.0 for scale in scales if scale is not None)
    return dataclasses.replace(scaling, attention_factor=over / under)


def _unsupported(path: Path, key: str, value: object) -> UnsupportedRopeError:
    return UnsupportedRopeError(
        f"{path}: {key} = {shown(repr(value))} is not supported for rotary embeddings; "
        f"supported kinds are {', '.join(_KNOWN_KINDS)}"
    )


def rope_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """config.json's keys for the rotary embedding, spelt as transformers 4 and 5 both read them."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    values = {key: getattr(scaling, field) for key, field in _KEYS[scaling.kind].items()}
    values = {key: value for key, value in values.items() if value is not None}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": {"rope_type": scaling.kind} | values,
    }
