"""Values that say themselves that they are there, on Pallas Mosaic GPU.

A slot is 16 bytes: twice four bytes of values, each beside the number of the turn. Eight aligned
bytes arrive as one, so a value that stands beside the awaited turn is there: nobody signals, no
store waits for another, and who waits for values has them with the load that finds them. Slots are
zero at first, and no turn is 0. They take twice the memory of what they hold.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector

from jaxdecode.pallas_kernels.mosaic import THREADS
from jaxdecode.pallas_kernels.own_values import (
    array_of,
    divided,
    i32,
    i32_type,
    own,
    thread_number,
    words_of,
)

# A row of what the tensor cores make: 32 threads each have the same of it.
ROW = plgpu.Layout.WGMMA.reduce(0)
# One value for each thread of a warpgroup.
LINE = own(1)
# Of values, in one slot.
_SLOT_BYTES = 8
# From one slot of a thread to its next, in bytes.
_DISTANCE = 16 * THREADS
_INT_BYTES = 4
# A word and its turn.
_WORD_BYTES = 8
# Slots that a thread polls together: each costs four registers.
_AT_ONCE = 16

# Each thread's slots stand at constant distances from its first one: only that one's address is
# computed, and the distances are part of the instructions.
_STORE = """{{
.reg .b64 a, b;
mov.b64 a, {{$1, $3}};
mov.b64 b, {{$2, $3}};
st.relaxed.sys.global.v2.b64 [$0+{offset}], {{a, b}};
}}"""
_STORE_WORD = """{
.reg .b64 a;
mov.b64 a, {$1, $2};
st.relaxed.sys.global.b64 [$0], a;
}"""
_STORE_WORD_IF_EVEN = """{
.reg .pred is_odd;
.reg .b32 last_bit;
.reg .b64 a;
and.b32 last_bit, $3, 1;
setp.ne.u32 is_odd, last_bit, 0;
mov.b64 a, {$1, $2};
@!is_odd st.relaxed.sys.global.b64 [$0], a;
}"""
_STORE_COLUMNS = """{{
.reg .pred has_low, has_high;
.reg .b32 next;
.reg .b64 a;
add.u32 next, $1, 1;
setp.lt.u32 has_low, $1, {count};
setp.lt.u32 has_high, next, {count};
{stores}}}"""
_STORE_OF_TWO_COLUMNS = """mov.b64 a, {{${low}, $2}};
@has_low st.relaxed.sys.global.b64 [$0+{at_low}], a;
mov.b64 a, {{${high}, $2}};
@has_high st.relaxed.sys.global.b64 [$0+{at_high}], a;
"""
_LOAD = """ld.relaxed.sys.global.v2.b64 {{a, b}}, [{place}];
mov.b64 {{word{low}, turn}}, a;
xor.b32 turn, turn, {turn};
or.b32 late, late, turn;
mov.b64 {{word{high}, turn}}, b;
xor.b32 turn, turn, {turn};
or.b32 late, late, turn;
"""
# A line that is not there keeps its word, and is not late.
_LOAD_LINE = """setp.gt.s32 is_there, {lines}, {number};
mov.b64 a, {{word{i}, {turn}}};
@is_there ld.relaxed.sys.global.b64 a, [{place}];
mov.b64 {{word{i}, turn}}, a;
xor.b32 turn, turn, {turn};
or.b32 late, late, turn;
"""
_STORE_SHARED = "st.shared.v2.f32 [$0+{offset}], {{${low}, ${high}}};\n"
_LOAD_SHARED = "ld.shared.f32 $0, [$1];"
_POLL = """{{
.reg .pred again, is_there;
.reg .b64 a, b;
.reg .b32 turn, late, word<{count}>;
{first}poll:
mov.b32 late, 0;
{loads}setp.ne.b32 again, late, 0;
@again bra poll;
{results}}}"""


def slot_layout(size: int, dtype: Any) -> plgpu.Layout:
    """Each thread has the values of whole slots."""
    return plgpu.Layout.WG_STRIDED((size,), vec_size=_SLOT_BYTES // jnp.dtype(dtype).itemsize)


def put(x: jax.Array, turn: jax.Array, refs: list[Any]) -> None:
    """Writes x [size], laid out by `slot_layout`, into the slots of each ref."""
    layout = slot_layout(x.shape[0], x.dtype)

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.Layout.WG_SPLAT, *[plgpu.RefType() for _ in refs]))
    def store(context, x, turn, *refs):
        del context
        words = _words(x)
        for ref in refs:
            slot = _first_slot(ref)
            for i, pair in enumerate(words):
                text = _STORE.format(offset=i * _DISTANCE)
                utils.inline_ptx(text, slot, *pair, turn.registers.item())

    store(x, turn, *refs)


def take(turn: jax.Array, refs: list[Any], kind: jax.ShapeDtypeStruct) -> list[jax.Array]:
    """Waits for the turn's slots in each ref; their values are arrays of this kind."""
    layout = slot_layout(kind.shape[0], kind.dtype)
    returned = plgpu.ShapeDtypeStruct(kind.shape, kind.dtype, layout=layout)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WG_SPLAT, *[plgpu.RefType() for _ in refs]),
        return_type=[returned for _ in refs],
    )
    def load(context, turn, *refs):
        del context
        lanes = layout.to_mgpu()
        values = lanes.registers_element_type(utils.dtype_to_ir_type(kind.dtype))
        slots = [_first_slot(ref) for ref in refs]
        (count,) = lanes.registers_shape(kind.shape)
        places = [(i, j * _DISTANCE) for i in range(len(refs)) for j in range(count)]
        found = [
            value
            for first in range(0, len(places), _AT_ONCE)
            for value in _poll(slots, places[first : first + _AT_ONCE], turn.registers.item())
        ]
        registers = np.array([utils.bitcast(value, values) for value in found], object)
        # The turn is not over, and the next one not begun, before all threads have this one's.
        utils.warpgroup_barrier()
        return [
            mgpu.FragmentedArray(_registers=each, _layout=lanes, _is_signed=None)
            for each in registers.reshape(len(refs), -1)
        ]

    return load(turn, *refs)


