"""Bytes that one device needs: weights and cache to the byte, the compiled steps as a bound.

D model width, F feed-forward width, L layers, V vocabulary, N query heads, K KV heads, H head_dim,
S cache slots, B sequences, T tokens of each in a step of prefill.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import jax.numpy as jnp

from jaxdecode.errors import RequestError
from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.kv_cache import round_up_capacity
from jaxdecode.models.params import param_letters, param_shapes
from jaxdecode.models.sharding import Sharding
from jaxdecode.pallas_kernels import xla

MAX_CONTEXT = 2**31 - 1  # positions are int32
# XLA gives a library's matrix product 32 MiB of scratch on Hopper; two may be in flight. The slots
# of layers in one kernel, 1.5 MB at most, are within that.
_LIBRARY_BYTES = 2 * 32 * 2**20
# Copies of the logits that sampling makes: penalised, sorted with their indices, summed up.
_LOGIT_COPIES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """What is to run.

    Attributes:
      config: the model.
      context: tokens that the cache is to hold for each sequence.
      batch: sequences. A mesh axis data that does not divide them is filled with idle ones.
      dtype: of the weights.
      cache_dtype: of the cache, that of the weights when None.
      prefill_step_size: tokens of each prompt in a step of prefill.

    Raises:
      RequestError: a number is out of range.
    """

    config: LlamaConfig
    context: int
    batch: int = 1
    dtype: str
    cache_dtype: str | None = None
    prefill_step_size: int = 512

    def __post_init__(self):
        for name in ("context", "batch", "prefill_step_size"):
            if not 1 <= getattr(self, name) <= MAX_CONTEXT:
                raise RequestError(
                    f"{name} must be from 1 to {MAX_CONTEXT}, found {getattr(self, name)}"
                )

    @property
    def itemsize(self) -> int:
        """Bytes of one weight."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def cache_itemsize(self) -> int:
        """Bytes of one number in the cache."""
        return jnp.dtype(self.cache_dtype or self.dtype).itemsize

    def rows(self, sharding: Sharding) -> int:
        """Sequences on one device."""
        return -(-self.batch // sharding.data)

    def capacity(self, sharding: Sharding) -> int:
        """Slots of the cache, over all devices."""
        return round_up_capacity(self.context, sharding.parts("S"))


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      weights, cache: exact.
      workspace: at most, what generation adds: its state, and the temporaries of its steps.
    """

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace


def needed(work: Workload, sharding: Sharding, platform: str) -> Memory:
    """What each device of a mesh needs; `sharding` from `models.sharding.fit`."""
    weights = num_weights(work.config, sharding) * work.itemsize
    cache = _cache_bytes(work, sharding)
    workspace = _state_bytes(work, sharding) + _step_bytes(work, sharding, platform)
    if platform == "cpu":
        if min(work.itemsize, work.cache_itemsize) < 4:
            # XLA's matrix products on CPU take float32: it widens what is narrower, and keeps it.
            workspace += 4 * weights // work.itemsize + 4 * cache // work.cache_itemsize
    else:
        workspace += _LIBRARY_BYTES
    return Memory(weights, cache, workspace)


def num_weights(config: LlamaConfig, sharding: Sharding, *, read: bool = False) -> int:
    """Weights that one device holds; with `read`, those that it reads for each token.

    Of an embedding that is not also the head, only the token's own row is read.
    """
    letters, shapes = param_letters(config), param_shapes(config)
    alike = Counter(
        (letters[name], shapes[name])
        for name in shapes
        if not (read and name == "embed" and not config.tie_embeddings)
    )
    return sum(count * math.prod(sharding.local_shape(*array)) for array, count in alike.items())


def _cache_bytes(work: Workload, sharding: Sharding) -> int:
    config, rows = work.config, work.rows(sharding)
    shape = (
        rows * sharding.data, work.capacity(sharding), config.num_kv_heads, config.head_dim
    )  # fmt: skip
    layer = math.prod(sharding.local_shape("BSKH", shape)) * work.cache_itemsize
    return 2 * config.num_layers * layer + 4 * rows  # and the lengths


def _state_bytes(work: Workload, sharding: Sharding) -> int:
    """Logits, which tokens were seen, and the logits again for sampling: each row whole."""
    return work.rows(sharding) * work.config.vocab_size * (5 + 4 * _LOGIT_COPIES)


def _step_bytes(work: Workload, sharding: Sharding, platform: str) -> int:
    """Temporaries of a step of prefill, which are more than those of a decode step.

    The residual stream and its like live throughout; attention and feed-forward follow each other.
    """
    config, B = work.config, work.rows(sharding)
    T = min(work.prefill_step_size, work.capacity(sharding))
    D, H, F = config.embed_dim, config.head_dim, config.ffw_dim // sharding.parts("F")
    N, K = config.num_q_heads // sharding.parts("N"), config.num_kv_heads // sharding.parts("K")
    # Queries, keys and values before and after rotation; float32 results, merged over `seq`.
    attention = 2 * (N + 2 * K) * H * work.itemsize + 4 * 4 * N * H
    feed_forward = 3 * F * work.itemsize
    stream = 6 * D * work.itemsize
    S = work.capacity(sharding) // sharding.parts("S")
    blocks = xla.block_bytes((B, T, N, H), (B, S, K, H), platform)
    step = B * T * stream + max(B * T * attention + blocks, B * T * feed_forward)
    if platform == "cpu":  # where the layers' float32 results do not share their memory
        step += config.num_layers * B * T * N * H * 4
    else:  # where the portable attention may lay out a layer's keys and values anew
        S = work.capacity(sharding) // sharding.parts("S")
        step += 2 * B * S * K * H * work.cache_itemsize
    return step
