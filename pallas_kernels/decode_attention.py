"""The door to decode attention: checks a call, says what each query sees, has it served.

B batch, T query tokens in this call, S cache capacity, N query heads, K KV heads, H head_dim.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdecode.pallas_kernels import cudnn, flash_decode, prefill, xla
from jaxdecode.pallas_kernels.attention_choice import AttentionChoice, choose, is_wide
from jaxdecode.pallas_kernels.varying import vary_alike

Array = jax.Array
Lengths = jax.Array | np.ndarray | int

_DTYPES = ("float32", "bfloat16", "float16")


@overload
def decode_attention(
    q: Array, k: Array, v: Array, kv_len: Lengths, *,
    q_start: Lengths | None = ..., scale: float | None = ..., window: int | None = ...,
    softcap: float | None = ..., sinks: Array | None = ..., num_splits: int | None = ...,
    implementation: str | None = ..., out_dtype: Any = ..., return_lse: Literal[False] = ...,
) -> Array: ...  # fmt: skip


@overload
def decode_attention(
    q: Array, k: Array, v: Array, kv_len: Lengths, *,
    q_start: Lengths | None = ..., scale: float | None = ..., window: int | None = ...,
    softcap: float | None = ..., sinks: Array | None = ..., num_splits: int | None = ...,
    implementation: str | None = ..., out_dtype: Any = ..., return_lse: Literal[True],
) -> tuple[Array, Array]: ...  # fmt: skip


def decode_attention(
    q: Array, k: Array, v: Array, kv_len: Lengths, *,
    q_start: Lengths | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    num_splits: int | None = None,
    implementation: str | None = None,
    out_dtype: Any = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:  # fmt: skip
    """Attends new query tokens to a KV cache that already holds their own keys and values.

    Query t stands at position p = q_start + t and sees the slots max(0, p - window + 1) <= s <= p
    with s < min(kv_len, S). Slots that it does not see never matter, whatever they hold.
    Logits are scale * q.k, then softcap * tanh(logits / softcap). Works under jit, vmap and grad;
    over several devices inside `jax.shard_map`.

    One exception, of flash_decode with several query tokens: where a query sees a slot whose value
    is NaN or infinite, other queries of its sequence that do not see the slot may become NaN too.

    Args:
      q: [B, T, N, H] in float32, bfloat16 or float16. Query head n reads KV head n // (N // K).
      k, v: [B, S, K, H] in q's dtype.
      kv_len: [B] or scalar integer in [0, S]: valid slots, the new tokens counted. Traced values
        outside that range are clamped for what is visible, never for positions.
      q_start: [B] or scalar integer: position of query 0; None means kv_len - T.
      scale: H**-0.5 when None.
      window: >= 1, how many positions a query looks back, itself counted; None for all.
      softcap: > 0; None for none.
      sinks: [N], one more logit per head, neither scaled nor capped, with a zero value.
      num_splits: into how many parts the keys are cut; flash_decode only, which otherwise cuts a
        batch into equal work, whatever the lengths, and for many query tokens cuts no keys.
      implementation: None to choose, or one of IMPLEMENTATIONS. "cudnn" serves one query token
        without window, softcap, sinks and log-sum-exp, in q's dtype.
      out_dtype: float type of the result, q's when None. Ask for float32 when you will merge it.
      return_lse: also return the log-sum-exp of the logits.

    Returns:
      out [B, T, N, H], or (out, lse) with lse [B, T, N] float32, natural log, sinks counted. A
      query that sees nothing gets out = 0 and lse = -inf (the sink, where there are sinks).

    Raises:
      ValueError, TypeError: the arguments do not fit; the message names them.
      NotImplementedError: `implementation` was given and cannot serve this call.
    """
    scale = checked_scale(q, k, v, scale, window, softcap, sinks, num_splits)
    out_dtype = checked_out_dtype(q, out_dtype)
    not_cudnn = cudnn.why_not(q, window, softcap, sinks, out_dtype, return_lse)
    choice = choose(q, k, num_splits=num_splits, implementation=implementation, not_cudnn=not_cudnn)
    kv_len, q_start = int32_lengths(k, kv_len, q_start)
    lo, hi = visible_ranges(kv_len, q.shape[1], k.shape[1], q_start=q_start, window=window)
    if choice.implementation == "cudnn":
        return cudnn.attend(*vary_alike(q, k, v, lo, hi), scale)
    out, lse = attend_ranges(
        choice, q, k, v, lo, hi, scale=scale, softcap=softcap, sinks=sinks, num_splits=num_splits,
        out_dtype=out_dtype,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def explain_attention(
    q: Any, k: Any, v: Any, kv_len: Any, *,
    q_start: Any = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    num_splits: int | None = None,
    implementation: str | None = None,
    out_dtype: Any = None,
    return_lse: bool = False,
) -> AttentionChoice:  # fmt: skip
    """Which implementation `decode_attention` would run for these arguments here, why, and how.

    Takes arrays or `jax.ShapeDtypeStruct`s and runs nothing. Raises what the call would raise for
    these shapes and types.
    """
    checked_scale(q, k, v, scale, window, softcap, sinks, num_splits)
    out_dtype = checked_out_dtype(q, out_dtype)
    not_cudnn = cudnn.why_not(q, window, softcap, sinks, out_dtype, return_lse)
    return choose(q, k, num_splits=num_splits, implementation=implementation, not_cudnn=not_cudnn)


def attend_ranges(
    choice: AttentionChoice, q: Array, k: Array, v: Array, lo: Array, hi: Array, *, scale: float,
    softcap: float | None, sinks: Array | None, num_splits: int | None, out_dtype: Any,
) -> tuple[Array, Array]:  # fmt: skip
    """Runs the chosen implementation on a checked call: query t sees slots lo[t] <= s < hi[t]."""
    if choice.implementation == "xla" and not choice.asked_for:
        flash_decode.warn_of_idle_gpu()
    operands = vary_alike(q, k, v, lo, hi)
    sinks = None if sinks is None else vary_alike(sinks, operands[0])[0]

    def portable(*operands: Array) -> tuple[Array, Array]:
        out, lse = xla.attend(*operands, scale=scale, softcap=softcap, sinks=sinks)
        return out.astype(out_dtype), lse

    def kernels(*operands: Array) -> tuple[Array, Array]:
        if is_wide(operands[0], operands[1], num_splits):
            return prefill.attend(
                *operands, scale=scale, softcap=softcap, sinks=sinks, out_dtype=out_dtype
            )
        return flash_decode.attend(
            *operands, scale=scale, softcap=softcap, sinks=sinks, num_splits=num_splits,
            out_dtype=out_dtype,
        )  # fmt: skip

    if choice.implementation == "xla":
        return portable(*operands)
    if choice.asked_for:
        return kernels(*operands)
    # Decided when it is lowered: a process with a GPU may compile this call for its CPU.
    return lax.platform_dependent(*operands, cuda=kernels, default=portable)


def visible_ranges(
    kv_len: Array, T: int, S: int, *, q_start: Array | None = None, window: int | None = None
) -> tuple[Array, Array]:
    """The slots lo <= s < hi that each query sees: causal order, window and padding in one form.

    Args:
      kv_len: [B] int32; q_start: [B] int32, kv_len - T when None.

    Returns:
      lo, hi: [B, T] int32 in [0, S] that never decrease along T; hi <= lo where a query sees
        nothing.
    """
    first = kv_len - T if q_start is None else q_start
    # No position wraps around. So far out all queries see the same.
    first = jnp.minimum(first, np.iinfo(np.int32).max - T)
    position = first[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
    limit = jnp.clip(kv_len, 0, S)[:, None]
    hi = jnp.clip(position, -1, S - 1) + 1
    hi = jnp.minimum(hi, limit)
    if window is None:
        return jnp.zeros_like(hi), hi
    window = min(window, np.iinfo(np.int32).max)
    # Compared before subtracting, so that no position can wrap around.
    lo = jnp.where(position >= window, position - (window - 1), 0)
    return jnp.clip(lo, 0, S), hi


def checked_scale(
    q: Any, k: Any, v: Any, scale: Any, window: Any, softcap: Any, sinks: Any, num_splits: Any
) -> float:
    """The scale of the logits, after checking all that is known of a call without values."""
    _check_shapes(q, k, v, sinks)
    _check_dtypes(q, k, v, sinks)
    if window is not None and (not is_integer(window) or window < 1):
        raise ValueError(f"window must be an integer >= 1 or None, found {window!r}")
    if num_splits is not None and (not is_integer(num_splits) or num_splits < 1):
        raise ValueError(f"num_splits must be an integer >= 1 or None, found {num_splits!r}")
    if softcap is not None and not _number("softcap", softcap) > 0:
        raise ValueError(f"softcap must be > 0 or None, found {softcap!r}")
    return q.shape[-1] ** -0.5 if scale is None else _number("scale", scale)


def _check_shapes(q: Any, k: Any, v: Any, sinks: Any) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} must have 4 dimensions, [batch, length, heads, head_dim]; found {shapes}"
            )
    if k.shape != v.shape:
        raise ValueError(f"k and v must have the same shape; found {shapes}")
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    if B != k.shape[0] or H != k.shape[3]:
        raise ValueError(f"q and k must agree in batch and head_dim; found {shapes}")
    if min(T, S, N, K, H) < 1 or B < 1:
        raise ValueError(f"every dimension must be at least 1; found {shapes}")
    if N % K:
        raise ValueError(f"num_q_heads={N} must be a multiple of num_kv_heads={K}; found {shapes}")
    if sinks is not None and sinks.shape != (N,):
        raise ValueError(f"sinks must have shape ({N},), one per query head; found {sinks.shape}")


def _check_dtypes(q: Any, k: Any, v: Any, sinks: Any) -> None:
    found = f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
    if q.dtype not in _DTYPES:
        raise TypeError(f"q, k and v must be one of {_DTYPES}; found {found}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, cast one of them; found {found}")
    if sinks is not None and sinks.dtype not in _DTYPES:
        raise TypeError(f"sinks must be one of {_DTYPES}; found {sinks.dtype}")


def checked_out_dtype(q: Any, out_dtype: Any) -> np.dtype:
    """The dtype of the result: `out_dtype`, or q's."""
    out_dtype = np.dtype(q.dtype if out_dtype is None else out_dtype)
    if out_dtype not in _DTYPES:
        raise TypeError(f"out_dtype must be one of {_DTYPES} or None; found {out_dtype}")
    return out_dtype


