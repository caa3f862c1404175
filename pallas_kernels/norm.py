"""What stands between two products of a decoder, the residual and the norm, as one operation.

XLA makes three kernels of it on a GPU, and at one token each costs a launch and little else.
B batch, T tokens, D model width.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxdecode.pallas_kernels import flash_decode
from jaxdecode.pallas_kernels.kernel_call import with_plain_gradient
from jaxdecode.pallas_kernels.mosaic import THREADS
from jaxdecode.pallas_kernels.split_config import NUM_SMS
from jaxdecode.pallas_kernels.varying import vary_alike

Array = jax.Array

DTYPES = ("bfloat16", "float16", "float32")
# More rows occupy every multiprocessor: XLA's kernels are then bound by the memory, like ours.
MAX_ROWS = NUM_SMS
# A row's threads hold all of it in registers.
MAX_ROW_BYTES = 32 * 1024
# The fewest elements of a row worth a thread block: eight for each thread.
_PART = 8 * THREADS


def add_and_norm(x: Array, delta: Array, scale: Array, eps: float) -> tuple[Array, Array]:
    """Adds to the residual stream, and normalises the sum for what reads it next.

    On a Hopper GPU a kernel does it where `why_not` finds no obstacle. Its results differ from
    those of `plain` by the order in which the squares are added, and by nothing else.

    Args:
      x, delta: [B, T, D] of one dtype. scale: [D] of the same.
      eps: added to the mean square.

    Returns:
      (x + delta, (x + delta) / rms(x + delta) * scale), both [B, T, D] in that dtype.
    """
    if (why_not(x.shape, x.dtype) or flash_decode.why_not_here()) is not None:
        return plain(x, delta, scale, eps=eps)
    return _by_platform(*vary_alike(x, delta, scale), eps=eps)


# One jit for the module, so that equal calls, such as a model's layers, share one trace.
@functools.partial(jax.jit, static_argnames="eps")
def _by_platform(x, delta, scale, *, eps):
    kernel, formula = functools.partial(_kernel, eps=eps), functools.partial(plain, eps=eps)
    # Decided when it is lowered: a process with a GPU may compile this call for its CPU.
    return lax.platform_dependent(
        x, delta, scale,
        cuda=lambda *operands: with_plain_gradient(kernel, formula, operands),
        default=formula,
    )  # fmt: skip


def plain(x: Array, delta: Array, scale: Array, *, eps: float) -> tuple[Array, Array]:
    """`add_and_norm` for any device. The mean square is taken in float32, of the rounded sum."""
    x = x + delta
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    normal = (x32 * lax.rsqrt(mean_square + eps)).astype(x.dtype)
    return x, normal * scale[None, None, :]


def why_not(shape: tuple[int, ...], dtype: Any) -> str | None:
    """Why the kernel is not for x [B, T, D] of this dtype; None if it is."""
    B, T, D = shape
    if jnp.dtype(dtype) not in DTYPES:
        return f"the kernel takes {', '.join(DTYPES)}, not {jnp.dtype(dtype)}"
    if D % 8 or D < THREADS:
        return f"the kernel takes rows of a multiple of 8 and at least {THREADS}, not {D}"
    if D * jnp.dtype(dtype).itemsize > MAX_ROW_BYTES:
        return f"the kernel takes rows of at most {MAX_ROW_BYTES} bytes, not {D} of {dtype}"
    if not 1 <= B * T <= MAX_ROWS:
        return f"the kernel is for 1 to {MAX_ROWS} rows, not {B * T}"
    return None


def choose_parts(rows: int, D: int) -> int:
    """Into how many parts a row is cut, with a thread block for each: as many as find an idle
    multiprocessor and have something to do."""
    fitting = (n for n in range(D // _PART, 1, -1) if D % (n * THREADS) == 0)
    return next((n for n in fitting if n * rows <= NUM_SMS), 1)


def _kernel(x: Array, delta: Array, scale: Array, *, eps: float) -> tuple[Array, Array]:
    rows, D = math.prod(x.shape[:-1]), x.shape[-1]
    parts = choose_parts(rows, D)
    total, normed = _rows(x.reshape(rows, D), delta.reshape(rows, D), scale, eps=eps, parts=parts)
    return total.reshape(x.shape), normed.reshape(x.shape)


# A jit of its own, so that one kernel serves calls of which both results are wanted, and one.
@functools.partial(jax.jit, static_argnames=("eps", "parts"))
def _rows(x, delta, scale, *, eps, parts):
    from jaxdecode.pallas_kernels import norm_kernel

    return norm_kernel.add_and_norm(x, delta, scale, eps=eps, parts=parts)
