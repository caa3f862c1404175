"""Configuration of a LLaMA-family decoder, and the presets of well-known models.

V vocabulary, D model width, F feed-forward width, L layers, N query heads, K KV heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

RopeKind = Literal["linear", "llama3", "yarn"]
ROPE_KINDS: tuple[str, ...] = get_args(RopeKind)
DTYPES: tuple[str, ...] = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained length.

    Attributes:
      kind: "linear" (Position Interpolation, arXiv 2306.15595), "llama3" (Llama 3.1), or "yarn"
        (arXiv 2309.00071).
      factor: the stretch, >= 1.
      original_max_positions: trained length, in tokens; needed by llama3 and yarn.
      low_freq_factor, high_freq_factor: llama3 only; wavelengths between original / high and
        original / low are interpolated.
      beta_fast, beta_slow: yarn only; rotations at which stretching begins and is complete.
      attention_factor: yarn only; multiplies cos and sin. None: 0.1 ln(factor) + 1.
      truncate: yarn only; round the correction range to whole dimensions.

    Raises:
      ValueError: a value is out of range or missing; the message names the field.
    """

    kind: RopeKind
    factor: float
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope kind must be one of {ROPE_KINDS}, found {self.kind!r}")
        _check_number("rope factor", self.factor, 1.0, 1e6)
        if self.kind in ("llama3", "yarn"):
            if self.original_max_positions is None:
                raise ValueError(f"rope kind {self.kind!r} needs original_max_positions")
            _check_integer("original_max_positions", self.original_max_positions, 1, 2**31 - 1)
        _check_number("low_freq_factor", self.low_freq_factor, 1e-6, 1e6)
        _check_number("high_freq_factor", self.high_freq_factor, 1e-6, 1e6)
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor}"
            )
        _check_number("beta_fast", self.beta_fast, 1e-6, 1e6)
        _check_number("beta_slow", self.beta_slow, 1e-6, 1e6)
        if self.kind == "yarn" and not self.beta_slow < self.beta_fast:
            raise ValueError(f"beta_slow={self.beta_slow} must be below beta_fast={self.beta_fast}")
        if self.attention_factor is not None:
            _check_number("attention_factor", self.attention_factor, 1e-6, 1e6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shape and constants of a LLaMA-family decoder. Checks itself; hashable, so jit can key on it.

    Attributes:
      vocab_size: V, rows of the embedding.
      embed_dim: D.
      ffw_dim: F.
      num_layers: L.
      num_q_heads: N, a multiple of num_kv_heads.
      num_kv_heads: K; N for multi-head, 1 for multi-query attention.
      head_dim: H, even; None means D // N.
      max_positions: tokens the model was trained for; longer contexts are the caller's choice.
      norm_eps: added to the mean square in RMSNorm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None for plain rotary embeddings.
      window: sliding-window length in tokens (Mistral), None for full attention.
      tie_embeddings: the output projection is the embedding.
      dtype: name of the type the weights are published in.
      bos_id, eos_ids: ids that begin a text and end one; they come from the checkpoint.

    Raises:
      ValueError: a value is out of range; the message names the field.
    """

    vocab_size: int
    embed_dim: int
    ffw_dim: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int = None  # type: ignore[assignment]  # an int once __post_init__ has run
    max_positions: int = 2048
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    window: int | None = None
    tie_embeddings: bool = False
    dtype: str = "bfloat16"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self):
        _check_integer("vocab_size", self.vocab_size, 1, 2**24)
        _check_integer("embed_dim", self.embed_dim, 1, 2**20)
        _check_integer("ffw_dim", self.ffw_dim, 1, 2**22)
        _check_integer("num_layers", self.num_layers, 1, 4096)
        _check_integer("num_q_heads", self.num_q_heads, 1, 4096)
        _check_integer("num_kv_heads", self.num_kv_heads, 1, 4096)
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads={self.num_q_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim is None:
            if self.embed_dim % self.num_q_heads:
                raise ValueError(
                    f"embed_dim={self.embed_dim} is not a multiple of "
                    f"num_q_heads={self.num_q_heads}; give head_dim"
                )
            object.__setattr__(self, "head_dim", self.embed_dim // self.num_q_heads)
        _check_integer("head_dim", self.head_dim, 2, 4096)
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs")
        _check_integer("max_positions", self.max_positions, 1, 2**31 - 1)
        _check_number("norm_eps", self.norm_eps, 1e-12, 1.0)
        _check_number("rope_theta", self.rope_theta, 1.01, 1e12)
        if self.window is not None:
            _check_integer("window", self.window, 1, 2**31 - 1)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, found {self.dtype!r}")
        for name, ids in (("bos_id", (self.bos_id,)), ("eos_ids", self.eos_ids)):
            for token in ids:
                if token is not None:
                    _check_integer(name, token, 0, self.vocab_size - 1)

    @classmethod
    def preset(cls, name: str) -> LlamaConfig:
        """The configuration of a well-known model, by a key of PRESETS."""
        try:
            return PRESETS[name]
        except KeyError:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}") from None

    @property
    def num_parameters(self) -> int:
        """Weights of the model, a tied output projection counted once."""
        D, F, V, H = self.embed_dim, self.ffw_dim, self.vocab_size, self.head_dim
        attention = D * H * (2 * self.num_q_heads + 2 * self.num_kv_heads)
        layer = attention + 3 * D * F + 2 * D
        return self.num_layers * layer + D + V * D * (1 if self.tie_embeddings else 2)

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that one token of one sequence takes in the KV cache, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, found {value!r}")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number from {low} to {high}, found {value!r}")
    if not low <= value <= high:  # false for NaN too
        raise ValueError(f"{name} must be a number from {low} to {high}, found {value!r}")


_LLAMA_2 = LlamaConfig(
    vocab_size=32_000, embed_dim=4096, ffw_dim=11_008, num_layers=32,
    num_q_heads=32, num_kv_heads=32, max_positions=4096, dtype="float16", bos_id=1, eos_ids=(2,),
)  # fmt: skip
_CODELLAMA = dataclasses.replace(
    _LLAMA_2, vocab_size=32_016, max_positions=16_384, rope_theta=1e6, dtype="bfloat16"
)

PRESETS: dict[str, LlamaConfig] = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49_152, embed_dim=576, ffw_dim=1536, num_layers=30,
        num_q_heads=9, num_kv_heads=3, max_positions=8192, rope_theta=1e5,
        tie_embeddings=True, bos_id=1, eos_ids=(2,),
    ),
    "tinyllama": LlamaConfig(
        vocab_size=32_000, embed_dim=2048, ffw_dim=5632, num_layers=22,
        num_q_heads=32, num_kv_heads=4, max_positions=2048, bos_id=1, eos_ids=(2,),
    ),
    "llama-2-7b": _LLAMA_2,
    "llama-2-70b": dataclasses.replace(
        _LLAMA_2, embed_dim=8192, ffw_dim=28_672, num_layers=80,
        num_q_heads=64, num_kv_heads=8, head_dim=128,
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128_256, embed_dim=4096, ffw_dim=14_336, num_layers=32,
        num_q_heads=32, num_kv_heads=8, max_positions=131_072, rope_theta=5e5,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_positions=8192),
        bos_id=128_000, eos_ids=(128_001,),
    ),
    "codellama-7b": _CODELLAMA,
    "codellama-34b": dataclasses.replace(
        _CODELLAMA, vocab_size=32_000, embed_dim=8192, ffw_dim=22_016, num_layers=48,
        num_q_heads=64, num_kv_heads=8, head_dim=128,
    ),
}  # fmt: skip