def int32_lengths(k: Any, kv_len: Lengths, q_start: Lengths | None) -> tuple[Array, Array | None]:
    """kv_len and q_start as [B] int32, from checked scalars or [B] integers of any width."""
    B, S = k.shape[:2]
    kv_len = _checked_lengths("kv_len", kv_len, B, S)
    if q_start is None:
        return _int32_per_row(kv_len, B), None
    q_start = _checked_lengths("q_start", q_start, B)
    return _int32_per_row(kv_len, B), _int32_per_row(q_start, B)


def _checked_lengths(name: str, value: Any, B: int, S: int | None = None) -> Any:
    """Scalar or [B] integers as an array. With S, known values must lie in [0, S]."""
    if not isinstance(value, jax.Array):
        value = np.asarray(value)
    if not np.issubdtype(value.dtype, np.integer):
        raise TypeError(f"{name} must be integers, found dtype {value.dtype}")
    if value.shape not in ((), (B,)):
        raise ValueError(f"{name} must be a scalar or have shape ({B},), found shape {value.shape}")
    if S is not None and _is_known(value):
        values = np.asarray(value)
        if values.min() < 0 or values.max() > S:
            raise ValueError(
                f"{name} must lie in [0, {S}], the capacity of k and v; found {values.tolist()}"
            )
    return value


def _int32_per_row(value: Any, B: int) -> Array:
    """[B] int32 from a scalar or [B] integers of any width; what does not fit is clamped."""
    if value.dtype != np.int32:
        limits = np.iinfo(np.int32)
        value = value.clip(
            max(limits.min, np.iinfo(value.dtype).min), min(limits.max, np.iinfo(value.dtype).max)
        )
    return jnp.broadcast_to(jnp.asarray(value, jnp.int32), (B,))


def _is_known(value: Any) -> bool:
    if isinstance(value, jax.core.Tracer):
        return False
    return not isinstance(value, jax.Array) or value.is_fully_addressable


def is_integer(value: Any) -> bool:
    """Whether value is one integer; True and False are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _number(name: str, value: Any) -> float:
    if isinstance(value, (jax.core.Tracer, bool)) or not isinstance(
        value, (int, float, np.integer, np.floating)
    ):
        raise TypeError(f"{name} must be a number known at trace time, found {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, found {value!r}")
    return float(value)
