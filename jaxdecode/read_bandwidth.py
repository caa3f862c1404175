"""How fast this device reads its memory: the ceiling of decoding, measured.

Decoding reads every weight and the whole KV cache for each token, so its speed is bounded by bytes
over this rate. A data sheet's figure is never reached: what counts is what some program reaches.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxdecode.errors import RequestError
from jaxdecode.models.random_model import random_array
from jaxdecode.pallas_kernels import flash_decode
from jaxdecode.pallas_kernels.split_config import NUM_SMS

Array = jax.Array

METHODS = ("copy", "sum", "matvec", "tma")
# Just under 2^31 elements of two bytes: beyond, programs need 64-bit offsets.
_GPU_BYTES = 4_100_000_000
_CPU_BYTES = 2**29
_WIDTH = 8192  # of the matrix whose weights a vector is multiplied with, as in a large model
_COLUMNS = 128
_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class ReadCeiling:
    """What was measured.

    Attributes:
      bytes_per_second: of the fastest method.
      method: which one that is.
      methods: bytes per second of each: "copy" (bytes read and written), "sum" of all elements,
        "matvec" (a vector times a matrix of weights), "tma" (a kernel that only reads, by the copy
        engine of Hopper GPUs), "tma2" (the same with two blocks per multiprocessor).
      num_bytes: size of the array that each of them read.
    """

    bytes_per_second: float
    method: str
    methods: dict[str, float]
    num_bytes: int

    def __str__(self) -> str:
        others = (f"{name} {rate / 1e9:.0f}" for name, rate in self.methods.items())
        return f"{self.bytes_per_second / 1e9:.0f} GB/s by {self.method} ({', '.join(others)})"


def measure_read_ceiling(
    *, num_bytes: int | None = None, methods: Sequence[str] | None = None, seconds: float = 0.1
) -> ReadCeiling:
    """Reads a large array in several ways and takes the best.

    Call it before the memory is full: a copy needs the array twice.

    Args:
      num_bytes: size of the array. None: 4.1 GB on a GPU and 0.5 GB elsewhere, less where memory is
        short. On a processor whose cache holds much of it, the ceiling is partly the cache's.
      methods: of METHODS; None for all that run here.
      seconds: about how long each of three rounds per method takes, at least one pass over the
        array.

    Raises:
      RequestError: `num_bytes` is too small, or a method is unknown or does not run here.
    """
    gpu = jax.default_backend() == "gpu"
    dtype = jnp.dtype(jnp.bfloat16 if gpu else jnp.float32)
    num_bytes = _fitting_bytes() if num_bytes is None else num_bytes
    smallest = dtype.itemsize * _WIDTH * _COLUMNS
    if num_bytes < smallest:
        raise RequestError(f"num_bytes must be at least {smallest}, found {num_bytes}")
    shape = (num_bytes // smallest * _WIDTH, _COLUMNS)
    x = jax.block_until_ready(random_array(np.uint32(0), shape, dtype))
    rates = {}
    for method in _checked(methods):
        for name, passes, read in _readers(method, x):
            rates[name] = passes * x.nbytes / _best_seconds(read, seconds)
    best = max(rates, key=lambda name: rates[name])
    return ReadCeiling(rates[best], best, rates, x.nbytes)


def _fitting_bytes() -> int:
    """The usual size, or as much as leaves room for it twice and more."""
    limits = jax.devices()[0].memory_stats()
    if limits and "bytes_limit" in limits:
        return min(_GPU_BYTES, (limits["bytes_limit"] - limits.get("bytes_in_use", 0)) // 3)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(_CPU_BYTES, physical // 16)


def _checked(methods: Sequence[str] | None) -> list[str]:
    obstacle = flash_decode.why_not_here()
    if methods is None:
        return [name for name in METHODS if name != "tma" or obstacle is None]
    for name in methods:
        if name not in METHODS:
            raise RequestError(f"a method must be one of {', '.join(METHODS)}, found {name!r}")
        if name == "tma" and obstacle is not None:
            raise RequestError(f"method 'tma' does not run here: {obstacle}")
    if not methods:
        raise RequestError(f"give at least one method of {', '.join(METHODS)}")
    return list(methods)


def _readers(method: str, x: Array) -> list[tuple[str, int, Callable[[], Array]]]:
    """(name, how often the array's bytes move in one call, the call) for each way of a method."""
    if method == "copy":
        return [("copy", 2, _copier(x))]
    if method == "sum":
        return [("sum", 1, lambda: _sum(x))]
    if method == "matvec":
        v = jnp.ones(_WIDTH, x.dtype)
        return [("matvec", 1, lambda: _matvec(v, x))]
    from jaxdecode.pallas_kernels.read_kernel import read_sums

    return [
        ("tma", 1, lambda: read_sums(x, num_blocks=NUM_SMS)),
        ("tma2", 1, lambda: read_sums(x, num_blocks=2 * NUM_SMS)),
    ]


def _copier(x: Array) -> Callable[[], Array]:
    """Copies x over the same second array in each call."""
    target = [jnp.zeros_like(x)]

    def copy() -> Array:
        target[0] = _copied(x, target[0])
        return target[0]

    return copy


# The second array is given away and never read, so the result takes its place.
_copied = jax.jit(lambda x, over: x, donate_argnums=1, keep_unused=True)
_sum = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
_matvec = jax.jit(lambda v, x: v @ x.reshape(v.size, -1))


def _best_seconds(read: Callable[[], Array], seconds: float) -> float:
    """Seconds of one call, the best of some rounds of calls back to back."""
    jax.block_until_ready(read())  # compiles
    count = max(1, int(seconds / _seconds(read, 1)))
    return min(_seconds(read, count) for _ in range(_ROUNDS)) / count


def _seconds(read: Callable[[], Array], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count - 1):
        read()
    jax.block_until_ready(read())
    return time.perf_counter() - start
