"""The oracle of reference.py a KV head at a time, for the lengths of the GPU tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from reference import visible_slots


def attention_oracle(
    q: Any, k: Any, v: Any, kv_len: Any, *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Any = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """out [B, T, N, H] and lse [B, T, N] in float64, as reference_attention gives them."""
    B, T, N, H = q.shape
    _, S, K, _ = k.shape
    G = N // K
    out, lse = np.zeros((B, T, N, H)), np.full((B, T, N), -np.inf)
    for b in range(B):
        slots = [visible_slots(b, t, T, S, kv_len, None, window) for t in range(T)]
        end = max((s[-1] + 1 for s in slots if s.size), default=0)
        begin = min((s[0] for s in slots if s.size), default=0)
        hidden = np.ones((T, 1, end - begin), bool)
        for t in range(T):
            hidden[t, :, slots[t] - begin] = False
        for h in range(K):
            heads = slice(h * G, (h + 1) * G)
            keys, values = (x[b, begin:end, h].astype(np.float64) for x in (k, v))
            logits = (q[b, :, heads].astype(np.float64).reshape(T * G, H) @ keys.T) * H**-0.5
            if softcap is not None:
                logits = softcap * np.tanh(logits / softcap)
            logits = np.where(hidden, -np.inf, logits.reshape(T, G, end - begin))
            if sinks is not None:
                sink = np.broadcast_to(sinks[heads].astype(np.float64)[:, None], (T, G, 1))
                logits = np.concatenate([logits, sink], axis=2)
                values = np.append(values, np.zeros((1, H)), axis=0)
            top = logits.max(axis=2, keepdims=True, initial=-np.inf)
            top[np.isneginf(top)] = 0
            weights = np.exp(logits - top)
            total = weights.sum(axis=2)
            merged = (weights.reshape(T * G, -1) @ values).reshape(T, G, H)
            out[b, :, heads] = merged / np.where(total == 0, 1, total)[..., None]
            with np.errstate(divide="ignore"):
                lse[b, :, heads] = top[..., 0] + np.log(total)
    return out, lse
