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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxdecode.pallas_kernels.combine import add_sinks, combine_partials
from jaxdecode.pallas_kernels.decode_attention import (
    Lengths,
    attend_ranges,
    checked_out_dtype,
    checked_scale,
    choose,
    int32_lengths,
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
    choice = choose(q, k, num_splits=num_splits, implementation=implementation)
    lo, hi = visible_ranges(
        kv_len, q.shape[1], part.count * k.shape[1], q_start=q_start, window=window
    )
    return attend_ranges(
        choice, q, k, v, part.length(lo), part.length(hi), scale=scale, softcap=softcap,
        sinks=None, num_splits=num_splits, out_dtype=jnp.float32,
    )  # fmt: skip


def merge_columns(out: Array, lse: Array, axis_name: str | tuple[str, ...]) -> Array:
    """Merges the parts' results so that each device gets its own share of every head's columns.

    One all-to-all moves out and lse together: 1 / n of what gathering all parts would.

    Args:
      out: [B, T, N, H] float32, lse: [B, T, N] float32, of this device's part.

    Returns:
      [B, T, N, H / n] float32: columns i * H / n and on, on device i.
    """
    n = lax.axis_size(axis_name)
    B, T, N, H = out.shape
    shares = out.reshape(B, T, N, n, H // n)
    weights = jnp.broadcast_to(lse[..., None, None], (B, T, N, n, 1))
    packed = jnp.concatenate([shares, weights], axis=-1)
    parts = lax.all_to_all(packed, axis_name, split_axis=3, concat_axis=0)
    return combine_partials(parts[..., :-1], parts[..., -1])[0]


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
        they are moved there.
      mesh: has the axes that are named.
      seq_axis: the axis that cuts S; its size must divide S.
      block: None if each device holds a contiguous part of the positions. Otherwise positions are
        dealt to the devices round-robin by blocks of so many slots, which must divide S / n: a
        growing sequence then fills all devices alike.
      batch_axis, head_axis: axes that cut B, and N and K; None for whole.

    Returns:
      As `decode_attention`; cut like q over batch_axis and head_axis, equal over seq_axis.
    """
    checked_scale(q, k, v, scale, window, softcap, sinks, num_splits)
    out_dtype = checked_out_dtype(q, out_dtype)
    make_part = _parts(k.shape[1], mesh, seq_axis, block)
    kv_len, q_start = int32_lengths(k, kv_len, q_start)
    q_start = kv_len - q.shape[1] if q_start is None else q_start

    def attend(q, k, v, kv_len, q_start, sinks):
        out, lse = attend_part(
            q, k, v, kv_len, make_part(lax.axis_index(seq_axis)), q_start=q_start, scale=scale,
            window=window, softcap=softcap, num_splits=num_splits, implementation=implementation,
        )  # fmt: skip
        out, lse = combine_partials(out, lse, axis_name=seq_axis)
        if sinks is not None:  # once, after the merge
            out, lse = add_sinks(out, lse, sinks)
        return out.astype(out_dtype), lse

    queries, rows = PartitionSpec(batch_axis, None, head_axis), PartitionSpec(batch_axis)
    cache = PartitionSpec(batch_axis, seq_axis, head_axis)
    out, lse = jax.shard_map(
        attend, mesh=mesh,
        in_specs=(queries, cache, cache, rows, rows, PartitionSpec(head_axis)),
        out_specs=(queries, queries),
    )(q, k, v, kv_len, q_start, sinks)  # fmt: skip
    return (out, lse) if return_lse else out


def _parts(S: int, mesh: Mesh, seq_axis: str, block: int | None) -> Callable[[Array], Part]:
    """From a device's index to its part of the slots."""
    if seq_axis not in mesh.shape:
        raise ValueError(f"the mesh has no axis {seq_axis!r}; it has {', '.join(mesh.axis_names)}")
    count = mesh.shape[seq_axis]
    slots, rest = divmod(S, count)
    if rest:
        raise ValueError(f"mesh axis {seq_axis}={count} does not divide the capacity S={S}")
    block = slots if block is None else block
    if block < 1 or slots % block:
        raise ValueError(f"block={block} must be a divisor of {slots}, the slots of one device")
    return functools.partial(Part, count=count, block=block)
