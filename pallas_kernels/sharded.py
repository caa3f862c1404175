"""Attention to a KV cache that is cut along its length over the devices of a mesh axis.

Each device attends to its own slots; the partial results are merged by their log-sum-exp, like the
chunks of one device. Position p of a sequence lies, by blocks of P slots dealt round-robin over n
devices, in slot (p // nP) P + p % P of device (p // P) % n. One block per device (P = S / n) makes
plain contiguous parts.
B batch, T query tokens, S capacity over all devices, N query heads, K KV heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdecode.pallas_kernels import peer
from jaxdecode.pallas_kernels.attention_choice import choose
from jaxdecode.pallas_kernels.combine import add_sinks, combine_partials
from jaxdecode.pallas_kernels.decode_attention import (
    Lengths,
    attend_ranges,
    checked_out_dtype,
    checked_scale,
    int32_lengths,
    is_integer,
    visible_ranges,
)

Array = jax.Array
AxisNames = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Part:
    """One device's part of the slots.

    Attributes:
      index: which device along the axis; traced inside shard_map.
      count: n, devices along the axis.
      block: P, slots in a row on one device.
    """

    index: Array | int
    count: int
    block: int

    def length(self, positions: Array) -> Array:
        """How many of the first `positions` positions lie in this part."""
        rounds, rest = positions // (self.count * self.block), positions % (self.count * self.block)
        return rounds * self.block + jnp.clip(rest - self.index * self.block, 0, self.block)

    def slot(self, position: Array) -> tuple[Array, Array]:
        """The slot of each position >= 0, and whether it lies in this part."""
        block = position // self.block
        slot = block // self.count * self.block + position % self.block
        return slot, block % self.count == self.index


def attend_part(
    q: Array, k: Array, v: Array, kv_len: Array, part: Part, *,
    q_start: Array | None = None, scale: float | None = None, window: int | None = None,
    softcap: float | None = None, num_splits: int | None = None, implementation: str | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Attends to one part of the slots, inside `jax.shard_map`.

    Arguments are those of `decode_attention` with k and v [B, S / n, K, H] the part's own, lengths
    and positions [B] int32 counting all parts. Returns (out float32, lse), to be merged over the
    parts; a query that sees nothing of this part has out = 0 and lse = -inf.
    """
    scale = checked_scale(q, k, v, scale, window, softcap, None, num_splits)
    choice = choose(
        q, k, num_splits=num_splits, implementation=implementation,
        not_cudnn="merging the parts takes a float32 log-sum-exp",
    )  # fmt: skip
    lo, hi = visible_ranges(
        kv_len, q.shape[1], part.count * k.shape[1], q_start=q_start, window=window
    )
    return attend_ranges(
        choice, q, k, v, part.length(lo), part.length(hi), scale=scale, softcap=softcap,
        sinks=None, num_splits=num_splits, out_dtype=jnp.float32,
    )  # fmt: skip


