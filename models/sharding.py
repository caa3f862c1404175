"""How a model is cut over the devices of a mesh: dimension letters to mesh axes, in one table.

Model code speaks of letters only: which dimensions an array has, and over which one it sums.
B batch, S cache capacity, K KV heads, N query heads, H head_dim, D model width, F feed-forward
width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdecode.models.config import LlamaConfig
from jaxdecode.pallas_kernels import norm, peer

Array = jax.Array

AXES = ("data", "tensor", "seq")
# "peer": the GPUs write into each other's memory; "xla": what the compiler has, NCCL on GPUs.
COLLECTIVES = ("peer", "xla")
# Where "peer" was verified and timed, and so is chosen: this kind of GPU, and so many of them.
VERIFIED_KIND, VERIFIED_DEVICES = "NVIDIA H200", 2

# Within one array an axis cuts the first dimension that may have it: the cache [B, S, K, H] is cut
# along S, so it keeps whole heads, while weights [D, N, H] give `seq` a share of each head's
# columns. That divides all weights among all devices whatever the number of heads.
RULES: dict[str, tuple[str, ...]] = {
    "B": ("data",),
    "S": ("seq",),
    "K": ("tensor",),
    "N": ("tensor",),
    "H": ("seq",),
    "F": ("tensor", "seq"),
    "V": ("tensor", "seq"),
}


@dataclasses.dataclass(frozen=True)
class Sharding:
    """One model's arrays on one mesh. Hashable, so that jit can key on it.

    Attributes:
      data, tensor, seq: devices along each axis.
      whole: letters that RULES would cut but that stay whole on each device.
      mesh: None for one device, and for planning without devices.
      collectives: one of COLLECTIVES, for what a step exchanges in each layer. None: generation
        chooses, and a bare call of the model takes "xla", because "peer" has no gradient.
    """

    data: int = 1
    tensor: int = 1
    seq: int = 1
    whole: str = ""
    mesh: Mesh | None = None
    collectives: str | None = None

    def __str__(self) -> str:
        """The axes of more than one device, such as tensor=2,seq=2; empty for one device."""
        return ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1)

    @property
    def num_devices(self) -> int:
        return self.data * self.tensor * self.seq

    def axes(self, letter: str) -> tuple[str, ...]:
        """The mesh axes of more than one device that cut this dimension."""
        if letter in self.whole:
            return ()
        return tuple(axis for axis in RULES.get(letter, ()) if getattr(self, axis) > 1)

    def parts(self, letter: str) -> int:
        """Into how many parts this dimension is cut."""
        return math.prod(getattr(self, axis) for axis in self.axes(letter))

    def cuts(self, letters: str) -> list[tuple[str, ...]]:
        """The mesh axes that cut each dimension of an array, one letter per dimension."""
        cuts: list[tuple[str, ...]] = []
        for letter in letters:
            taken = {axis for axes in cuts for axis in axes}
            cuts.append(tuple(axis for axis in self.axes(letter) if axis not in taken))
        return cuts

    def spec(self, letters: str) -> PartitionSpec:
        """The same for JAX."""
        return PartitionSpec(*(axes or None for axes in self.cuts(letters)))

    def named(self, letters: str) -> NamedSharding:
        """Where an array with these dimensions lies."""
        if self.mesh is None:
            raise ValueError("this sharding has no mesh; make one with fit_mesh")
        return NamedSharding(self.mesh, self.spec(letters))

    def local_shape(self, letters: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The part of an array that one device holds."""
        parts = [math.prod(getattr(self, axis) for axis in axes) for axes in self.cuts(letters)]
        return tuple(size // part for size, part in zip(shape, parts, strict=True))

    def constrain(self, x: Array, letters: str) -> Array:
        """The same array, moved to where these letters put it."""
        if self.mesh is None:
            return x
        if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
            raise ValueError(
                "a model on a mesh cannot run inside jax.set_mesh of a mesh with Explicit axes; "
                "run it outside, or inside jax.set_mesh(model.sharding.mesh)"
            )
        return lax.with_sharding_constraint(x, self.named(letters))

    def place(self, x: np.ndarray, letters: str) -> Array:
        """An array of the host, the same in every process, on the devices."""
        if self.mesh is None:
            return jnp.asarray(x)
        # device_put would have the processes compare their arrays at each call.
        return jax.make_array_from_callback(x.shape, self.named(letters), lambda index: x[index])

    def fetch(self, x: Array) -> np.ndarray:
        """A small array's values on the host, in every process."""
        return np.asarray(x if x.is_fully_addressable else self.constrain(x, ""))

    # Below: for code inside `jax.shard_map`; with one device each is the identity.

    def mailbox(
        self, letters: str, shape: tuple[int, ...], dtype: Any, arrays: int = 1
    ) -> peer.Mailbox | None:
        """For exchanges of such arrays among the devices that hold parts of these dimensions; None
        where they are left to XLA. See `peer.open_mailbox`."""
        if self.why_not_peer(letters, shape, dtype) is not None:
            return None
        return peer.open_mailbox(shape, dtype, self._axes_of_all(letters), arrays=arrays)

    def why_not_peer(self, letters: str, shape: tuple[int, ...], dtype: Any) -> str | None:
        """Why exchanges of such arrays do not go through the peers' memory; None if they do."""
        if self.collectives != "peer":
            return f"this sharding's collectives are {self.collectives or 'xla'}"
        if not self._axes_of_all(letters):
            return f"no two devices hold different parts of {letters}"
        return peer.why_not(shape, dtype)

    def sum(self, x: Array, letters: str) -> Array:
        """x summed over the devices that hold parts of these dimensions."""
        axes = self._axes_of_all(letters)
        return lax.psum(x, axes) if axes else x

    def sum_and_norm(
        self, x: Array, delta: Array, letters: str, scale: Array, eps: float,
        mailbox: peer.Mailbox | None = None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """`norm.add_and_norm` of x and `sum` of delta, which goes through the mailbox if there is
        one."""
        axes = self._axes_of_all(letters)
        if mailbox is None or not axes:
            return norm.add_and_norm(x, self.sum(delta, letters), scale, eps)
        return peer.add_and_norm(x, delta, scale, eps, axes, mailbox)

    def gather(self, x: Array, letter: str, dimension: int) -> Array:
        """x with its cut dimension whole again, on every device."""
        axes = self.axes(letter)
        return lax.all_gather(x, axes, axis=dimension, tiled=True) if axes else x

    def index(self, letter: str) -> Array | int:
        """Which part of this dimension the device holds."""
        axes = self.axes(letter)
        return lax.axis_index(axes) if axes else 0

    def _axes_of_all(self, letters: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(axis for letter in letters for axis in self.axes(letter)))


def fit_mesh(config: LlamaConfig, mesh: Mesh) -> Sharding:
    """The sharding of this model on a mesh with any of the axes data, tensor and seq.

    Raises:
      ValueError: an axis is unknown, or does not divide what it cuts; the message says what would.
    """
    sharding = fit(config, dict(mesh.shape))
    # With Explicit axes JAX would ask for a sharding at every ambiguous operation.
    return dataclasses.replace(sharding, mesh=Mesh(mesh.devices, mesh.axis_names))


def choose_collectives(mesh: Mesh) -> tuple[str, str]:
    """Which of COLLECTIVES serves small arrays on a mesh, and why."""
    if (obstacle := peer.why_not_here(mesh)) is not None:
        return "xla", obstacle
    kind, count = mesh.devices.flat[0].device_kind, mesh.devices.size
    if kind != VERIFIED_KIND or count > VERIFIED_DEVICES:
        return "xla", (
            "exchanges through the peers' memory are verified on up to "
            f"{VERIFIED_DEVICES} {VERIFIED_KIND} so far, and the mesh is of {count} {kind}"
        )
    return "peer", "the GPUs of this process write into each other's memory"


def fit(config: LlamaConfig, sizes: Mapping[str, int]) -> Sharding:
    """Like `fit_mesh`, from the number of devices along each axis, for planning."""
    unknown = [axis for axis in sizes if axis not in AXES]
    if unknown:
        raise ValueError(f"mesh axes must be among {', '.join(AXES)}; found {', '.join(unknown)}")
    for axis, size in sizes.items():
        if size < 1:
            raise ValueError(f"mesh axis {axis}={size} must be at least 1")
    sharding = Sharding(sizes.get("data", 1), sizes.get("tensor", 1), sizes.get("seq", 1))
    _check_divides(config, sharding, "tensor", sharding.tensor, "num_kv_heads", config.num_kv_heads)
    _check_divides(config, sharding, "seq", sharding.seq, "head_dim", config.head_dim)
    cut = sharding.tensor * sharding.seq
    _check_divides(config, sharding, "tensor * seq", cut, "ffw_dim", config.ffw_dim)
    if config.vocab_size % cut:
        sharding = dataclasses.replace(sharding, whole="V")
    return sharding


def auto_sizes(config: LlamaConfig, num_devices: int) -> dict[str, int]:
    """Axis sizes for all devices: heads first, the length of the cache where KV heads run out.

    Raises:
      ValueError: no mesh of so many devices fits; the message names the next smaller that does.
    """
    if num_devices < 1:
        raise ValueError(f"num_devices must be at least 1, found {num_devices}")
    sizes = _largest_fitting(config, num_devices)
    fitting = math.prod(sizes.values())
    if fitting < num_devices:
        raise ValueError(
            f"no mesh over {num_devices} devices divides num_kv_heads={config.num_kv_heads}, "
            f"head_dim={config.head_dim} and ffw_dim={config.ffw_dim}; the next smaller number "
            f"that fits is {fitting}"
        )
    return sizes


def describe(config: LlamaConfig, sharding: Sharding) -> str:
    """One line for people: the mesh, and what it does that they may not expect."""
    text = "mesh: " + ", ".join(f"{axis}={getattr(sharding, axis)}" for axis in AXES)
    cut = sharding.tensor * sharding.seq
    if sharding.seq > 1:
        text += "; the KV cache is cut along its length over seq"
        if config.num_kv_heads % cut:
            text += f", as {config.num_kv_heads} KV heads do not divide among {cut} devices"
    if "V" in sharding.whole:
        text += (
            f"; embedding and output are whole on each device, as {cut} does not divide the "
            f"vocabulary of {config.vocab_size}"
        )
    return text


def _largest_fitting(config: LlamaConfig, num_devices: int) -> dict[str, int]:
    """The mesh of at most so many devices, as many as fit; one always does."""
    return next(
        sizes for n in range(num_devices, 0, -1) if (sizes := _best_sizes(config, n)) is not None
    )


def _best_sizes(config: LlamaConfig, num_devices: int) -> dict[str, int] | None:
    if config.ffw_dim % num_devices:
        return None
    for tensor in range(min(num_devices, config.num_kv_heads), 0, -1):
        seq, rest = divmod(num_devices, tensor)
        if rest == 0 and config.num_kv_heads % tensor == 0 and config.head_dim % seq == 0:
            return {"data": 1, "tensor": tensor, "seq": seq}
    return None


def _check_divides(
    config: LlamaConfig, sharding: Sharding, axis: str, size: int, name: str, value: int
) -> None:
    if value % size == 0:
        return
    divisors = ", ".join(str(n) for n in range(1, min(value, 1024) + 1) if value % n == 0)
    best = _largest_fitting(config, sharding.tensor * sharding.seq)
    raise ValueError(
        f"mesh axis {axis}={size} does not divide {name}={value} (divisors: {divisors}); "
        f"tensor={best['tensor']},seq={best['seq']} fits"
    )