def put_line(x: jax.Array, turn: jax.Array, ref: Any) -> None:
    """Writes x [THREADS], laid out as LINE, into the ref's slots; x is of 16 or 32 bits."""

    @plgpu.inline_mgpu(arg_types=(LINE, plgpu.Layout.WG_SPLAT, plgpu.RefType()))
    def store(context, x, turn, ref):
        del context
        (values,), bits = words_of(x.registers.item()), utils.bitwidth(x.mlir_dtype)
        thread, turn = thread_number(), turn.registers.item()
        if bits == 32:
            word = arith.bitcast(i32_type(), values)
            utils.inline_ptx(_STORE_WORD, _word(ref, thread), word, turn)
            return
        # Neighbours share a word; the first of them stores it.
        own = arith.extui(i32_type(), arith.bitcast(ir.IntegerType.get_signless(16), values))
        other = utils.shfl_bfly(own, 1)
        word = arith.ori(own, arith.shli(other, i32(16)))
        place = _word(ref, arith.shrui(thread, i32(1)))
        utils.inline_ptx(_STORE_WORD_IF_EVEN, place, word, turn, thread)

    store(x, turn, ref)


def put_columns(
    matrix: jax.Array, row: jax.Array, turn: jax.Array, ref: Any, first: Any, count: int,
    distance: int,
) -> None:  # fmt: skip
    """Writes columns of a matrix as lines, and behind each a line of what the row says of it. The
    threads write what they have of the tensor cores' result: nothing goes through shared memory.

    Args:
      matrix: [THREADS, 8] float32, laid out as WGMMA. row: [8] float32, laid out as ROW.
      ref: Ref of the slots of column 0's line. The next column's begin `distance` elements on.
      first, count: first <= column < first + count are written.
    """
    arg_types = plgpu.Layout.WGMMA, ROW, *[plgpu.Layout.WG_SPLAT] * 2, plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=arg_types)
    def store(context, matrix, row, turn, first, ref):
        del context
        # A warp has 16 of 64 rows. A thread has one and the eighth behind it, of two columns.
        rows = [tile + half for tile in range(0, THREADS, 64) for half in (0, 8)]
        places = [line + row for line in (0, THREADS) for row in rows]
        registers = [*matrix.registers.flat, *[row.registers.item()] * len(rows)]
        stores = [
            _STORE_OF_TWO_COLUMNS.format(
                low=3 + 2 * i, at_low=_WORD_BYTES * place,
                high=4 + 2 * i, at_high=_WORD_BYTES * place + _INT_BYTES * distance,
            )
            for i, place in enumerate(places)
        ]  # fmt: skip
        words = [word for register in registers for word in words_of(register)]
        row, column = _first_of_matrix()
        words_between = i32(_INT_BYTES * distance // _WORD_BYTES)
        place = arith.addi(arith.muli(column, words_between), row)
        number = arith.subi(column, first.registers.item())
        text = _STORE_COLUMNS.format(count=count, stores="".join(stores))
        utils.inline_ptx(text, _word(ref, place), number, turn.registers.item(), *words)

    store(matrix, row, turn, first, ref)


def _first_of_matrix():
    """Row and column of the first of this thread's elements of a matrix laid out as WGMMA."""
    warp, lane = divided(thread_number(), 32)
    row, column = divided(lane, 4)
    rows_before = arith.muli(warp, i32(16))
    return arith.addi(rows_before, row), arith.muli(column, i32(2))


def take_lines(
    turn: jax.Array, refs: list[Any], fills: list[float], most: int, count: Any, distance: int
) -> list[list[jax.Array]]:
    """Waits for the turn's slots of up to `most` lines behind each ref.

    Args:
      refs: Refs of the slots of a first line. The others' begin `distance` elements after each
        other.
      fills: for each ref, what is in its lines from `count` on.
      count: lines behind each; above 0.

    Returns:
      For each ref `most` lines, each [THREADS] float32 as LINE.
    """
    returned = plgpu.ShapeDtypeStruct((THREADS,), jnp.float32, layout=LINE)

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT, *[plgpu.RefType() for _ in refs]
        ),
        return_type=[returned for _ in range(len(refs) * most)],
    )  # fmt: skip
    def load(context, turn, count, *refs):
        del context
        thread = thread_number()
        places = [_word(ref, thread) for ref in refs]
        found = _poll_lines(
            places, turn.registers.item(), count.registers.item(), fills, most, distance
        )
        return [array_of([value]) for value in found]

    lines = load(turn, count, *refs)
    return [lines[i : i + most] for i in range(0, len(lines), most)]