def merge_columns(
    out: Array, lse: Array, axis_name: str | tuple[str, ...], mailbox: peer.Mailbox | None = None
) -> Array:
    """Merges the parts' results so that each device gets its own share of every head's columns.

    One exchange moves out and lse together: 1 / n of what gathering all parts would.

    Args:
      out: [B, T, N, H] float32, lse: [B, T, N] float32, of this device's part.
      mailbox: what to exchange through, see `peer.merge_columns`; None for an all-to-all of XLA.

    Returns:
      [B, T, N, H / n] float32: columns i * H / n and on, on device i.
    """
    if mailbox is not None:
        return peer.merge_columns(out, lse, mailbox.axes, mailbox)
    n = lax.axis_size(axis_name)
    B, T, N, H = out.shape
    shares = out.reshape(B, T, N, n, H // n)
    weights = jnp.broadcast_to(lse[..., None, None], (B, T, N, n, 1))
    packed = jnp.concatenate([shares, weights], axis=-1)
    # Tiled: of the other form JAX cannot take the gradient.
    parts = lax.all_to_all(packed[None], axis_name, split_axis=4, concat_axis=0, tiled=True)
    return combine_partials(parts[..., 0, :-1], parts[..., 0, -1])[0]


def sharded_decode_attention(
    q: Array, k: Array, v: Array, kv_len: Lengths, *,
    mesh: Mesh,
    seq_axis: str = "seq",
    block: int | None = None,
    batch_axis: AxisNames = None,
    head_axis: AxisNames = None,
    q_start: Lengths | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    num_splits: int | None = None,
    implementation: str | None = None,
    out_dtype: Any = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:  # fmt: skip
    """`decode_attention` with the cache cut along its length over a mesh axis.

    One collective of B T N (H + 1) float32 per device merges the parts. Works under jit and grad.

    Args:
      q, k, v, kv_len and all keywords not named here: as in `decode_attention`, of all devices
        together. k and v should lie as PartitionSpec(batch_axis, seq_axis, head_axis) says, or
        every call moves them there.
      mesh: has the axes that are named, Auto or Explicit. Arrays that were put on other devices are
        an error.
      seq_axis: the axis that cuts S; its size must divide S.
      block: None if each device holds a contiguous part of the positions. Otherwise positions are
        dealt to the devices round-robin by blocks of so many slots, which must divide S / n: a
        growing sequence then fills all devices alike.
      batch_axis, head_axis: axes that cut B, and N and K; None for whole.

    Returns:
      As `decode_attention`; cut like q over batch_axis and head_axis, equal over seq_axis.

    Raises:
      ValueError: an axis is not in the mesh, is named twice, or does not divide what it cuts; block
        does not divide S / n. And what `decode_attention` raises.
    """
    scale = checked_scale(q, k, v, scale, window, softcap, sinks, num_splits)
    out_dtype = checked_out_dtype(q, out_dtype)
    layout = _checked_layout(k, mesh, seq_axis, block, batch_axis, head_axis)
    kv_len, q_start = int32_lengths(k, kv_len, q_start)
    q_start = kv_len - q.shape[1] if q_start is None else q_start
    operands = (q, k, v, kv_len, q_start, sinks)
    out, lse = _attend_over_mesh(
        *(layout.put(x, spec) for x, spec in zip(operands, layout.in_specs, strict=True)),
        layout=layout, scale=scale, window=window, softcap=softcap, num_splits=num_splits,
        implementation=implementation, out_dtype=out_dtype,
    )  # fmt: skip
    return (out, lse) if return_lse else out


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How the arrays of one call are cut over a mesh: the axes of each dimension, and `block`."""

    mesh: Mesh
    seq: str
    batch: AxisNames
    heads: AxisNames
    block: int

    @property
    def queries(self) -> PartitionSpec:
        return PartitionSpec(self.batch, None, self.heads)

    @property
    def in_specs(self) -> tuple[PartitionSpec, ...]:
        """Of q, k, v, kv_len, q_start and sinks."""
        cache, rows = PartitionSpec(self.batch, self.seq, self.heads), PartitionSpec(self.batch)
        return self.queries, cache, cache, rows, rows, PartitionSpec(self.heads)

    def part(self) -> Part:
        """This device's, inside `jax.shard_map`."""
        return Part(lax.axis_index(self.seq), self.mesh.shape[self.seq], self.block)

    def put(self, x: Array | None, spec: PartitionSpec) -> Array | None:
        """x where Explicit axes have to find it; over Auto axes JAX moves it itself."""
        if x is None or AxisType.Explicit not in self.mesh.axis_types:
            return x
        types = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        explicit = [
            tuple(axis for axis in _names(axes) if types[axis] == AxisType.Explicit)
            for axes in spec
        ]
        named = NamedSharding(self.mesh, PartitionSpec(*(axes or None for axes in explicit)))
        return jax.reshard(x, named)


# One jit for the module: outside of any, shard_map compiles every operation at every call.
@functools.partial(
    jax.jit,
    static_argnames=(
        "layout", "scale", "window", "softcap", "num_splits", "implementation", "out_dtype",
    ),
)  # fmt: skip
def _attend_over_mesh(
    q, k, v, kv_len, q_start, sinks,
    *, layout, scale, window, softcap, num_splits, implementation, out_dtype,
):  # fmt: skip
    def attend(q, k, v, kv_len, q_start, sinks):
        out, lse = attend_part(
            q, k, v, kv_len, layout.part(), q_start=q_start, scale=scale, window=window,
            softcap=softcap, num_splits=num_splits, implementation=implementation,
        )  # fmt: skip
        out, lse = combine_partials(out, lse, axis_name=layout.seq)
        if sinks is not None:  # once, after the merge
            out, lse = add_sinks(out, lse, sinks)
        return out.astype(out_dtype), lse

    return jax.shard_map(
        attend, mesh=layout.mesh, in_specs=layout.in_specs, out_specs=(layout.queries,) * 2
    )(q, k, v, kv_len, q_start, sinks)


def _checked_layout(
    k: Array, mesh: Mesh, seq_axis: str, block: int | None, batch_axis: AxisNames,
    head_axis: AxisNames,
) -> _Layout:  # fmt: skip
    B, S, K, _ = k.shape
    used = [
        *_checked_axes("batch_axis", batch_axis, mesh, "batch", B),
        *_checked_axes("seq_axis", seq_axis, mesh, "capacity", S),
        *_checked_axes("head_axis", head_axis, mesh, "num_kv_heads", K),
    ]
    if len(set(used)) < len(used):
        raise ValueError(
            f"a mesh axis cuts one dimension only; found {batch_axis=}, {seq_axis=}, {head_axis=}"
        )
    slots = S // mesh.shape[seq_axis]
    block = slots if block is None else block
    if not is_integer(block) or block < 1 or slots % block:
        raise ValueError(
            f"block must be an integer that divides {slots}, the slots of one device, or None; "
            f"found {block!r}"
        )
    return _Layout(mesh, seq_axis, batch_axis, head_axis, int(block))


def _names(axes: AxisNames) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def _checked_axes(
    argument: str, axes: AxisNames, mesh: Mesh, dimension: str, size: int
) -> tuple[str, ...]:
    """The axes one by one, after checking that the mesh has them and that they divide `size`."""
    names = _names(axes)
    for axis in names:
        if axis not in mesh.shape:
            raise ValueError(
                f"{argument}={axes!r}: the mesh has no axis {axis!r}; "
                f"it has {', '.join(map(repr, mesh.axis_names))}"
            )
    parts = math.prod(mesh.shape[axis] for axis in names)
    if size % parts:
        raise ValueError(
            f"{argument}={axes!r} has {parts} devices, which do not divide {dimension}={size}"
        )
    return names
