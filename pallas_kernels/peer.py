"""Collectives of small arrays among the GPUs of one host, host side: when, and between which.

NCCL takes some 15 microseconds to add up the few kilobytes that a decoding step has per layer. The
kernels here write them into the peers' memory themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxdecode.pallas_kernels import norm
from jaxdecode.pallas_kernels.varying import vary_over, vary_over_none, varying_axes

Array = jax.Array
Mailboxes = TypeVar("Mailboxes")

DTYPES = ("bfloat16", "float16", "float32")
# What the threads of one block exchange at a time.
ROW_BYTES = 1024
# Per device. Above it the links count more than the latency, and NCCL sends less.
MAX_BYTES = 256 * 1024
MAX_BLOCKS = 64
# Thread blocks of a cluster that every Hopper GPU runs, and warpgroups of a thread block.
MAX_CLUSTER, MAX_WARPGROUPS = 8, 8
# The runtime exchanges the addresses of at most so many devices.
MAX_DEVICES = 8


def why_not(shape: tuple[int, ...], dtype: Any) -> str | None:
    """Why the kernels cannot exchange arrays of this shape and dtype; None if they can."""
    dtype = jnp.dtype(dtype)
    if dtype not in DTYPES:
        return f"the kernels take {', '.join(DTYPES)}, not {dtype}"
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes % ROW_BYTES or not num_bytes:
        return f"the kernels take multiples of {ROW_BYTES} bytes, not {num_bytes}"
    if num_bytes > MAX_BYTES:
        return f"the kernels are for at most {MAX_BYTES} bytes, not {num_bytes}"
    return None


def why_not_here(mesh: Mesh) -> str | None:
    """Why the devices of a mesh cannot write into each other's memory; None if they can."""
    devices = list(mesh.devices.flat)
    if len(devices) < 2:
        return "there is one device"
    if len(devices) > MAX_DEVICES:
        return f"the kernels reach at most {MAX_DEVICES} devices, and the mesh has {len(devices)}"
    if len({device.process_index for device in devices}) > 1:
        return "the kernels reach the devices of one process, and the mesh spans several"
    if any(device.platform != "gpu" for device in devices):
        return f"the kernels need NVIDIA Hopper GPUs, and the mesh is of {devices[0].platform}"
    if jax.__version_info__ < (0, 11, 2):
        return f"GPU kernels need Python >= 3.12 and jax >= 0.11.2, this is jax {jax.__version__}"
    if any(getattr(device, "compute_capability", "") != "9.0" for device in devices):
        return "the kernels need NVIDIA Hopper GPUs (compute capability 9.0)"
    ids = [device.id for device in devices]
    if ids != list(range(len(ids))):
        return f"the kernels need devices 0 to {len(ids) - 1} in this order, and the mesh has {ids}"
    return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mailbox:
    """Where the devices of a group leave each other arrays of one shape and dtype, turn by turn.

    A pytree. Lives inside the trace of one `jax.shard_map` over the whole mesh; loops may use it.
    One from `open_around` lives around such traces, and in each as `resume` gives it.

    Attributes:
      shape, dtype: of the arrays.
      arrays: how many each device leaves each other in one turn.
      group: the mesh axes over which the group stretches and their sizes, major first.
      slots, turns: Refs, as peer_kernels.py says.
    """

    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    arrays: int = dataclasses.field(metadata={"static": True})
    group: tuple[tuple[str, int], ...] = dataclasses.field(metadata={"static": True})
    slots: Any
    turns: Any

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes of the group."""
        return tuple(axis for axis, _ in self.group)


def open_mailbox(
    shape: tuple[int, ...], dtype: Any, axes: tuple[str, ...], *, arrays: int = 1
) -> Mailbox:
    """An empty mailbox for exchanges over these mesh axes; returns when all devices of the mesh
    have one, so whoever has it may write into every other.

    Raises:
      ValueError: the kernels do not take this shape and dtype.
    """
    if (obstacle := why_not(shape, dtype)) is not None:
        raise ValueError(f"no mailbox for {jnp.dtype(dtype)}{list(shape)}: {obstacle}")
    group = tuple((axis, lax.axis_size(axis)) for axis in axes)
    ranks = math.prod(count for _, count in group)
    num_bytes = math.prod(shape) * jnp.dtype(dtype).itemsize
    blocks = _blocks(num_bytes)
    # Beside each word of four bytes stands the number of its turn; no turn has the number 0.
    words = 2 * arrays * num_bytes // 4
    slots = jax.new_ref(jnp.zeros((2, ranks, blocks, words // blocks), jnp.int32))
    turns = jax.new_ref(jnp.zeros(blocks, jnp.int32))
    nothing = jnp.zeros(arrays * math.prod(shape), dtype)
    _sum(nothing, slots, turns, group=group, wait_for_all=True)
    return Mailbox(shape, jnp.dtype(dtype), arrays, group, slots, turns)


def open_around(open_all: Callable[[], Mailboxes], mesh: Mesh) -> Mailboxes:
    """The mailboxes, any pytree of them, that `open_all` opens inside a `jax.shard_map`, for others
    over the same mesh, such as the steps of a loop: each of them calls `resume`.

    Their Refs hold what all devices have, side by side. For use inside one jitted function, in
    which nothing else reads them: then XLA has one buffer for each from the first turn to the last.
    """
    everywhere = frozenset(mesh.axis_names)

    def opened() -> Mailboxes:
        return jax.tree.map(lambda ref: vary_over(ref[...], everywhere), open_all())

    arrays = jax.shard_map(opened, mesh=mesh, in_specs=(), out_specs=side_by_side(mesh))()
    return jax.tree.map(jax.new_ref, arrays)


def side_by_side(mesh: Mesh) -> PartitionSpec:
    """How what `open_around` gives is cut for each `jax.shard_map`."""
    return PartitionSpec(mesh.axis_names)


@contextlib.contextmanager
def resume(mailboxes: Mailboxes) -> Iterator[Mailboxes]:
    """Mailboxes from `open_around`, which one `jax.shard_map` was given cut as `side_by_side`, for
    use inside it. The next one goes on with the turns."""
    lent, structure = jax.tree.flatten(mailboxes)
    # Kernels take no Refs of varying type. What is read and written here XLA does not copy.
    values = [ref[...] for ref in lent]
    own = [jax.new_ref(vary_over_none(x)) for x in values]
    yield jax.tree.unflatten(structure, own)
    for ref, x, taken in zip(lent, values, own, strict=True):
        ref[...] = vary_over(taken[...], varying_axes(x))


def all_reduce(x: Array, axes: tuple[str, ...], mailbox: Mailbox) -> Array:
    """x summed over these mesh axes, in float32 in the order of the ranks: every device gets the
    same bits, every time. It has no gradient.

    Raises:
      ValueError: the mailbox is for other arrays or axes.
    """
    _check(mailbox, x.shape, x.dtype, 1, axes)
    total = _sum(
        x.reshape(-1), mailbox.slots, mailbox.turns, group=mailbox.group, wait_for_all=False
    )
    # A kernel's result counts as equal on all devices, but only the group's are.
    return vary_over(total.reshape(x.shape), varying_axes(x) - set(axes))


def add_and_norm(
    x: Array, delta: Array, scale: Array, eps: float, axes: tuple[str, ...], mailbox: Mailbox
) -> tuple[Array, Array]:
    """`norm.add_and_norm` of x and `all_reduce` of delta: every device gets the same bits. It has
    no gradient.

    Raises:
      ValueError: the mailbox is for other arrays or axes.
    """
    _check(mailbox, delta.shape, delta.dtype, 1, axes)
    cluster = cluster_of_a_row(mailbox.turns.shape[0], math.prod(delta.shape[:-1]))
    if cluster is None:
        return norm.add_and_norm(x, all_reduce(delta, axes, mailbox), scale, eps)
    results = _norm(
        x.reshape(-1), delta.reshape(-1), scale, mailbox.slots, mailbox.turns,
        group=mailbox.group, eps=eps, cluster=cluster,
    )  # fmt: skip
    varying = varying_axes(x) | varying_axes(scale) | (varying_axes(delta) - set(axes))
    total, normed = (vary_over(each.reshape(x.shape), varying) for each in results)
    return total, normed


def cluster_of_a_row(blocks: int, rows: int) -> tuple[int, int] | None:
    """How many thread blocks, of how many warpgroups each, exchange one row of a norm, if each
    warpgroup takes one of the mailbox's blocks. None if no cluster has so many."""
    units, rest = divmod(blocks, rows)
    members = math.gcd(units, MAX_CLUSTER)
    warpgroups = units // members
    return None if rest or warpgroups > MAX_WARPGROUPS else (members, warpgroups)


