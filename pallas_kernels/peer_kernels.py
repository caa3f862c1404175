"""Collectives on Pallas Mosaic GPU: every device writes into its peers' memory, over NVLink.

What a device says travels as slots of 16 bytes: twice four bytes of values, each beside the number
of the turn. Eight aligned bytes arrive as one, so a value that stands beside the awaited turn is
there: nobody signals, and no store waits for another. A mailbox holds the slots of two turns. Who
has every peer's slots of one turn knows that all have finished reading those of the turn before,
and may overwrite them in the next: the two halves take turns, however far a device lags.

That holds for each block of a mailbox by itself: whoever exchanges one is on every device the only
one to read its slots, and to count its turns, in the order of the launches.

Peers write to where a program has its mailbox: from the zeros on it must stay there, and no copy
may take its place. Who has the slots of the last turn has all that peers ever write to it, and may
use the memory for something else.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

from jaxdecode.pallas_kernels.mosaic import THREADS
from jaxdecode.pallas_kernels.norm_kernel import normalised, rounded_sum
from jaxdecode.pallas_kernels.own_values import words_of
from jaxdecode.pallas_kernels.slots import put, slot_layout, take

# The axes of a collective and their sizes, major first.
Group = tuple[tuple[str, int], ...]

# Each warp tells all blocks of its cluster its sum, in its place; then each thread adds them up,
# four at a time. Nobody writes into a block after the barrier, so that it may leave.
_CLUSTER_SUM = """{{
.reg .pred tells;
.reg .b32 there;
.reg .f32 a, b, c, d, sum0, sum1, sum2, sum3;
setp.lt.u32 tells, $3, {members};
@tells mapa.shared::cluster.u32 there, $2, $3;
@tells st.shared::cluster.b32 [there], $4;
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
ld.shared.v4.f32 {{sum0, sum1, sum2, sum3}}, [$1];
{additions}add.f32 sum0, sum0, sum1;
add.f32 sum2, sum2, sum3;
add.f32 $0, sum0, sum2;
}}"""
_ADDITION = """ld.shared.v4.f32 {{a, b, c, d}}, [$1+{offset}];
add.f32 sum0, sum0, a;
add.f32 sum1, sum1, b;
add.f32 sum2, sum2, c;
add.f32 sum3, sum3, d;
"""
# Threads of a warp, and warps of a warpgroup.
_WARP, _WARPS = 32, THREADS // 32


def all_reduce(
    x: jax.Array, slots: Any, turns: Any, *, group: Group, wait_for_all: bool
) -> jax.Array:
    """Sums x over a group of devices, in float32 and in the order of their ranks.

    Args:
      x: [size] of 16 or 32 bits per element; its bytes are a multiple of 1024 * blocks.
      slots: Ref of int32 [2, ranks, blocks, 2 * words of a block], the mailbox: what each rank said
        in the last two turns. All zero before the first.
      turns: Ref of int32 [blocks], the turns so far.
      group: the axes of the mesh that are summed over.
      wait_for_all: whether to start when every device of the mesh has come here, and not before.

    Returns:
      [size] in x's dtype, the same bits on every rank.
    """
    out_type = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return _exchange(
        _sum_kernel, x, slots, turns, group, out_type, wait_for_all, kernel_name="peer_sum"
    )


def add_and_norm(
    x: jax.Array, delta: jax.Array, scale: jax.Array, slots: Any, turns: Any, *, group: Group,
    eps: float, members: int, warpgroups: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`norm.add_and_norm` of rows of x, after `all_reduce` of delta.

    A cluster of thread blocks has a row, and each of their warpgroups one block of the mailbox: all
    that they tell one another are their sums of squares, through their shared memory.

    Args:
      x, delta: [rows * D]. scale: [D].
      slots, turns, group: as for `all_reduce` of delta.
      eps: added to the mean square.
      members, warpgroups: thread blocks of a cluster, and warpgroups of each.

    Returns:
      (x + delta, its norm), each [rows * D], the same bits on every rank.
    """
    units, out_type = members * warpgroups, jax.ShapeDtypeStruct(x.shape, x.dtype)
    total, normed = plgpu.kernel(
        functools.partial(_norm_kernel, group=group, eps=eps, members=members, units=units),
        out_type=[out_type, out_type],
        grid=(turns.shape[0] // units,),
        grid_names=("row",),
        cluster=(members,),
        cluster_names=("member",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types={"sums_smem": plgpu.SMEM((units * _WARPS,), jnp.float32)},
        kernel_name="peer_sum_and_norm",
        # Its threads meet where they exchange something, and need not at every store.
        compiler_params=plgpu.CompilerParams(
            skip_device_barrier=True, unsafe_no_auto_barriers=True
        ),
    )(x, delta, scale, slots, turns)
    return total, normed


def merge(x: jax.Array, slots: Any, turns: Any, *, group: Group) -> jax.Array:
    """Gives each rank its share of all ranks' attention results, merged by their log-sum-exp.

    Args:
      x: [ranks, 2, size] float32: the share of each rank, and beside each of its elements the
        natural-log log-sum-exp that weighs it. -inf: nothing, whatever the element is.
      slots, turns, group: as for `all_reduce` of both arrays of a share.

    Returns:
      [size] float32.
    """
    out_type = jax.ShapeDtypeStruct(x.shape[2:], x.dtype)
    return _exchange(
        _merge_kernel, x, slots, turns, group, out_type, False, kernel_name="peer_merge"
    )


def _exchange(kernel, x, slots, turns, group, out_type, wait_for_all, *, kernel_name):
    return plgpu.kernel(
        functools.partial(kernel, group=group),
        out_type=out_type,
        grid=turns.shape,
        grid_names=("block",),
        kernel_name=kernel_name,
        compiler_params=plgpu.CompilerParams(skip_device_barrier=not wait_for_all),
    )(x, slots, turns)


def _sum_kernel(x_ref, slots_ref, turns_ref, out_ref, *, group: Group):
    """One block's part of x."""
    block = lax.axis_index("block")
    part, layout, turn = _begin(block, turns_ref, out_ref)
    x = plgpu.load(x_ref.at[part], layout=layout)
    out_ref[part] = _sum_over(group, x, turn, slots_ref, block)
    turns_ref[block] = turn


def _norm_kernel(
    x_ref, delta_ref, scale_ref, slots_ref, turns_ref, total_ref, normed_ref, *,
    group: Group, eps: float, members: int, units: int, sums_smem,
):  # fmt: skip
    """One warpgroup's part of a row."""
    unit = lax.axis_index("member") * (units // members) + lax.axis_index("warpgroup")
    block = lax.axis_index("row") * units + unit
    part, layout, turn = _begin(block, turns_ref, total_ref)
    size = total_ref.shape[0] // turns_ref.shape[0]
    # All loads before the first store, which none may pass.
    delta, x = (plgpu.load(ref.at[part], layout=layout) for ref in (delta_ref, x_ref))
    scale = plgpu.load(scale_ref.at[pl.ds(unit * size, size)], layout=layout)
    total = rounded_sum(x, _sum_over(group, delta, turn, slots_ref, block))
    squares = _cluster_sum(
        jnp.square(total.astype(jnp.float32)), layout, unit, sums_smem, members=members
    )
    normed = normalised(total, squares / (units * size), scale, eps)
    total_ref[part] = total
    normed_ref[part] = normed
    turns_ref[block] = turn


def _merge_kernel(x_ref, slots_ref, turns_ref, out_ref, *, group: Group):
    """One block's part of this rank's share."""
    block = lax.axis_index("block")
    part, layout, turn = _begin(block, turns_ref, out_ref)
    ranks, arrays, words = x_ref.shape[0], x_ref.shape[1], slots_ref.shape[3]
    boxes = [pl.ds(i * words // arrays, words // arrays) for i in range(arrays)]
    incoming, outgoing = _boxes(slots_ref, turn, group, block)
    places = [(rank, i) for rank in range(ranks) for i in range(arrays)]
    # All loads before the first store, which none may pass.
    shares = [plgpu.load(x_ref.at[rank, i, part], layout=layout) for rank, i in places]
    for (rank, i), share in zip(places, shares, strict=True):
        put(share, turn, [outgoing[rank].at[boxes[i]]])
    kind = jax.ShapeDtypeStruct(shares[0].shape, shares[0].dtype)
    taken = take(turn, [incoming[rank].at[boxes[i]] for rank, i in places], kind)
    outs, lses = taken[::2], taken[1::2]
    top = functools.reduce(jnp.maximum, lses)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weights = [jnp.exp(lse - top) for lse in lses]
    total = functools.reduce(jnp.add, weights)
    # Selected before the product: 0 * NaN would poison the sum.
    parts = [
        jnp.where(lse == -jnp.inf, 0.0, out) * weight
        for out, lse, weight in zip(outs, lses, weights, strict=True)
    ]
    out_ref[part] = functools.reduce(jnp.add, parts) / jnp.where(total == 0.0, 1.0, total)
    turns_ref[block] = turn


def _sum_over(group: Group, x, turn, slots_ref, block):
    """x summed over the group, by way of this block of the mailbox."""
    incoming, outgoing = _boxes(slots_ref, turn, group, block)
    put(x, turn, outgoing)
    parts = take(turn, incoming, jax.ShapeDtypeStruct(x.shape, x.dtype))
    total = functools.reduce(jnp.add, [x.astype(jnp.float32) for x in parts])
    return total.astype(x.dtype)


def _begin(block, turns_ref, out_ref):
    """A block's part of the result, how its threads hold it, and the number of the turn."""
    size = out_ref.shape[0] // turns_ref.shape[0]
    return pl.ds(block * size, size), slot_layout(size, out_ref.dtype), turns_ref[block] + 1


def _boxes(slots_ref, turn, group: Group, block):
    """A block's boxes of the turn: what each rank says to this one, and this one to each."""
    half, ranks = turn % 2, range(slots_ref.shape[1])
    incoming = [slots_ref.at[half, rank, block] for rank in ranks]
    outgoing = [_remote(slots_ref.at[half, _rank(group), block], group, rank) for rank in ranks]
    return incoming, outgoing


def _rank(group: Group) -> jax.Array:
    """This device's place in its group."""
    rank = jnp.int32(0)
    for axis, size in group:
        rank = rank * size + lax.axis_index(axis)
    return rank


def _remote(ref: Any, group: Group, rank: int) -> Any:
    """The same part of the mailbox of another device of the group."""
    place = np.unravel_index(rank, [size for _, size in group])
    return plgpu.remote_ref(ref, {axis: int(i) for (axis, _), i in zip(group, place, strict=True)})


def _cluster_sum(x: jax.Array, layout, unit: jax.Array, sums_ref, *, members: int) -> jax.Array:
    """The sum of x over all warpgroups of a cluster, with the same bits in each of them.

    Args:
      x: [size] float32, laid out so.
      unit: which of them this warpgroup is.
      sums_ref: [warps of the cluster] float32 in the shared memory of each block, used once.
      members: blocks of the cluster.
    """

    @plgpu.inline_mgpu(
        arg_types=(layout, plgpu.Layout.WG_SPLAT, plgpu.RefType()),
        return_type=plgpu.ShapeDtypeStruct((), jnp.float32, layout=plgpu.Layout.WG_SPLAT),
    )
    def add_up(context, x, unit, sums):
        del context
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        own = functools.reduce(
            arith.addf, [value for each in x.registers.flat for value in words_of(each)]
        )
        for distance in (1, 2, 4, 8, 16):
            own = arith.addf(own, utils.shfl_bfly(own, distance))
        thread = arith.remui(utils.thread_idx(), mgpu.c(THREADS, i32))
        lane, warp = (op(thread, mgpu.c(_WARP, i32)) for op in (arith.remui, arith.divui))
        number = arith.addi(arith.muli(unit.registers.item(), mgpu.c(_WARPS, i32)), warp)
        base = utils.memref_ptr(sums)
        place = utils.getelementptr(base, [number], f32)
        offsets = range(16, 4 * sums_ref.shape[0], 16)
        additions = "".join(_ADDITION.format(offset=offset) for offset in offsets)
        total = utils.inline_ptx(
            _CLUSTER_SUM.format(members=members, additions=additions),
            base, place, lane, arith.bitcast(i32, own),
            result_types=f32, has_side_effects=True, convergent=True,
        )  # fmt: skip
        return mgpu.FragmentedArray.splat(total, ())

    return add_up(x, unit, sums_ref)
