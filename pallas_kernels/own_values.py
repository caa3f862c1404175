"""Values that each thread of a warpgroup has of its own, on Pallas Mosaic GPU.

n of each are an array [n * THREADS] laid out as `own(n)`: what is at i * THREADS + t is thread t's.
Plain arithmetic on such arrays is each thread's own. Here is what else they need, for the kernels
and for inline functions of them, which see the values themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
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


def own(count: int) -> plgpu.Layout:
    """Of so many values of each thread."""
    return plgpu.Layout.WG_STRIDED((count * THREADS,), vec_size=1)


def gather(ref: Any, index: jax.Array) -> jax.Array:
    """Each thread's own elements of float32 [n]."""
    layout = own(index.size // THREADS)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), layout),
        return_type=plgpu.ShapeDtypeStruct(index.shape, jnp.float32, layout=layout),
    )
    def load(context, ref, index):
        del context
        f32 = ir.F32Type.get()
        addresses = [utils.getelementptr(utils.memref_ptr(ref), [i], f32) for i in values_of(index)]
        return array_of(
            utils.inline_ptx("ld.global.f32 $0, [$1];", address, result_types=f32)
            for address in addresses
        )

    return load(ref, index)


def scatter(ref: Any, index: jax.Array, value: jax.Array) -> None:
    """Stores each thread's own values as elements of the ref, whose dimensions count as one; not
    where the index is negative."""
    layout = own(index.size // THREADS)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout, layout))
    def store(context, ref, index, value):
        del context
        for i, each in zip(values_of(index), values_of(value), strict=True):
            bits = ir.IntegerType.get_signless(utils.bitwidth(each.type))
            address = utils.getelementptr(utils.memref_ptr(ref), [i], bits)
            is_wanted = arith.cmpi(arith.CmpIPredicate.sge, i, i32(0))
            text = f"st.global.b{bits.width} [$0], $1;"
            utils.inline_ptx(text, address, arith.bitcast(bits, each), predicate=is_wanted)

    store(ref, index, value)


def thread_number() -> ir.Value:
    """Number of a thread in its warpgroup."""
    (element,) = own(1).to_mgpu().linear_thread_idxs()
    return arith.index_cast(i32_type(), element)


def is_less(x: ir.Value, y: ir.Value) -> ir.Value:
    """Of signed integers."""
    return arith.cmpi(arith.CmpIPredicate.slt, x, y)


def divided(x: ir.Value, size: int) -> tuple[ir.Value, ir.Value]:
    """Quotient and remainder."""
    return arith.divui(x, i32(size)), arith.remui(x, i32(size))


def words_of(register: ir.Value) -> list[ir.Value]:
    """The elements of a vector."""
    return [vector.extract(register, [], [i]) for i in range(register.type.shape[0])]


def values_of(x: mgpu.FragmentedArray) -> list[ir.Value]:
    """A thread's values of an array."""
    return [value for register in x.registers.flat for value in words_of(register)]


def array_of(values: Iterable[ir.Value]) -> mgpu.FragmentedArray:
    """The array of which each thread has these values."""
    registers = [vector.from_elements(ir.VectorType.get((1,), x.type), [x]) for x in values]
    return mgpu.FragmentedArray(
        _registers=np.array(registers, object),
        _layout=own(len(registers)).to_mgpu(),
        _is_signed=None,
    )


def i32(value: int) -> ir.Value:
    """A constant."""
    return mgpu.c(value, i32_type())


def i32_type() -> ir.Type:
    """Of 32-bit integers."""
    return ir.IntegerType.get_signless(32)