def merge_columns(out: Array, lse: Array, axes: tuple[str, ...], mailbox: Mailbox) -> Array:
    """`sharded.merge_columns` over these mesh axes, of n devices. It has no gradient.

    Args:
      out: [B, T, N, H] float32, lse: [B, T, N] float32, of this device's part.
      mailbox: for 2 arrays of float32 [B, T, N, H / n].

    Returns:
      [B, T, N, H / n] float32: columns i * H / n and on, on device i.

    Raises:
      ValueError: the mailbox is for other arrays or axes.
    """
    B, T, N, H = out.shape
    n = lax.axis_size(axes)
    _check(mailbox, (B, T, N, H // n), out.dtype, 2, axes)
    shares = jnp.moveaxis(out.reshape(B, T, N, n, H // n), 3, 0)
    weights = jnp.broadcast_to(lse[None, ..., None], shares.shape)
    packed = jnp.stack([shares, weights], axis=1).reshape(n, 2, -1)
    merged = _merge(packed, mailbox.slots, mailbox.turns, group=mailbox.group)
    return vary_over(merged.reshape(mailbox.shape), varying_axes(out) | set(axes))


def _check(mailbox, shape, dtype, arrays, axes):
    found, made_for = (
        f"{arrays} of {dtype}{list(shape)} over {', '.join(axes)}",
        f"{mailbox.arrays} of {mailbox.dtype}{list(mailbox.shape)} over {', '.join(mailbox.axes)}",
    )
    if found != made_for:
        raise ValueError(f"the mailbox is for {made_for}; found {found}")


# One jit for the module, so that equal calls, such as a model's layers, share one lowering.
@functools.partial(jax.jit, static_argnames=("group", "wait_for_all"))
def _sum(x, slots, turns, *, group, wait_for_all):
    from jaxdecode.pallas_kernels import peer_kernels

    return peer_kernels.all_reduce(x, slots, turns, group=group, wait_for_all=wait_for_all)


@functools.partial(jax.jit, static_argnames=("group", "eps", "cluster"))
def _norm(x, delta, scale, slots, turns, *, group, eps, cluster):
    from jaxdecode.pallas_kernels import peer_kernels

    members, warpgroups = cluster
    return peer_kernels.add_and_norm(
        x, delta, scale, slots, turns, group=group, eps=eps, members=members, warpgroups=warpgroups
    )


@functools.partial(jax.jit, static_argnames="group")
def _merge(x, slots, turns, *, group):
    from jaxdecode.pallas_kernels import peer_kernels

    return peer_kernels.merge(x, slots, turns, group=group)


def _blocks(num_bytes: int) -> int:
    """Thread blocks among which the rows are divided alike."""
    rows = num_bytes // ROW_BYTES
    return next(blocks for blocks in range(min(rows, MAX_BLOCKS), 0, -1) if rows % blocks == 0)
