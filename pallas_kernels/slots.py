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

# A row of what the tensor cores make: 32 threads each have the same of it.
ROW = plgpu.Layout.WGMMA.reduce(0)
# One value for each thread of a warpgroup.
LINE = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)
# Of values, in one slot.
_SLOT_BYTES = 8
# Slots that a thread polls together: each costs four registers.
_AT_ONCE = 16

_STORE = """{
.reg .b64 a, b;
mov.b64 a, {$1, $3};
mov.b64 b, {$2, $3};
st.relaxed.sys.global.v2.b64 [$0], {a, b};
}"""
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
_LOAD = """ld.relaxed.sys.global.v2.b64 {{a, b}}, [{address}];
mov.b64 {{word{low}, turn}}, a;
xor.b32 turn, turn, {turn};
or.b32 late, late, turn;
mov.b64 {{word{high}, turn}}, b;
xor.b32 turn, turn, {turn};
or.b32 late, late, turn;
"""
_LOAD_WORD = """ld.relaxed.sys.global.b64 a, [{address}];
mov.b64 {{word{low}, turn}}, a;
xor.b32 turn, turn, {turn};
or.b32 late, late, turn;
"""
_POLL = """{{
.reg .pred again;
.reg .b64 a, b;
.reg .b32 turn, late, word<{count}>;
poll:
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
            for slot, (low, high) in zip(_slots(ref, x.layout), words, strict=True):
                utils.inline_ptx(_STORE, slot, low, high, turn.registers.item())

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
        slots = [slot for ref in refs for slot in _slots(ref, lanes)]
        words = [
            pair
            for first in range(0, len(slots), _AT_ONCE)
            for pair in _poll(slots[first : first + _AT_ONCE], turn.registers.item())
        ]
        registers = _registers(words, values)
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
        thread, turn = _thread(), turn.registers.item()
        if bits == 32:
            word = arith.bitcast(_i32(), values)
            utils.inline_ptx(_STORE_WORD, _word(ref, thread), word, turn)
            return
        # Neighbours share a word; the first of them stores it.
        own = arith.extui(_i32(), arith.bitcast(ir.IntegerType.get_signless(16), values))
        other = utils.shfl_bfly(own, 1)
        word = arith.ori(own, arith.shli(other, mgpu.c(16, _i32())))
        place = _word(ref, arith.shrui(thread, mgpu.c(1, _i32())))
        utils.inline_ptx(_STORE_WORD_IF_EVEN, place, word, turn, thread)

    store(x, turn, ref)


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
        count, thread = count.registers.item(), _thread()
        numbers = [mgpu.c(i, _i32()) for i in range(most)]
        # In place of lines that there are not, the last one is waited for.
        last = arith.subi(count, mgpu.c(1, _i32()))
        offsets = [
            arith.muli(arith.minui(number, last), mgpu.c(distance, _i32())) for number in numbers
        ]
        places = [
            utils.getelementptr(_word(ref, thread), [offset], _i32())
            for ref in refs
            for offset in offsets
        ]
        words = _poll_words(places, turn.registers.item())
        is_there = [arith.cmpi(arith.CmpIPredicate.ult, number, count) for number in numbers]
        return [_line(is_there[i % most], word, fills[i // most]) for i, word in enumerate(words)]

    lines = load(turn, count, *refs)
    return [lines[i : i + most] for i in range(0, len(lines), most)]


def _line(is_there, word, fill):
    """A word as this thread's value of a line."""
    f32 = ir.F32Type.get()
    value = arith.select(is_there, arith.bitcast(f32, word), mgpu.c(fill, f32))
    registers = np.array([vector.from_elements(ir.VectorType.get((1,), f32), [value])], object)
    return mgpu.FragmentedArray(_registers=registers, _layout=LINE.to_mgpu(), _is_signed=None)


def any_row(matrix: jax.Array) -> jax.Array:
    """One of the rows of a matrix laid out as WGMMA whose rows are all the same. Every thread has
    its part of one already."""
    columns = matrix.shape[1]
    returned = plgpu.ShapeDtypeStruct((columns,), matrix.dtype, layout=ROW)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=returned)
    def pick(context, matrix):
        del context
        layout = ROW.to_mgpu()
        shape = layout.registers_shape((columns,))
        # Column tiles, and in each two halves of the rows.
        registers = matrix.registers.reshape(shape[0], 2)[:, 0].reshape(shape)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return pick(matrix)


def _thread():
    """Number of a thread in its warpgroup."""
    return arith.remui(utils.thread_idx(), mgpu.c(THREADS, _i32()))


def words_of(register: ir.Value) -> list[ir.Value]:
    """The elements of a vector."""
    return [vector.extract(register, [], [i]) for i in range(register.type.shape[0])]


def _words(x):
    return [words_of(vector.bitcast(_pair(), values)) for values in x.registers.flat]


def _registers(words, kind):
    """Registers of this type, each made of two words."""
    pairs = [vector.from_elements(_pair(), pair) for pair in words]
    return np.array([vector.bitcast(kind, pair) for pair in pairs], dtype=object)


def _slots(ref: ir.Value, layout: Any) -> list[ir.Value]:
    """Addresses of this thread's slots."""
    i8, i64 = (ir.IntegerType.get_signless(bits) for bits in (8, 64))
    base, width = utils.memref_ptr(ref), mgpu.c(2 * _SLOT_BYTES // layout.vec_size, i64)
    offsets = [arith.index_cast(i64, element) for element in layout.linear_thread_idxs()]
    return [utils.getelementptr(base, [arith.muli(x, width)], i8) for x in offsets]


def _word(ref, index):
    """Address of one of the ref's words, beside which its turn is."""
    return utils.getelementptr(utils.memref_ptr(ref), [index], ir.IntegerType.get_signless(64))


def _poll(slots: list[ir.Value], turn: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
    """The two words in each of these slots, once all are of this turn."""
    words = _wait(_LOAD, slots, turn, 2 * len(slots))
    return list(zip(words[::2], words[1::2], strict=True))


def _poll_words(places: list[ir.Value], turn: ir.Value) -> list[ir.Value]:
    """The word in each of these places, once all are of this turn."""
    return _wait(_LOAD_WORD, places, turn, len(places))


def _wait(load: str, places: list[ir.Value], turn: ir.Value, count: int) -> list[ir.Value]:
    each = count // len(places)
    loads = [
        load.format(low=each * i, high=each * i + 1, turn=f"${count}", address=f"${count + 1 + i}")
        for i in range(len(places))
    ]
    results = [f"mov.b32 ${i}, word{i};\n" for i in range(count)]
    text = _POLL.format(count=count, loads="".join(loads), results="".join(results))
    return utils.inline_ptx(
        text, turn, *places, result_types=[_i32()] * count, has_side_effects=True
    )


def _pair() -> ir.Type:
    return ir.VectorType.get((2,), _i32())


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)
