"""Flash-Decoding on a GPU, host side: what the kernels can do, their sizes, and their gradient.

B batch, T query tokens, S capacity, N query heads, K KV heads, G = N // K, H head_dim.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxdecode.pallas_kernels.varying import vary_alike
from jaxdecode.pallas_kernels.xla import attend_gradient

if TYPE_CHECKING:
    from jaxdecode.pallas_kernels.flash_decode_kernel import SplitConfig

Array = jax.Array
Shape = tuple[int, ...]

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (128,)
# Streaming multiprocessors of an H100 or H200.
_NUM_SMS = 132
# Shared memory for the ring of K and V tiles; the rest of 227 KB holds q, weights and the result.
_RING_BYTES = 128 * 1024


def why_not(q: Any, k: Any) -> str | None:
    """Why the kernels cannot serve arrays of these shapes and dtypes; None if they can."""
    S, H = k.shape[1], q.shape[3]
    if q.dtype not in DTYPES:
        return f"the kernels take {' and '.join(DTYPES)}, not {q.dtype}"
    if H not in HEAD_DIMS:
        return f"the kernels take head_dim {' or '.join(map(str, HEAD_DIMS))}, not {H}"
    if S % 8 or S < 64:
        return f"the kernels need a capacity that is a multiple of 8 and at least 64, not {S}"
    return None


def why_not_here() -> str | None:
    """Why the kernels cannot run on this machine; None if they can."""
    if jax.default_backend() != "gpu":
        return f"the kernels need an NVIDIA Hopper GPU, and JAX runs on {jax.default_backend()}"
    if jax.__version_info__ < (0, 11, 2):
        return f"GPU kernels need Python >= 3.12 and jax >= 0.11.2, this is jax {jax.__version__}"
    device = jax.devices("gpu")[0]
    capability = getattr(device, "compute_capability", "unknown")
    if capability != "9.0":
        return (
            "the kernels need an NVIDIA Hopper GPU (compute capability 9.0), and "
            f"{device.device_kind} has {capability}"
        )
    return None


def attend(
    q: Array, k: Array, v: Array, lo: Array, hi: Array, *,
    scale: float, softcap: float | None = None, sinks: Array | None = None,
    num_splits: int | None = None, out_dtype: Any = jnp.float32,
) -> tuple[Array, Array]:  # fmt: skip
    """Attends each query to the cache slots lo <= s < hi of its sequence, the keys cut in chunks.

    Arguments and results are those of `xla.attend`, and:

    Args:
      num_splits: chunks per sequence; None for about one per multiprocessor in all.
      out_dtype: of the result.
    """
    if num_splits is None:
        num_splits = choose_num_splits(q.shape, k.shape)
    sinks = None if sinks is None else sinks.astype(jnp.float32)
    return _attend(q, k, v, lo, hi, sinks, scale, softcap, num_splits, jnp.dtype(out_dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _attend(q, k, v, lo, hi, sinks, scale, softcap, num_splits, out_dtype):
    return _forward(q, k, v, lo, hi, sinks, scale, softcap, num_splits, out_dtype)


def _attend_fwd(q, k, v, lo, hi, sinks, scale, softcap, num_splits, out_dtype):
    out, lse = _forward(q, k, v, lo, hi, sinks, scale, softcap, num_splits, jnp.dtype(jnp.float32))
    return (out.astype(out_dtype), lse), (q, k, v, lo, hi, sinks, out, lse)


def _attend_bwd(scale, softcap, num_splits, out_dtype, residuals, cotangents):
    q, k, v, lo, hi, sinks, out, lse = residuals
    d_out, d_lse = cotangents
    dq, dk, dv = attend_gradient(
        q, k, v, lo, hi, out, lse, d_out, d_lse, scale=scale, softcap=softcap
    )
    if sinks is None:
        return dq, dk, dv, None, None, None
    # A sink is a logit whose value is zero: only the normalisation feels it.
    delta = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1) - d_lse
    weight = jnp.exp(sinks[None, None, :] - lse)
    return dq, dk, dv, None, None, -jnp.sum(weight * delta, axis=(0, 1))


_attend.defvjp(_attend_fwd, _attend_bwd)


# One jit for the module, so that equal calls, such as a model's layers, share one lowering.
@functools.partial(jax.jit, static_argnums=(6, 7, 8, 9))
def _forward(q, k, v, lo, hi, sinks, scale, softcap, num_splits, out_dtype):
    from jaxdecode.pallas_kernels import flash_decode_kernel as kernels

    config = split_config(q.shape, k.shape, num_splits, scale, softcap)
    partials = kernels.split_attention(q, k, v, lo, hi, config)
    results = kernels.combine_splits(*partials, sinks, q.shape[:3], out_dtype, config)
    # Inside shard_map a kernel's results would count as equal on all devices.
    return vary_alike(*results, q)[:2]


def split_config(
    q_shape: Shape, k_shape: Shape, num_splits: int, scale: float, softcap: float | None
) -> SplitConfig:
    """The sizes of the kernels for these shapes: the tuning table."""
    from jaxdecode.pallas_kernels.flash_decode_kernel import SplitConfig

    block_t, block_g, row_blocks_t, row_blocks_g = _row_blocks(q_shape, k_shape)
    # Few rows leave registers for wide tiles.
    block_kv = 128 if k_shape[1] >= 128 and block_t * block_g <= 16 else 64
    return SplitConfig(
        num_splits=num_splits,
        block_kv=block_kv,
        stages=min(6, _RING_BYTES // (2 * 2 * block_kv * q_shape[3])),
        block_t=block_t,
        block_g=block_g,
        row_blocks_t=row_blocks_t,
        row_blocks_g=row_blocks_g,
        scale=scale,
        softcap=softcap,
    )


def choose_num_splits(q_shape: Shape, k_shape: Shape, num_sms: int = _NUM_SMS) -> int:
    """Chunks per sequence that keep the multiprocessors busy: the fewest within 10 % of the best.

    At most one for each 64 keys of the capacity."""
    _, _, row_blocks_t, row_blocks_g = _row_blocks(q_shape, k_shape)
    blocks = k_shape[0] * k_shape[2] * row_blocks_t * row_blocks_g
    most = max(1, min(num_sms, k_shape[1] // 64))

    def busy(splits: int) -> float:
        waves = blocks * splits / num_sms
        return waves / -(-blocks * splits // num_sms)

    best = max(busy(splits) for splits in range(1, most + 1))
    return next(splits for splits in range(1, most + 1) if busy(splits) >= 0.9 * best)


def _row_blocks(q_shape: Shape, k_shape: Shape) -> tuple[int, int, int, int]:
    """block_t, block_g and how many of each: as many tokens as fit beside the heads of a group."""
    _, T, N, _ = q_shape
    G = N // k_shape[2]
    limit = 64  # what registers and shared memory leave room for
    block_g = min(G, limit)
    block_t = min(T, limit // block_g)
    return block_t, block_g, -(-T // block_t), -(-G // block_g)
