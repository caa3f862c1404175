"""Reading and writing models: Hugging Face safetensors, GGUF, Orbax. Nothing else reads weights."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> the module that defines it, imported on first use: each format brings its library.
_HOME = {
    "export_safetensors": "jaxdecode.checkpoint.export",
    "load": "jaxdecode.checkpoint.loading",
    "open_source": "jaxdecode.checkpoint.loading",
    "save": "jaxdecode.checkpoint.orbax_directory",
    "TensorInfo": "jaxdecode.checkpoint.source",
    "WeightSource": "jaxdecode.checkpoint.source",
}

__all__ = [
    "TensorInfo",
    "WeightSource",
    "export_safetensors",
    "load",
    "open_source",
    "save",
]

if TYPE_CHECKING:
    from jaxdecode.checkpoint.export import export_safetensors
    from jaxdecode.checkpoint.loading import load, open_source
    from jaxdecode.checkpoint.orbax_directory import save
    from jaxdecode.checkpoint.source import TensorInfo, WeightSource


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxdecode.checkpoint' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
