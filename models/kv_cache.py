"""The KV cache: keys and values of every layer, and how much of each sequence is filled.

L layers, B batch, S capacity in tokens, K KV heads, H head_dim.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxdecode.models.config import LlamaConfig

Array = jax.Array

# Kernels read the cache in blocks of this many slots.
CAPACITY_MULTIPLE = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values per layer, for sequences of different lengths.

    A pytree. Each layer has arrays of its own, so that a jitted step which takes the cache donated
    writes it in place. Sequence b's tokens stand in slots 0 .. lengths[b] - 1.

    Attributes:
      keys, values: L arrays [B, S, K, H].
      lengths: [B] int32, tokens given so far; above S once a sequence has overflowed.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    lengths: Array

    @classmethod
    def create(
        cls, config: LlamaConfig, batch_size: int, capacity: int, dtype: jnp.dtype | str
    ) -> KVCache:
        """An empty cache. `capacity` is rounded up to a multiple of 128 slots."""
        if batch_size < 1 or capacity < 1:
            raise ValueError(
                f"batch_size and capacity must be at least 1, found {batch_size} and {capacity}"
            )
        slots = round_up_capacity(capacity)
        shape = (batch_size, slots, config.num_kv_heads, config.head_dim)
        layers = range(config.num_layers)
        return cls(
            keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
            values=tuple(jnp.zeros(shape, dtype) for _ in layers),
            lengths=jnp.zeros(batch_size, jnp.int32),
        )

    @property
    def capacity(self) -> int:
        """S, in tokens."""
        return self.keys[0].shape[1]

    @property
    def batch_size(self) -> int:
        return self.keys[0].shape[0]

    @property
    def overflowed(self) -> Array:
        """[B] bool: the sequence was given more tokens than fit; those past the end are lost."""
        return self.lengths > self.capacity

    def append(self, layer: int, k: Array, v: Array, num_tokens: Array) -> KVCache:
        """Writes one layer's new tokens behind each sequence. Call `advance` once after all layers.

        Args:
          layer: which layer.
          k, v: [B, T, K, H], right-padded.
          num_tokens: [B] int32, how many of the T are real; the rest is not written.
        """
        B, T, _, _ = k.shape
        offset = jnp.arange(T, dtype=jnp.int32)[None, :]
        # Slots from S on are dropped: padding goes there, and so does what overflows.
        # A dynamic_update_slice would clamp instead, over the newest tokens.
        slot = jnp.where(
            offset < num_tokens[:, None], self.lengths[:, None] + offset, self.capacity + offset
        )
        row = jnp.broadcast_to(jnp.arange(B, dtype=jnp.int32)[:, None], slot.shape)

        def write(cache: Array, new: Array) -> Array:
            return cache.at[row, slot].set(
                new.astype(cache.dtype), mode="drop", unique_indices=True
            )

        keys, values = list(self.keys), list(self.values)
        keys[layer], values[layer] = write(keys[layer], k), write(values[layer], v)
        return dataclasses.replace(self, keys=tuple(keys), values=tuple(values))

    def advance(self, num_tokens: Array) -> KVCache:
        """Counts the appended tokens: lengths grow by num_tokens [B]."""
        return dataclasses.replace(self, lengths=self.lengths + num_tokens)

    def truncate(self, lengths: Array | int) -> KVCache:
        """Forgets the tokens past `lengths` ([B] or scalar); a sequence never grows by this."""
        kept = jnp.clip(jnp.asarray(lengths, jnp.int32), 0, self.capacity)
        kept = jnp.broadcast_to(kept, self.lengths.shape)
        return dataclasses.replace(self, lengths=jnp.minimum(self.lengths, kept))


def round_up_capacity(capacity: int) -> int:
    """The number of slots a cache for `capacity` tokens has."""
    return -(-capacity // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
