"""Wide-query attention on a GPU, host side: the kernel's sizes and its call.

B batch, T query tokens, S capacity, N query heads, K KV heads, H head_dim.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxdecode.pallas_kernels.crossover import WIDE_ROWS, wide_heads
from jaxdecode.pallas_kernels.kernel_call import differentiable

if TYPE_CHECKING:
    from jaxdecode.pallas_kernels.prefill_kernel import WideConfig

Array = jax.Array
Shape = tuple[int, ...]

# Shared memory of a block, less what barriers and alignment take.
_SHARED_BYTES = 226 * 1024


def attend(
    q: Array, k: Array, v: Array, lo: Array, hi: Array, *,
    scale: float, softcap: float | None = None, sinks: Array | None = None,
    out_dtype: Any = jnp.float32,
) -> tuple[Array, Array]:  # fmt: skip
    """Attends each query to the cache slots lo <= s < hi of its sequence, 128 rows to a block.

    Arguments and results are those of `xla.attend`, and:

    Args:
      lo, hi: must not decrease along T, as in causal order with or without a window.
      out_dtype: of the result.

    A T that is not a multiple of 8 costs a padded copy of q. A NaN or infinity in a slot of v
    reaches all queries of a block as soon as one of them sees it.
    """
    forward = functools.partial(_forward, scale=scale, softcap=softcap)
    return differentiable(forward, (q, k, v, lo, hi, sinks), scale, softcap, out_dtype)


# One jit for the module, so that equal calls, such as a model's layers, share one lowering.
@functools.partial(jax.jit, static_argnames=("scale", "softcap", "out_dtype"))
def _forward(q, k, v, lo, hi, sinks, *, scale, softcap, out_dtype):
    from jaxdecode.pallas_kernels import prefill_kernel

    T = q.shape[1]
    config = wide_config(q.shape, k.shape, out_dtype, scale, softcap)
    # Rows past T repeat the last query's range, so that they widen none.
    lo, hi = (_padded(x, config.tokens, mode="edge") for x in (lo, hi))
    out, lse = prefill_kernel.wide_attention(
        _padded(q, 8, mode="constant"), k, v, lo, hi, sinks, out_dtype, config
    )
    return out[:, :T], jnp.swapaxes(lse, 1, 2)[:, :T]


def _padded(x, multiple, mode):
    """x [B, T, ...] with T rounded up; x itself where nothing is missing."""
    missing = -x.shape[1] % multiple
    padding = [(0, missing if axis == 1 else 0) for axis in range(x.ndim)]
    return jnp.pad(x, padding, mode=mode) if missing else x


def wide_config(
    q_shape: Shape, k_shape: Shape, out_dtype: Any, scale: float, softcap: float | None
) -> WideConfig:
    """The sizes of the kernel for these shapes: the tuning table."""
    from jaxdecode.pallas_kernels.prefill_kernel import WideConfig

    _, S, _, H = k_shape
    # Wide heads leave registers for narrow tiles only.
    block_kv = 128 if H <= 128 and S >= 128 else 64
    q_bytes = WIDE_ROWS * H * 2
    # The result leaves 64 columns at a time, or fewer.
    out_bytes = WIDE_ROWS * 64 * jnp.dtype(out_dtype).itemsize
    stages = (_SHARED_BYTES - q_bytes - out_bytes) // (2 * 2 * block_kv * H)
    return WideConfig(
        heads=wide_heads(q_shape, k_shape),
        block_kv=block_kv,
        stages=min(4, stages),
        scale=scale,
        softcap=softcap,
    )
