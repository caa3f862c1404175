"""The KV cache: keys and values of every layer, and how much of each sequence is filled.

L layers, B batch, S capacity in tokens, K KV heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.sharding import Sharding
from jaxdecode.pallas_kernels import Part
from jaxdecode.pallas_kernels.rope_append import write_slots

Array = jax.Array

# Shards are dealt so many slots at a time. The tiles in which kernels read the cache divide it.
BLOCK = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values per layer, for sequences of different lengths.

    A pytree. Each layer has arrays of its own, so that a jitted step which takes the cache donated
    writes it in place. Sequence b's tokens stand in slots 0 .. lengths[b] - 1; over several devices
    they are dealt round-robin, 128 at a time, so that no device grows alone.

    Attributes:
      keys, values: L arrays [B, S, K, H].
      lengths: [B] int32, tokens given so far; above S once a sequence has overflowed.
      num_parts: devices over which S is cut.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    lengths: Array
    num_parts: int = dataclasses.field(default=1, metadata={"static": True})

    @classmethod
    def create(
        cls, config: LlamaConfig, batch_size: int, capacity: int, dtype: jnp.dtype | str,
        sharding: Sharding | None = None,
    ) -> KVCache:  # fmt: skip
        """An empty cache. `capacity` is rounded up to a multiple of 128 slots on each device.

        Raises:
          ValueError: batch_size or capacity is below 1, or the mesh axis data does not divide
            batch_size.
        """
        if batch_size < 1 or capacity < 1:
            raise ValueError(
                f"batch_size and capacity must be at least 1, found {batch_size} and {capacity}"
            )
        sharding = sharding or Sharding()
        if batch_size % sharding.data:
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of data={sharding.data} in the mesh; "
                f"make {-(-batch_size // sharding.data) * sharding.data} rows, of which some idle"
            )
        parts = sharding.parts("S")
        shape = (
            batch_size, round_up_capacity(capacity, parts), config.num_kv_heads, config.head_dim,
        )  # fmt: skip
        make = _empty if sharding.mesh is None else _empty_on_mesh
        return make(config.num_layers, shape, jnp.dtype(dtype), sharding)

    @property
    def capacity(self) -> int:
        """S, in tokens; inside `jax.shard_map`, of this device's part."""
        return self.keys[0].shape[1]

    @property
    def batch_size(self) -> int:
        return self.keys[0].shape[0]

    @property
    def overflowed(self) -> Array:
        """[B] bool: the sequence was given more tokens than fit; those past the end are lost."""
        return self.lengths > self.capacity

    def append(
        self, layer: int, k: Array, v: Array, num_tokens: Array, index: Array | int = 0
    ) -> KVCache:
        """Writes one layer's new tokens behind each sequence. Call `advance` once after all layers.

        A cache in several parts is written inside `jax.shard_map`, each device its own part.

        Args:
          layer: which layer.
          k, v: [B, T, K, H], right-padded.
          num_tokens: [B] int32, how many of the T are real; the rest is not written.
          index: of this device's part.
        """
        slots = self.slots(k.shape[1], num_tokens, index)
        keys, values = self.keys[layer], self.values[layer]
        return self.with_layer(layer, write_slots(keys, k, slots), write_slots(values, v, slots))

    def slots(self, T: int, num_tokens: Array, index: Array | int = 0) -> Array:
        """Where `append` writes T new tokens of each sequence, [B, T] int32. Tokens that are not
        written, be they padding, another device's or past the end, get slots from S on."""
        offset = jnp.arange(T, dtype=jnp.int32)[None, :]
        slot, mine = self.part(index).slot(self.lengths[:, None] + offset)
        return jnp.where(mine & (offset < num_tokens[:, None]), slot, self.capacity + offset)

    def with_layer(self, layer: int, keys: Array, values: Array) -> KVCache:
        """The cache with other arrays for one layer."""
        return dataclasses.replace(
            self,
            keys=(*self.keys[:layer], keys, *self.keys[layer + 1 :]),
            values=(*self.values[:layer], values, *self.values[layer + 1 :]),
        )

    def part(self, index: Array | int) -> Part:
        """Which slots the device with this index holds."""
        return Part(index, self.num_parts, BLOCK)

    def advance(self, num_tokens: Array) -> KVCache:
        """Counts the appended tokens: lengths grow by num_tokens [B]."""
        return dataclasses.replace(self, lengths=self.lengths + num_tokens)

    def truncate(self, lengths: Array | int) -> KVCache:
        """Forgets the tokens past `lengths` ([B] or scalar); a sequence never grows by this."""
        kept = jnp.clip(jnp.asarray(lengths, jnp.int32), 0, self.capacity)
        kept = jnp.broadcast_to(kept, self.lengths.shape)
        return dataclasses.replace(self, lengths=jnp.minimum(self.lengths, kept))


# Compiled, because of the time that the host takes for each of many arrays.
_zeros = jax.jit(jnp.zeros, static_argnums=(0, 1))


def _empty(
    num_layers: int, shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding
) -> KVCache:
    def layers() -> tuple[Array, ...]:
        return tuple(sharding.constrain(_zeros(shape, dtype), "BSKH") for _ in range(num_layers))

    lengths = sharding.constrain(jnp.zeros(shape[0], jnp.int32), "B")
    return KVCache(layers(), layers(), lengths, sharding.parts("S"))


# Compiled, so that each device makes its own part.
_empty_on_mesh = jax.jit(_empty, static_argnums=(0, 1, 2, 3))


def cache_tree(config: LlamaConfig, num_parts: int, make: Callable[[str], Any]) -> KVCache:
    """A cache with make(dimension letters) in the place of each array: its specs or shardings."""
    layers = (make("BSKH"),) * config.num_layers
    return KVCache(layers, layers, make("B"), num_parts)


def round_up_capacity(capacity: int, num_parts: int = 1) -> int:
    """The number of slots a cache for `capacity` tokens has, over all its parts."""
    step = BLOCK * num_parts
    return -(-capacity // step) * step
