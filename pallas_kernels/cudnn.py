"""cuDNN's attention, through jax.nn, for the calls that it serves exactly: one query token each.

B batch, T query tokens, S capacity, N query heads, K KV heads, H head_dim.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxdecode.pallas_kernels import xla

Array = jax.Array

_DTYPES = ("bfloat16", "float16")
# What jax.nn lets through to cuDNN.
_MAX_HEAD_DIM, _MAX_HEAD_DIM_BEFORE_HOPPER = 256, 128


def why_not(
    q: Any, window: int | None, softcap: float | None, sinks: Any, out_dtype: Any, return_lse: bool
) -> str | None:
    """Why cuDNN cannot serve a call with these arguments of `decode_attention`; None if it can."""
    _, T, _, H = q.shape
    if T != 1:
        return f"its causal order begins at the first key, so it takes one query token, not {T}"
    if return_lse:
        return "its log-sum-exp has the dtype of q, not float32"
    if out_dtype != q.dtype:
        return f"its result has the dtype of q, {q.dtype}, not {out_dtype}"
    for name, value in (("window", window), ("softcap", softcap), ("sinks", sinks)):
        if value is not None:
            return f"it is not called with {name}"
    if q.dtype not in _DTYPES:
        return f"it takes {' and '.join(_DTYPES)}, not {q.dtype}"
    if H % 8 or H > _MAX_HEAD_DIM:
        return f"it takes a head_dim that is a multiple of 8 up to {_MAX_HEAD_DIM}, not {H}"
    if jax.default_backend() != "gpu":
        return f"it needs an NVIDIA GPU, and JAX runs on {jax.default_backend()}"
    if H > _MAX_HEAD_DIM_BEFORE_HOPPER and not _is_hopper_or_later():
        return (
            f"on {jax.devices('gpu')[0].device_kind} it takes a head_dim up to "
            f"{_MAX_HEAD_DIM_BEFORE_HOPPER}, not {H}"
        )
    return None


def _is_hopper_or_later() -> bool:
    # Like "9.0"; GPUs of other makes have none, or another form.
    major, _, _ = getattr(jax.devices("gpu")[0], "compute_capability", "").partition(".")
    return major.isdecimal() and int(major) >= 9


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(q: Array, k: Array, v: Array, lo: Array, hi: Array, scale: float) -> Array:
    """Attends the one query token of each sequence to the slots s < hi.

    Args:
      q: [B, 1, N, H]; k, v: [B, S, K, H]; lo, hi: [B, 1] int32, lo zero.

    Returns:
      [B, 1, N, H] in q's dtype, 0 where nothing is visible. Its gradient is that of `portable`: no
      dead slot can poison it.
    """
    out = jax.nn.dot_product_attention(
        q, k, v, scale=scale, key_value_seq_lengths=hi[:, 0], implementation="cudnn"
    )
    return jnp.where(hi[:, :, None, None] > 0, out, 0)


def portable(q: Array, k: Array, v: Array, lo: Array, hi: Array, scale: float) -> Array:
    """The same, without cuDNN."""
    return xla.attend(q, k, v, lo, hi, scale=scale)[0].astype(q.dtype)


def _saving(q, k, v, lo, hi, scale):
    return jax.vjp(lambda q, k, v: portable(q, k, v, lo, hi, scale), q, k, v)


def _backward(scale, gradient, d_out):
    return *gradient(d_out), None, None


attend.defvjp(_saving, _backward)
