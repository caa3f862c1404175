"""Residual and norm as one operation: against float64, interpreted, and lowered for CUDA.

conftest.py leaves this file out where jax has no interpreter for the kernel (before 0.11.2).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from kernel_runs import lowered_for_cuda
from meshes import make_mesh
from norm_runs import EPS, WIDTHS, check, inputs

from jaxdecode.pallas_kernels import flash_decode, norm, norm_kernel
from jaxdecode.pallas_kernels.kernel_call import with_plain_gradient

plain = functools.partial(norm.plain, eps=EPS)
kernel = functools.partial(norm._kernel, eps=EPS)


def shapes(B: int, T: int, D: int, dtype):
    x = jax.ShapeDtypeStruct((B, T, D), dtype)
    return x, x, jax.ShapeDtypeStruct((D,), dtype)


@pytest.mark.parametrize("dtype", norm.DTYPES)
@pytest.mark.parametrize("D", WIDTHS)
def test_interpreted_against_the_reference(interpreter, D, dtype):
    operands = inputs(2, 1, D, dtype)
    check(kernel(*operands), *operands)


@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 5), (3, 2)])
def test_interpreted_rows(interpreter, B, T):
    operands = inputs(B, T, 2048, jnp.bfloat16)
    check(kernel(*operands), *operands)


@pytest.mark.parametrize("dtype", norm.DTYPES)
def test_the_plain_formula(dtype):
    operands = inputs(2, 3, 576, dtype)
    check(plain(*operands), *operands)


@pytest.mark.parametrize("D", [576, 2048])
def test_the_check_sees_an_element_left_out_of_the_squares_and_one_counted_twice(D):
    x, delta, scale = inputs(1, 1, D, jnp.float32)
    total, normed = plain(x, delta, scale)
    squares = jnp.sum(total**2)
    for wrong in (squares - total[0, 0, -1] ** 2, squares + total[0, 0, -127] ** 2):
        with pytest.raises(AssertionError):
            check((total, normed * jnp.sqrt(squares / wrong)), x, delta, scale)


def test_the_number_of_parts_changes_no_bit(interpreter):
    x, delta, scale = (each.reshape(-1, 4096)[:2] for each in inputs(2, 1, 4096, jnp.bfloat16))
    run = functools.partial(norm_kernel.add_and_norm, x, delta, scale.reshape(-1), eps=EPS)
    expected = run(parts=1)
    for parts in (2, 4, 8):
        for found, wanted in zip(run(parts=parts), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_rows_are_cut_into_as_many_parts_as_find_a_multiprocessor():
    assert [norm.choose_parts(1, D) for D in WIDTHS] == [1, 1, 1, 1, 1, 2, 4, 5, 4, 8]
    assert [norm.choose_parts(rows, 8192) for rows in (16, 17, 33, 34, 66, 67)] == [
        8,
        4,
        4,
        2,
        2,
        1,
    ]


@pytest.mark.parametrize("rows", [1, 40, norm.MAX_ROWS])
@pytest.mark.parametrize("D", WIDTHS)
def test_lowers_for_cuda(D, rows):
    assert norm.why_not((rows, 1, D), jnp.bfloat16) is None
    assert "mosaic_gpu" in lowered_for_cuda(kernel, *shapes(rows, 1, D, jnp.bfloat16))


def test_calls_of_one_shape_share_a_lowering():
    def layers(x, delta, scale):
        for _ in range(3):
            x, delta = kernel(x, delta, scale)
        return x, delta

    text = lowered_for_cuda(layers, *shapes(1, 1, 1024, jnp.bfloat16))
    assert text.count("custom_call @mosaic_gpu") == 1
    assert text.count("call @_rows") == 3


def through_kernel(*operands):
    return with_plain_gradient(kernel, plain, operands)


def gradient(call, *operands):
    def loss(*operands):
        total, normed = call(*operands)
        return jnp.sum(jnp.sin(total)) + jnp.sum(normed**3)

    return jax.grad(loss, (0, 1, 2))(*operands)


def test_gradient_is_that_of_the_formula(interpreter):
    operands = inputs(2, 1, 256, jnp.float32)
    found = gradient(through_kernel, *operands)
    for one, other in zip(found, gradient(plain, *operands), strict=True):
        assert jnp.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", [(0, 0, None), (0, None, 0)], ids=str)
def test_vmap_is_that_of_the_formula(axes):
    x, delta, scale = (
        jnp.stack([each, each * 2, each * 3]) if axis == 0 else each
        for each, axis in zip(inputs(2, 1, 256, jnp.float32), axes, strict=True)
    )
    mapped = jax.vmap(through_kernel, axes)
    expected = jax.vmap(plain, axes)(x, delta, scale)
    for one, other in zip(mapped(x, delta, scale), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert "mosaic_gpu" not in lowered_for_cuda(mapped, x, delta, scale)


def test_inside_shard_map_results_vary_like_the_rows(monkeypatch):
    """And the gradient of the scale, which all devices share, is summed over them."""
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: None)
    specs = P("data"), P("data"), P()
    call = functools.partial(norm.add_and_norm, eps=EPS)
    mesh, operands = make_mesh((2, 2, 1)), inputs(2, 1, 256, jnp.float32)
    mapped = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=P("data"))
    for one, other in zip(jax.jit(mapped)(*operands), plain(*operands), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert "mosaic_gpu" in lowered_for_cuda(mapped, *operands)
    found = gradient(mapped, *operands)
    for one, other in zip(found, gradient(plain, *operands), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    everywhere = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=P())
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(everywhere).trace(*operands)


def test_vmap_inside_shard_map_and_around_it(monkeypatch):
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: None)
    call = functools.partial(norm.add_and_norm, eps=EPS)
    mesh, (x, delta, scale) = make_mesh((2, 2, 1)), inputs(2, 1, 256, jnp.float32)
    many = jnp.stack([x] * 4), jnp.stack([delta] * 4), scale
    options = {"mesh": mesh, "in_specs": (P("data"), P("data"), P()), "out_specs": P("data")}
    inside = jax.shard_map(jax.vmap(call, (0, 0, None)), **options)
    around = jax.vmap(jax.shard_map(call, **options), (0, 0, None))
    for mapped in (inside, around):
        for one, other in zip(jax.jit(mapped)(*many), plain(x, delta, scale), strict=True):
            np.testing.assert_allclose(one, jnp.stack([other] * 4), rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((1, 1, 1024), "int8", "takes bfloat16, float16, float32, not int8"),
        ((1, 1, 1028), "bfloat16", "multiple of 8 and at least 128, not 1028"),
        ((1, 1, 120), "bfloat16", "multiple of 8 and at least 128, not 120"),
        ((1, 1, 16384), "float32", "at most 32768 bytes, not 16384 of float32"),
        ((2, 67, 1024), "bfloat16", "1 to 132 rows, not 134"),
        ((0, 1, 1024), "bfloat16", "1 to 132 rows, not 0"),
    ],
)
def test_what_is_left_to_xla(shape, dtype, words):
    assert words in norm.why_not(shape, dtype)


def test_the_kernel_runs_where_it_can(monkeypatch):
    def call():
        """A new function each time, of which jit knows no trace."""
        return lambda *operands: norm.add_and_norm(*operands, EPS)

    fitting, long = shapes(1, 1, 1024, jnp.bfloat16), shapes(1, 500, 1024, jnp.bfloat16)
    assert "mosaic_gpu" not in lowered_for_cuda(call(), *fitting)
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: None)
    assert "mosaic_gpu" in lowered_for_cuda(call(), *fitting)
    assert "mosaic_gpu" not in lowered_for_cuda(call(), *long)
    operands = inputs(1, 1, 1024, jnp.bfloat16)
    # Lowered for the CPU, though this process is taken to have a GPU.
    for one, other in zip(jax.jit(call())(*operands), jax.jit(plain)(*operands), strict=True):
        np.testing.assert_array_equal(one, other)