def line_of(matrix: jax.Array, shared_ref: Any) -> jax.Array:
    """One of the rows of a matrix, which are all the same, as a line. Each warp has all of its
    columns, but not each where its thread is.

    Args:
      matrix: [64, THREADS] float32, laid out as WGMMA.
      shared_ref: Ref of [THREADS] float32 in shared memory, that the threads exchange it in.
    """
    returned = plgpu.ShapeDtypeStruct((THREADS,), jnp.float32, layout=LINE)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()), return_type=returned)
    def exchange(context, matrix, ref):
        del context
        # Of every eight columns a thread has two, in each of two halves of the rows.
        words = [word for pair in matrix.registers.flat[::2] for word in words_of(pair)]
        stores = [
            _STORE_SHARED.format(low=1 + i, high=2 + i, offset=16 * i)
            for i in range(0, len(words), 2)
        ]
        thread, base = thread_number(), utils.memref_ptr(ref)
        pair = arith.remui(thread, i32(4))
        place = utils.getelementptr(base, [pair], ir.IntegerType.get_signless(64))
        element = utils.getelementptr(base, [thread], i32_type())
        utils.warpgroup_barrier()
        utils.inline_ptx("".join(stores), place, *words)
        utils.warpgroup_barrier()
        kind = ir.F32Type.get()
        value = utils.inline_ptx(_LOAD_SHARED, element, result_types=kind, has_side_effects=True)
        return array_of([value])

    return exchange(matrix, shared_ref)


def _words(x):
    return [words_of(vector.bitcast(_pair(), values)) for values in x.registers.flat]


def _first_slot(ref):
    """Address of this thread's first slot; the next ones follow at _DISTANCE bytes."""
    return _word(ref, arith.muli(thread_number(), i32(2)))


def _word(ref, index):
    """Address of one of the ref's words, beside which its turn is."""
    return utils.getelementptr(utils.memref_ptr(ref), [index], ir.IntegerType.get_signless(64))


def _poll(slots: list[ir.Value], places: list[tuple[int, int]], turn: ir.Value) -> list[ir.Value]:
    """The eight bytes of values in each of these places, once all are of this turn.

    places: which of the addresses, and so many bytes on."""
    count = len(places)
    loads = [
        _LOAD.format(
            low=2 * i, high=2 * i + 1, turn=f"${count}", place=f"${count + 1 + slot}+{offset}"
        )
        for i, (slot, offset) in enumerate(places)
    ]
    results = [f"mov.b64 ${i}, {{word{2 * i}, word{2 * i + 1}}};\n" for i in range(count)]
    kinds = [ir.IntegerType.get_signless(64)] * count
    return _wait("", loads, results, kinds, 2 * count, turn, *slots)


def _poll_lines(
    places: list[ir.Value], turn: ir.Value, lines: ir.Value, fills: list[float], most: int,
    distance: int,
) -> list[ir.Value]:  # fmt: skip
    """The values in `most` lines behind each of these places, once all `lines` of them that there
    are are of this turn; of the others the place's fill. Arguments are those of `take_lines`."""
    count = most * len(places)
    numbers = [(i, *divmod(i, most)) for i in range(count)]
    first = [f"mov.b32 word{i}, {_bits(fills[place])};\n" for i, place, _ in numbers]
    loads = [
        _LOAD_LINE.format(
            i=i, number=number, turn=f"${count}", lines=f"${count + 1}",
            place=f"${count + 2 + place}+{number * distance * _INT_BYTES}",
        )
        for i, place, number in numbers
    ]  # fmt: skip
    kinds = [ir.F32Type.get()] * count
    results = [f"mov.b32 ${i}, word{i};\n" for i in range(count)]
    return _wait("".join(first), loads, results, kinds, count, turn, lines, *places)


def _wait(
    first: str, loads: list[str], results: list[str], kinds: list[ir.Type], words: int,
    *operands: ir.Value,
) -> list[ir.Value]:  # fmt: skip
    """Results, of these kinds, of so many words that the loads find when none of them is late."""
    text = _POLL.format(count=words, first=first, loads="".join(loads), results="".join(results))
    return utils.inline_ptx(text, *operands, result_types=kinds, has_side_effects=True)


def _bits(value: float) -> str:
    """A float32 as PTX writes the bits of a word."""
    return f"0x{np.float32(value).view(np.uint32):08x}"


def _pair() -> ir.Type:
    return ir.VectorType.get((2,), i32_type())
