"""Runs decode_attention on a case of reference.py and holds it against the oracle there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from reference import Case, assert_close, low_precision_attention, reference_attention

from jaxdecode.pallas_kernels.decode_attention import decode_attention

# The contract suite runs once for each. A new implementation is one more entry.
IMPLEMENTATIONS = ["xla"]


_STATIC = ("scale", "window", "softcap", "implementation", "out_dtype", "return_lse")
_jitted = jax.jit(decode_attention, static_argnames=_STATIC)


def run(case: Case, implementation: str, *, jit: bool = True, **options: Any) -> tuple[Any, Any]:
    """(out, lse) as NumPy arrays. q_start and sinks are traced, like q, k, v and kv_len."""
    options |= {k: jnp.asarray(v) for k, v in options.items() if k in ("q_start", "sinks")}
    call = _jitted if jit else decode_attention
    inputs = [jnp.asarray(x) for x in dataclasses.astuple(case)]
    results = call(*inputs, **options, implementation=implementation, return_lse=True)
    return jax.tree.map(np.asarray, results)


def check(case: Case, implementation: str, *, out_dtype: Any = None, **options: Any) -> None:
    """Runs the case and fails unless out and lse are as good as the tolerance demands."""
    inputs = dataclasses.astuple(case)
    out, lse = run(case, implementation, out_dtype=out_dtype, **options)
    ref, ref_lse = reference_attention(*inputs, **options)
    low = low_precision_attention(*inputs, **options, out_dtype=out_dtype)
    assert_close(out, ref, low, case.q.dtype, lse=lse, ref_lse=ref_lse)


def count_compiles(call: Callable[[], object]) -> int:
    """How many programs XLA compiles while `call` runs, whether or not it raises."""
    count = 0

    def listener(event: str, *_: Any, **__: Any) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        call()
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    return count
