"""The angles of rotary position embeddings (arXiv 2104.09864).

B batch, T tokens, H head_dim.
"""

from __future__ import annotations

import math
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxdecode.models.config import LlamaConfig, RopeScaling

Array = jax.Array


def rope_frequencies(config: LlamaConfig) -> tuple[np.ndarray, float]:
    """Angular frequency of each pair of dimensions, and the factor on cos and sin.

    Returns:
      ([H / 2] float32 radians per position, attention factor: 1.0 except for yarn).
    """
    H, scaling = config.head_dim, config.rope_scaling
    frequency = config.rope_theta ** -(np.arange(0, H, 2, dtype=np.float64) / H)
    factor = 1.0
    if scaling is not None:
        if scaling.kind == "linear":
            frequency = frequency / scaling.factor
        elif scaling.kind == "llama3":
            frequency = _llama3(frequency, scaling)
        else:
            frequency = _yarn(frequency, config.rope_theta, scaling)
            factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return frequency.astype(np.float32), factor


def rope_table(config: LlamaConfig, positions: Array) -> tuple[Array, Array]:
    """cos and sin of the rotation at `positions` [B, T], each [B, T, 1, H / 2] float32."""
    frequency, factor = rope_frequencies(config)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency[None, None, None, :]
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def _llama3(frequency: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated."""
    wavelengths_in_context = scaling.original_max_positions * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((wavelengths_in_context - low) / (high - low), 0.0, 1.0)
    return frequency * (keep + (1.0 - keep) / scaling.factor)


def _yarn(frequency: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """YaRN (arXiv 2309.00071): interpolates dimensions that turn fewer than beta_slow times in the
    trained length, keeps those that turn more than beta_fast times, and ramps between."""
    half = len(frequency)
    trained = cast(int, scaling.original_max_positions)  # RopeScaling sees to it

    def dimension(turns: float) -> float:
        return half * math.log(trained / (turns * 2 * math.pi)) / math.log(theta)

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return frequency * (1.0 - ramp) + frequency / scaling.factor * ramp
