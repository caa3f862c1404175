"""Where threads put values and take them from: the addresses in what is lowered for CUDA, worked
out for each thread, beside what Mosaic's layouts say of its registers.

conftest.py leaves this file out where jax cannot lower kernels (before 0.11.2).
"""

from __future__ import annotations

import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from kernel_runs import lowered_for_cuda

from jaxdecode.pallas_kernels import slots
from jaxdecode.pallas_kernels.mosaic import THREADS

OPERATIONS = {
    "arith.addi": operator.add,
    "arith.subi": operator.sub,
    "arith.muli": operator.mul,
    "arith.divui": operator.floordiv,
    "arith.remui": operator.mod,
    "arith.shrui": operator.rshift,
    "arith.index_cast": lambda x: x,
    "arith.index_castui": lambda x: x,
}


def in_threads(value, argument: int = 0) -> np.ndarray:
    """What a number is in each thread of a kernel's only warpgroup; an address, in bytes behind
    the beginning of its Ref. argument: what the number is that the kernel loads."""
    if isinstance(value, ir.BlockArgument):
        return np.full(THREADS, argument)
    operation = value.owner
    if operation.name == "gpu.thread_id":
        is_first = "<x>" in str(operation.attributes["dimension"])
        return np.arange(THREADS) if is_first else np.zeros(THREADS, int)
    if operation.name == "arith.constant":
        return np.full(THREADS, operation.attributes["value"].value)
    if operation.name == "llvm.inttoptr":
        return np.zeros(THREADS, int)
    if operation.name == "gpu.block_dim":
        return np.full(THREADS, THREADS)
    if operation.name == "llvm.getelementptr":
        start, index = (in_threads(x, argument) for x in operation.operands)
        return start + index * (operation.attributes["elem_type"].value.width // 8)
    return OPERATIONS[operation.name](*(in_threads(x, argument) for x in operation.operands))


def elements(layout, shape):
    """[registers, dimensions, threads] index of the first element in each register."""
    indices = layout.to_mgpu().thread_idxs(shape)
    return np.array([[in_threads(x) for x in index] for index in indices])


def inspected(monkeypatch, body, inspect, *scratch):
    """What inspect(text, operands) says of each assembly text that touches memory in a kernel
    body(numbers_ref, slots_ref, *scratch), while there is that kernel: operands are values in it.
    """
    found, emit = [], utils.inline_ptx

    def recorded(text, *operands, **options):
        if re.search(r"(st|ld)\.(relaxed|shared)\.", text):
            found.append(inspect(text, operands))
        return emit(text, *operands, **options)

    def call(numbers, memory):
        ref = jax.new_ref(memory)
        plgpu.kernel(body, out_type=(), scratch_types=scratch)(numbers, ref)
        return jax.freeze(ref)

    monkeypatch.setattr(utils, "inline_ptx", recorded)
    lowered_for_cuda(call, *(jax.ShapeDtypeStruct((n,), jnp.int32) for n in (2, 1 << 16)))
    return found


def sources(word):
    """[dimensions, threads] index that a word, an element of a register, has in its array."""
    extract = word.owner
    (register,), (place,) = extract.operands, extract.attributes["static_position"]
    shape = tuple(register.owner.operands[0].type.shape)
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else slots.ROW
    index = elements(layout, shape)[register.result_number]
    index[-1] += place
    return index


_COLUMN_STORE = re.compile(
    r"mov\.b64 a, {\$(\d+), \$2};\n@has_(low|high) st\.relaxed\.sys\.global\.b64 \[\$0\+(\d+)\]"
)
_SHARED_STORE = re.compile(r"st\.shared\.v2\.f32 \[\$0\+(\d+)\], {\$(\d+), \$(\d+)}")


@pytest.mark.parametrize(("first", "count"), [(0, 8), (2, 2), (5, 1), (4, 4)])
def test_columns_of_a_matrix_become_lines(monkeypatch, first, count):
    distance = 4 * THREADS

    def put(numbers_ref, slots_ref):
        matrix = plgpu.layout_cast(jnp.ones((THREADS, 8), jnp.float32), plgpu.Layout.WGMMA)
        row = plgpu.layout_cast(jnp.ones(8, jnp.float32), slots.ROW)
        turn, first = numbers_ref[0], numbers_ref[1]
        slots.put_columns(matrix, row, turn, slots_ref, first, count, distance)

    def memory_after(text, operands):
        """Of the matrix, or of the row, the index that each address has its value from."""
        assert f"setp.lt.u32 has_low, $1, {count};\nsetp.lt.u32 has_high, next, {count};" in text
        start, number = (in_threads(x, first) for x in operands[:2])
        memory = {}
        for word, which, offset in _COLUMN_STORE.findall(text):
            is_there = (number + (which == "high")) % 2**32 < count
            index = sources(operands[int(word)])
            for address, element in zip(
                (start + int(offset))[is_there], index.T[is_there], strict=True
            ):
                memory.setdefault(int(address), set()).add(tuple(element.tolist()))
        return memory

    (memory,) = inspected(monkeypatch, put, memory_after)
    expected = {}
    for column in range(first, first + count):
        for row in range(THREADS):
            address = 4 * distance * column + 8 * row
            expected[address] = {(row, column)}
            expected[address + 8 * THREADS] = {(column,)}
    assert memory == expected


def addresses(text, operands, results=None):
    """[loads or stores, threads]."""
    if results is None:
        results = len(re.findall(r"mov\.b(?:32|64) \$", text))
    found = re.findall(r"\[\$(\d+)\+?(\d*)\]", text)
    return np.array([in_threads(operands[int(i) - results]) + int(j or 0) for i, j in found])


@pytest.mark.parametrize(
    ("size", "dtype"), [(512, "bfloat16"), (16384, "float16"), (512, "float32")]
)
def test_slots_of_a_vector(monkeypatch, size, dtype):
    """Values that are together in a register are in a slot, and these are in their order."""
    kind, layout = jax.ShapeDtypeStruct((size,), jnp.dtype(dtype)), slots.slot_layout(size, dtype)
    per_slot = 8 // kind.dtype.itemsize

    def take_and_put(numbers_ref, slots_ref):
        one, other = slots.take(numbers_ref[0], [slots_ref] * 2, kind)
        slots.put(one + other, numbers_ref[0], [slots_ref])

    def slots_and_addresses(text, operands):
        (values,) = zip(*elements(layout, (size,)), strict=True)
        return np.array(values) // per_slot, addresses(text, operands)

    numbers, found = zip(*inspected(monkeypatch, take_and_put, slots_and_addresses), strict=True)
    # Those of both vectors are taken before the sum is put there.
    np.testing.assert_array_equal(np.concatenate(found), np.tile(16 * numbers[0], (3, 1)))


def test_places_of_lines(monkeypatch):
    most, distance = 3, 4 * THREADS

    def take_and_put(numbers_ref, slots_ref):
        refs, turn = [slots_ref, slots_ref], numbers_ref[0]
        (line, *_), _ = slots.take_lines(turn, refs, [0.0, -1.0], most, numbers_ref[1], distance)
        slots.put_line(line, turn, slots_ref)

    def text_and_addresses(text, operands):
        return text, addresses(text, operands)

    taken, put = inspected(monkeypatch, take_and_put, text_and_addresses)
    words = 8 * np.arange(THREADS)
    expected = [4 * distance * i + words for i in range(most)]
    np.testing.assert_array_equal(taken[1], [*expected, *expected])
    assert "mov.b32 word2, 0x00000000;\nmov.b32 word3, 0xbf800000;\n" in taken[0]
    # Each of them is taken if there are more lines than are before it.
    numbers = re.findall(r"setp\.gt\.s32 is_there, \$7, (\d);", taken[0])
    assert numbers == ["0", "1", "2"] * 2
    np.testing.assert_array_equal(put[1], [words])


def test_a_row_becomes_a_line(monkeypatch):
    def put(numbers_ref, slots_ref, shared_ref):
        matrix = plgpu.layout_cast(jnp.ones((64, THREADS), jnp.float32), plgpu.Layout.WGMMA)
        slots.put_line(slots.line_of(matrix, shared_ref), numbers_ref[0], slots_ref)

    def inspect(text, operands):
        """The columns that each address gets its value from, and the addresses of loads."""
        if "ld.shared" in text:
            return addresses(text, operands, results=1)
        memory = {}
        for offset, *words in _SHARED_STORE.findall(text):
            start = in_threads(operands[0]) + int(offset or 0)
            for i, word in enumerate(words):
                for address, (_, column) in zip(
                    start + 4 * i, sources(operands[int(word)]).T, strict=True
                ):
                    memory.setdefault(int(address), set()).add(int(column))
        return memory

    memory, loads, _ = inspected(monkeypatch, put, inspect, plgpu.SMEM((THREADS,), jnp.float32))
    assert memory == {4 * column: {column} for column in range(THREADS)}
    np.testing.assert_array_equal(loads, [4 * np.arange(THREADS)])
