"""Where thread blocks of Flash-Decoding tell each other their parts of a result, on Pallas Mosaic
GPU.

A slot is 16 bytes: two columns' values of a query row, the row's log-sum-exp, and a mark. It is
written as one and read as one, so values beside the mark are there: nobody signals, no store waits
for another, and who waits for values has them with the load that finds them. Who has taken a slot
removes the mark, so slots are left as they were found.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref

from jaxdecode.pallas_kernels.mosaic import THREADS, reduce_tree
from jaxdecode.pallas_kernels.own_values import (
    array_of,
    divided,
    i32,
    i32_type,
    is_less,
    own,
    thread_number,
    values_of,
    words_of,
)
from jaxdecode.pallas_kernels.split_config import SplitConfig

# int32 elements of a slot, of which the last is the mark.
SLOT = 4
_SLOT_BYTES = 4 * SLOT
# What a warp has of the columns of a tile of transposed products: a group. Each of its slots holds
# a column and the one so far behind it, for the same thread has both.
GROUP_COLUMNS, GROUP_SLOTS, APART = 16, 8, 8
# Columns and query rows of such a tile, and the groups of its columns.
_TILE_COLUMNS, _TILE_ROWS, _TILE_GROUPS = 64, 8, 4
# Threads that have the same columns of a tile, of two rows each.
_ROW_THREADS = _TILE_ROWS // 2
_WARP = 32

_STORE = """{
.reg .pred is_told;
.reg .b64 low, high;
.reg .b128 slot;
setp.ne.b32 is_told, $4, 0;
mov.b64 low, {$1, $2};
mov.b64 high, {$3, 1};
mov.b128 slot, {low, high};
@is_told st.relaxed.gpu.global.b128 [$0], slot;
}"""
_LOAD = """{guard}ld.relaxed.gpu.global.b128 slot{i}, [${address}];
"""
_CHECK = """mov.b128 {{low{i}, high{i}}}, slot{i};
mov.b64 {{${near}, ${far}}}, low{i};
mov.b64 {{${lse}, mark{i}}}, high{i};
and.b32 marks, marks, mark{i};
"""
# A load that is not wanted leaves what says that there is nothing. Each load has registers of its
# own, for into the same ones they would wait for one another.
_GUARD = """setp.gt.s32 wanted{i}, ${wanted}, {word};
mov.b64 low{i}, 0;
mov.b64 high{i}, 0x1ff800000;
mov.b128 slot{i}, {{low{i}, high{i}}};
"""
_POLL = """{{
.reg .pred again, wanted<{count}>;
.reg .b64 low<{count}>, high<{count}>;
.reg .b128 slot<{count}>;
.reg .b32 marks, mark<{count}>;
{guards}poll:
mov.b32 marks, 1;
{loads}{checks}setp.eq.u32 again, marks, 0;
@again bra poll;
}}"""
_FORGET = "st.relaxed.gpu.global.b32 [$0+12], $1;"
# Slots of a task that a thread takes together.
WORDS = 4
# 2^WARP_BITS threads of a warp have the same slot of a group.
WARP_BITS = 2


class Places(NamedTuple):
    """Where the slots of an item's parts are, counted in parts: part p's at first + step * p, the
    first one's `extra` further on."""

    first: Any
    step: int = 1
    extra: int = 0


def told_groups(config: SplitConfig) -> int:
    """Groups of a row that are told: those of real columns."""
    return config.head_dim // GROUP_COLUMNS


def new_slots(parts: int, config: SplitConfig) -> np.ndarray:
    """The slots of so many parts, as a constant of a program: memory that is there, and zero,
    before its first call. With an element behind that is not zero it is no constant that XLA would
    rather fill in anew for each call."""
    slots = np.zeros(slots_size(parts, config) + SLOT, np.int32)
    slots[-1] = 1
    return slots


def slots_size(parts: int, config: SplitConfig) -> int:
    """int32 elements of the slots of so many parts: of each its rows, of each row its groups."""
    rows = config.block_t * config.block_g
    return parts * rows * told_groups(config) * GROUP_SLOTS * SLOT


def part_of(slots_ref: Any, place: Any, config: SplitConfig) -> Any:
    """The slots of a part, by its place."""
    size = slots_size(1, config)
    return slots_ref.at[pl.ds(place * size, size)]


