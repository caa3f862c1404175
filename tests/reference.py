"""What attention must be, in plain NumPy: the oracle, an honest low-precision rival, the tolerance.

Nothing here imports the package under test. The text of the contract is the docstring of
`jaxdecode.decode_attention`; `reference_attention` says the same in float64 loops.
B batch, T query tokens, S cache capacity, N query heads, K KV heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
OUT_CAPS = {"float32": 5e-6, "float16": 1e-3, "bfloat16": 1e-2}
LSE_CAP = 1e-5

_QUERY_PULL = 8.0  # length of the direction that the queries of one KV head share
_DEAD_VALUE = 100.0


def reference_attention(
    q: Any, k: Any, v: Any, kv_len: Any, *,
    q_start: Any = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Any = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The oracle: out [B, T, N, H] and lse [B, T, N] in float64, a query and a head at a time."""
    B, T, N, H = np.shape(q)
    _, S, K, _ = np.shape(k)
    out, lse = np.zeros((B, T, N, H)), np.full((B, T, N), -np.inf)
    scale = H**-0.5 if scale is None else scale
    for b in range(B):
        for t in range(T):
            slots = visible_slots(b, t, T, S, kv_len, q_start, window)
            k_seen, v_seen = (np.asarray(x)[b, slots].astype(np.float64) for x in (k, v))
            for n in range(N):
                query = np.asarray(q)[b, t, n].astype(np.float64)
                logits = scale * (k_seen[:, n // (N // K)] @ query)
                if softcap is not None:
                    logits = softcap * np.tanh(logits / softcap)
                values = v_seen[:, n // (N // K)]
                if sinks is not None:
                    logits = np.append(logits, np.float64(np.asarray(sinks)[n]))
                    values = np.append(values, np.zeros((1, H)), axis=0)
                if logits.size:
                    weights = np.exp(logits - logits.max())
                    out[b, t, n] = weights @ values / weights.sum()
                    lse[b, t, n] = logits.max() + np.log(weights.sum())
    return out, lse


def visible_slots(
    b: int, t: int, T: int, S: int, kv_len: Any, q_start: Any, window: int | None
) -> np.ndarray:
    """Indices of the slots that query t of sequence b sees."""
    length = int(np.asarray(kv_len).reshape(-1)[b if np.ndim(kv_len) else 0])
    if q_start is None:
        position = length - T + t
    else:
        position = int(np.asarray(q_start).reshape(-1)[b if np.ndim(q_start) else 0]) + t
    first = 0 if window is None else max(0, position - window + 1)
    slots = np.arange(S)
    return slots[(first <= slots) & (slots <= position) & (slots < min(length, S))]


def low_precision_attention(
    q: Any, k: Any, v: Any, kv_len: Any, *,
    q_start: Any = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    out_dtype: Any = None,
) -> np.ndarray:  # fmt: skip
    """What an honest plain attention reaches in q's dtype: [B, T, N, H] in out_dtype (default q's).

    Products of the inputs are exact in float32 and summed there; the softmax weights are rounded to
    the inputs' dtype before they meet the values, as in any attention on matrix units.
    """
    B, T, N, H = q.shape
    _, S, K, _ = k.shape
    G = N // K
    scale = np.float32(H**-0.5 if scale is None else scale)
    sinks = np.full(N, -np.inf) if sinks is None else sinks
    sink = np.repeat(np.asarray(sinks).astype(np.float32).reshape(K, G), T, axis=1)[..., None]
    out = np.zeros(q.shape, np.float32)
    for b in range(B):
        mask = np.zeros((T, S), bool)
        for t in range(T):
            mask[t, visible_slots(b, t, T, S, kv_len, q_start, window)] = True
        seen = mask.any(axis=0)
        # [K, G * T, H] meets [K, H, seen]: the queries that share a KV head stand together.
        query = q[b].astype(np.float32).reshape(T, K, G, H).transpose(1, 2, 0, 3)
        keys, values = (x[b, seen].astype(np.float32).swapaxes(0, 1) for x in (k, v))
        logits = query.reshape(K, G * T, H) @ keys.swapaxes(1, 2) * scale
        if softcap is not None:
            logits = np.float32(softcap) * np.tanh(logits / np.float32(softcap))
        logits = np.where(np.tile(mask[:, seen], (G, 1)), logits, -np.inf).astype(np.float32)
        logits = np.concatenate([logits, sink], axis=2)
        top = logits.max(axis=2, keepdims=True)
        weights = np.exp(logits - np.where(top == -np.inf, np.float32(0), top))
        weights /= np.maximum(weights.sum(axis=2, keepdims=True), np.float32(1e-30))
        merged = weights[..., :-1].astype(q.dtype).astype(np.float32) @ values
        out[b] = merged.reshape(K, G, T, H).transpose(2, 0, 1, 3).reshape(T, N, H)
    return out.astype(q.dtype if out_dtype is None else out_dtype)


def assert_close(
    out: Any, ref: np.ndarray, low: np.ndarray, dtype: Any, *, lse: Any = None, ref_lse: Any = None
) -> None:
    """The tolerance of the whole project, applied to each sequence of the batch by itself.

    Errors against the float64 `ref` are at most twice those of `low` (plus 1e-5), 1.5 times on
    average, and below the absolute cap of the coarser of `dtype` (the inputs') and out's dtype, so
    that a broken rival cannot hide us. Sequences are judged one by one because a short one has
    outputs, and so errors, many times those of a long one.
    """
    assert out.shape == ref.shape == low.shape, f"{out.shape=} {ref.shape=} {low.shape=}"
    assert out.dtype == low.dtype, f"{out.dtype=} {low.dtype=}"
    cap = max(OUT_CAPS[np.dtype(x).name] for x in (dtype, out.dtype))
    for b in range(len(ref)):
        got, want, rival = (np.asarray(x[b]).astype(np.float64) for x in (out, ref, low))
        assert np.isfinite(got).all(), f"sequence {b}: output is not finite"
        error, allowed = abs(got - want), abs(rival - want)
        limit = min(2 * allowed.max() + 1e-5, cap * max(1, abs(want).max()))
        assert error.max() <= limit, f"sequence {b}: max error {error.max():.3g} > {limit:.3g}"
        limit = 1.5 * allowed.mean() + 1e-6
        assert error.mean() <= limit, f"sequence {b}: mean error {error.mean():.3g} > {limit:.3g}"
    if lse is not None:
        assert_lse_close(lse, ref_lse)


def assert_lse_close(lse: Any, ref_lse: np.ndarray) -> None:
    """Natural-log log-sum-exp: -inf in the same places, otherwise within the cap."""
    assert (lse.shape, lse.dtype) == (ref_lse.shape, np.float32), f"{lse.shape=} {lse.dtype=}"
    got, empty = np.asarray(lse).astype(np.float64), np.isneginf(ref_lse)
    np.testing.assert_array_equal(np.isneginf(got), empty)
    error = abs(got[~empty] - ref_lse[~empty]).max(initial=0)
    limit = LSE_CAP * max(1, abs(ref_lse[~empty]).max(initial=0))
    assert error <= limit, f"lse: max error {error:.3g} > {limit:.3g}"


@dataclasses.dataclass(frozen=True)
class Case:
    """q [B, T, N, H]; k, v [B, S, K, H]; kv_len [B] int32. All NumPy."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    kv_len: np.ndarray

    def with_dead_slots(self, k_value: float, v_value: float) -> Case:
        """The same case with every slot at or past kv_len set to these values."""
        k, v = self.k.copy(), self.v.copy()
        for b, length in enumerate(self.kv_len):
            k[b, length:], v[b, length:] = k_value, v_value
        return dataclasses.replace(self, k=k, v=v)


def make_case(
    kv_len: Iterable[int], T: int = 1, N: int = 4, K: int = 2, H: int = 64, *,
    S: int | None = None, dtype: str = "float32", seed: int = 0, scale: float | None = None,
    edge: int | None = None, needles: Iterable[int] = (),
) -> Case:  # fmt: skip
    """Random normal inputs with needles where an implementation may slip, and poison past the end.

    Plain random data forgives a lost token: among 64k it weighs 1/64k. Needles are keys whose logit
    dominates, each with its own value: at slot 0, at kv_len - 1, at `needles`, and with `edge` on
    both sides of each multiple of it. Their logits rise along an even sequence and fall along an
    odd one, so a running maximum has to move. The poison at slot kv_len has four times theirs.
    """
    lengths = np.array(list(kv_len), np.int32)
    B, S = len(lengths), int(max(lengths)) + 3 if S is None else S
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.standard_normal(shape, np.float32)
        for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    )
    pull = rng.standard_normal((B, K, H), np.float32)
    pull /= np.linalg.norm(pull, axis=-1, keepdims=True)
    q += _QUERY_PULL * np.repeat(pull, N // K, axis=1)[:, None]
    # The key whose logit is 1 for a query of no other component than the shared one.
    unit = pull / np.float32(_QUERY_PULL * (H**-0.5 if scale is None else scale))
    logit = np.log(S) + 5
    for b, length in enumerate(lengths):
        edges = range(edge, length, edge) if edge else ()
        slots = {0, length - 1, *needles, *edges, *(e - 1 for e in edges)}
        slots = sorted(s for s in slots if 0 <= s < length)
        rise = np.linspace(0, 1, len(slots), dtype=np.float32)[:: 1 if b % 2 == 0 else -1]
        k[b, slots] = (logit + rise)[:, None, None] * unit[b]
        if length < S:
            k[b, length], v[b, length] = 4 * logit * unit[b], _DEAD_VALUE
    q, k, v = (x.astype(DTYPES[dtype]) for x in (q, k, v))
    return Case(q, k, v, lengths)
