"""Models with random weights, for tests and measurements: nothing is read from a file."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.llama import Llama
from jaxdecode.models.params import param_letters, param_shapes
from jaxdecode.models.sharding import Sharding, fit_mesh

Array = jax.Array


def random_model(
    config: LlamaConfig, dtype: Any = None, *, mesh: Mesh | None = None, seed: int = 0
) -> Llama:
    """A model of random weights, the same for a seed whatever the mesh, made where they will lie.

    One program per shape is compiled, not one per weight. None needs room beside its result, so a
    model may nearly fill the memory.

    Args:
      dtype: of the weights; the configuration's own when None.
      mesh: as for `jaxdecode.load`; None for the default device.
      seed: integer.

    Raises:
      ValueError: the mesh does not divide the model.
    """
    dtype = jnp.dtype(config.dtype if dtype is None else dtype)
    sharding = Sharding() if mesh is None else fit_mesh(config, mesh)
    shapes, letters = param_shapes(config), param_letters(config)
    # About what keeps activations near one, so that nothing overflows in 16 bits.
    scale = config.embed_dim**-0.5
    params = {}
    for i, (name, shape) in enumerate(shapes.items()):
        place = None if mesh is None else sharding.named(letters[name])
        stream = np.uint32((seed * len(shapes) + i) % 2**32)
        params[name] = (
            jnp.ones(shape, dtype, device=place)
            if name.endswith(".scale")
            else random_array(stream, shape, dtype, scale, place)
        )
    return Llama.from_params(config, params, sharding)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "scale", "place"))
def random_array(
    stream: Array | np.uint32,
    shape: tuple[int, ...],
    dtype: Any,
    scale: float = 1.0,
    place: NamedSharding | None = None,
) -> Array:
    """Evenly distributed values with mean 0 and standard deviation `scale`.

    A hash of each element's index instead of `jax.random`, whose generator writes its 32-bit
    numbers to memory first: several times what an array of 16-bit weights takes.

    Args:
      stream: uint32 scalar; arrays of different streams have different values.
      shape: of fewer than 2^32 elements; beyond that the values repeat.
      place: where it shall lie, each device making its own part; None for the default device.
    """
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):  # modulo 2^32, as all that follows
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    bits = _mixed(index + _mixed(jnp.asarray(stream, jnp.uint32)))
    # 24 bits are what a float32 holds. An even distribution of width w deviates by w / sqrt(12).
    even = (bits >> 8).astype(jnp.float32) * np.float32(2.0**-24) - np.float32(0.5)
    made = (even * np.float32(scale * math.sqrt(12.0))).astype(dtype)
    return made if place is None else lax.with_sharding_constraint(made, place)


def _mixed(x: Array) -> Array:
    """The finaliser of MurmurHash3: each bit of the result depends on all bits of x (uint32)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