def tell(out: jax.Array, lse: jax.Array, ref: Any, config: SplitConfig) -> None:
    """Tells a part.

    Args:
      out: [width, rows] float32, normalised. lse: [rows], base 2. Laid out as WGMMA has them.
      ref: its slots.
    """
    layout = plgpu.Layout.WGMMA
    rows, groups = config.block_t * config.block_g, told_groups(config)

    @plgpu.inline_mgpu(arg_types=(layout, layout.reduce(0), plgpu.RefType()))
    def store(context, out, lse, ref):
        del context
        thread = thread_number()
        warp, lane = divided(thread, _WARP)
        slot, pair = divided(lane, _ROW_THREADS)
        own_row = arith.muli(pair, i32(2))
        first = arith.addi(arith.muli(own_row, i32(groups)), warp)
        first = arith.addi(arith.muli(first, i32(GROUP_SLOTS)), slot)
        tiles = out.registers.reshape(config.width // _TILE_COLUMNS, -1, 2)
        lses = [words_of(values) for values in lse.registers.flat]
        for column_tile, row_tile, odd in np.ndindex(*tiles.shape):
            group, row = column_tile * _TILE_GROUPS, row_tile * _TILE_ROWS + odd
            is_told = None
            if group + _TILE_GROUPS > groups:
                is_told = is_less(warp, i32(groups - group))
            if row + _TILE_ROWS - 1 > rows:
                is_row = is_less(own_row, i32(rows - row))
                is_told = is_row if is_told is None else arith.andi(is_told, is_row)
            near, far = (words_of(values)[odd] for values in tiles[column_tile, row_tile])
            place = arith.addi(first, i32((row * groups + group) * GROUP_SLOTS))
            values = (arith.bitcast(i32_type(), x) for x in (near, far, lses[row_tile][odd]))
            is_told = i32(1) if is_told is None else arith.extui(i32_type(), is_told)
            utils.inline_ptx(_STORE, _address(ref, place), *values, is_told)

    store(out, lse, ref)


def take(
    ref: Any, first: jax.Array, count: jax.Array | None, stride: Any, extra: jax.Array | None
) -> list[jax.Array]:
    """Waits for slots of each thread, up to WORDS for each of its tasks, and leaves them as they
    were found.

    Args:
      ref: all slots. first: [n * THREADS] int32, the number of a task's first slot. count: of how
        many it is; None if all have WORDS. stride: from one to the next. extra: how much further
        off the first of them was, if any was.

    Returns:
      [n * THREADS] float32 each: the largest log-sum-exp of the slots in base 2, -inf if there are
      none; the sum of their weights, relative to it; and those of the two columns.
    """
    layout = own(first.size // THREADS)
    given = [x for x in (count, extra) if x is not None]
    returned = plgpu.ShapeDtypeStruct(first.shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, layout, *[layout] * len(given)),
        return_type=[returned] * 4,
    )
    def load(context, ref, stride, first, *given):
        del context
        given = [values_of(x) for x in given]
        counts = given.pop(0) if count is not None else None
        extras = given.pop() if given else None
        stride, slots = stride.registers.item(), []
        for i, start in enumerate(values_of(first)):
            rest = start if extras is None else arith.subi(start, extras[i])
            steps = [arith.muli(stride, i32(word)) for word in range(1, WORDS)]
            numbers = [start, *(arith.addi(rest, step) for step in steps)]
            slots += [_address(ref, number) for number in numbers]
        found = _poll(slots, counts)
        for i, slot in enumerate(slots):
            task, word = divmod(i, WORDS)
            wanted = None if counts is None else is_less(i32(word), counts[task])
            utils.inline_ptx(_FORGET, slot, i32(0), predicate=wanted)
        tasks = [found[i : i + WORDS] for i in range(0, len(found), WORDS)]
        sums = [_weighed(*zip(*slots, strict=True)) for slots in tasks]
        return [array_of(values) for values in zip(*sums, strict=True)]

    return load(ref, jnp.int32(stride), first, *given)


def _poll(slots, counts):
    """The values of the slots' two columns and their log-sum-exp, once all are told."""
    n, loads, checks, guards = len(slots), "", "", ""
    for i in range(n):
        task, word = divmod(i, WORDS)
        if counts is not None:
            guards += _GUARD.format(i=i, wanted=4 * n + task, word=word)
        guard = "" if counts is None else f"@wanted{i} "
        loads += _LOAD.format(i=i, guard=guard, address=3 * n + i)
        checks += _CHECK.format(i=i, near=3 * i, far=3 * i + 1, lse=3 * i + 2)
    words = utils.inline_ptx(
        _POLL.format(count=n, guards=guards, loads=loads, checks=checks),
        *slots, *(counts or ()), result_types=[i32_type()] * (3 * n), has_side_effects=True,
    )  # fmt: skip
    values = [arith.bitcast(ir.F32Type.get(), word) for word in words]
    return [values[i : i + 3] for i in range(0, len(values), 3)]


def across_warps(sums: list[jax.Array], bits: Any, scratch_ref: Any) -> list[jax.Array]:
    """The sums of all warps that have the same tasks, in each of them.

    Args:
      sums: what `take` returns, already added up across the lanes of a warp. bits: 2^bits threads
        have the same slot of a task, more than a warp has of them. scratch_ref: shared memory for
        as many float32 elements as there are.
    """
    (size,) = sums[0].shape
    layout = own(size // THREADS)
    returned = [plgpu.ShapeDtypeStruct((size,), jnp.float32, layout=layout)] * len(sums)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT, *[layout] * len(sums)),
        return_type=returned,
    )
    def reduce(context, ref, bits, *sums):
        del context
        warps = arith.shli(i32(1), arith.subi(bits.registers.item(), i32(WARP_BITS)))
        warp, lane = divided(thread_number(), _WARP)
        first = arith.andi(warp, arith.subi(i32(0), warps))
        values = [value for each in sums for value in values_of(each)]

        def place(warp, i):
            thread = arith.addi(arith.muli(warp, i32(_WARP)), lane)
            return arith.index_cast(ir.IndexType.get(), arith.addi(thread, i32(i * THREADS)))

        for i, value in enumerate(values):
            memref.store(value, ref, [place(warp, i)])
        utils.warpgroup_barrier()
        # Past the last of them each has its own once more, without weight.
        others = [arith.addi(first, i32(j)) for j in range(THREADS // _WARP)]
        is_one = [is_less(i32(j), warps) for j in range(len(others))]
        others = [arith.select(x, other, warp) for x, other in zip(is_one, others, strict=True)]
        found = [
            [memref.load(ref, [place(other, i)]) for other in others] for i in range(len(values))
        ]
        # The next sums may come here.
        utils.warpgroup_barrier()
        count, nothing = size // THREADS, mgpu.c(-math.inf, ir.F32Type.get())
        tops, totals, nears, fars = (found[i : i + count] for i in range(0, len(values), count))
        tops = [
            [arith.select(x, top, nothing) for x, top in zip(is_one, each, strict=True)]
            for each in tops
        ]
        results = map(_weighed, nears, fars, tops, totals)
        return [array_of(each) for each in zip(*results, strict=True)]

    return reduce(scratch_ref, jnp.int32(bits), *sums)


def _weighed(nears, fars, lses, totals=None):
    """(top, total, near, far) of values with these log-sum-exps; or, given their totals, of sums
    with weights relative to these."""
    f32 = ir.F32Type.get()
    top = reduce_tree(arith.maximumf, list(lses))
    is_empty = arith.cmpf(arith.CmpFPredicate.OEQ, top, mgpu.c(-math.inf, f32))
    shift = arith.select(is_empty, mgpu.c(0.0, f32), top)
    weights = [
        utils.inline_ptx("ex2.approx.ftz.f32 $0, $1;", arith.subf(x, shift), result_types=f32)
        for x in lses
    ]

    def weighted(values):
        products = [arith.mulf(x, w) for x, w in zip(values, weights, strict=True)]
        return reduce_tree(arith.addf, products)

    total = weighted(totals) if totals else reduce_tree(arith.addf, weights)
    return top, total, weighted(nears), weighted(fars)


def across_lanes(x: jax.Array, bits: Any, combine: str) -> jax.Array:
    """The largest or the sum, as `combine` is "max" or "sum", of the values of 2^bits threads that
    have the same slot of a group; of more than a warp has, of those of the warp."""
    layout = own(x.size // THREADS)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WG_SPLAT, layout),
        return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout),
    )
    def reduce(context, bits, x):
        del context
        bits, values = bits.registers.item(), values_of(x)
        add = {"max": arith.maximumf, "sum": arith.addf}[combine]
        for bit in range(WARP_BITS):
            is_near = is_less(i32(bit), bits)
            others = [utils.shfl_bfly(value, GROUP_SLOTS << bit) for value in values]
            both = [add(value, other) for value, other in zip(values, others, strict=True)]
            values = [arith.select(is_near, y, x) for x, y in zip(values, both, strict=True)]
        return array_of(values)

    return reduce(jnp.int32(bits), x)


def _address(ref, place):
    """Of a slot, by its number."""
    i8, i64 = (ir.IntegerType.get_signless(bits) for bits in (8, 64))
    offset = arith.muli(arith.extsi(i64, place), mgpu.c(_SLOT_BYTES, i64))
    return utils.getelementptr(utils.memref_ptr(ref), [offset], i8)
