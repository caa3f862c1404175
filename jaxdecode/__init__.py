"""Flash-Decoding in JAX: decode attention at the speed of the memory, and a LLaMA decoder on it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it. Resolved on first use (PEP 562), so that
# `import jaxdecode` costs no more than its caller needs.
_HOME = {
    "AttentionChoice": "jaxdecode.pallas_kernels",
    "combine_partials": "jaxdecode.pallas_kernels",
    "decode_attention": "jaxdecode.pallas_kernels",
    "explain_attention": "jaxdecode.pallas_kernels",
    "sharded_decode_attention": "jaxdecode.pallas_kernels",
    "KVCache": "jaxdecode.models.kv_cache",
    "Llama": "jaxdecode.models.llama",
    "LlamaConfig": "jaxdecode.models.config",
    "PRESETS": "jaxdecode.models.config",
    "RopeScaling": "jaxdecode.models.config",
    "random_model": "jaxdecode.models.random_model",
    "load": "jaxdecode.checkpoint",
    "save": "jaxdecode.checkpoint",
    "Chunk": "jaxdecode.results",
    "Result": "jaxdecode.results",
    "generate": "jaxdecode.generation",
    "stream_generate": "jaxdecode.generation",
    "SamplingParams": "jaxdecode.sampling",
    "DecodeError": "jaxdecode.errors",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from jaxdecode.checkpoint import load, save
    from jaxdecode.errors import DecodeError
    from jaxdecode.generation import generate, stream_generate
    from jaxdecode.models.config import PRESETS, LlamaConfig, RopeScaling
    from jaxdecode.models.kv_cache import KVCache
    from jaxdecode.models.llama import Llama
    from jaxdecode.models.random_model import random_model
    from jaxdecode.pallas_kernels import (
        AttentionChoice,
        combine_partials,
        decode_attention,
        explain_attention,
        sharded_decode_attention,
    )
    from jaxdecode.results import Chunk, Result
    from jaxdecode.sampling import SamplingParams


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxdecode' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
