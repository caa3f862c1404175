"""The split-KV kernels lowered for CUDA, where this process has no GPU.

conftest.py leaves this file out where jax cannot lower them (before 0.11.2).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from kernel_runs import input_shapes, lowered_for_cuda

from jaxdecode.pallas_kernels import flash_decode
from jaxdecode.pallas_kernels.split_config import blocks_to_merge_in_one


def lowered(*shape, sinks=False, **options):
    """What is compiled for CUDA; shape: B, T, S, N, K, H and the dtype."""
    operands = input_shapes(*shape)
    if sinks:
        operands = *operands, jax.ShapeDtypeStruct((operands[0].shape[2],), jnp.float32)

    def call(q, k, v, lo, hi, sinks=None):
        return flash_decode.attend(q, k, v, lo, hi, scale=0.1, sinks=sinks, **options)

    return lowered_for_cuda(call, *operands)


def kernels_lowered(*shape):
    """How many kernels are compiled for CUDA."""
    return lowered(*shape, softcap=20.0).count("custom_call @mosaic_gpu")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 65536, 16, 2), (1, 1, 512, 64, 8), (8, 1, 8192, 32, 32), (2, 1, 64, 8, 8),
        (1, 1, 72, 8, 1), (1, 2048, 4096, 8, 2),
    ],
    ids=str,
)  # fmt: skip
def test_lowers_for_cuda(shape, dtype):
    assert kernels_lowered(*shape, 128, dtype) == 2


@pytest.mark.parametrize("H", flash_decode.HEAD_DIMS)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 512, 16, 2), (1, 3, 512, 9, 3), (2, 5, 1024, 28, 4), (1, 16, 512, 71, 1),
        (1, 1, 64, 64, 1), (2, 3, 512, 18, 2), (1, 64, 512, 1, 1),
    ],
    ids=str,
)  # fmt: skip
def test_every_head_dim_lowers_for_cuda(shape, H):
    assert kernels_lowered(*shape, H) == 2


SPLIT, PLANNED = "flash_decode_split_mosaic_gpu", "flash_decode_split_planned_mosaic_gpu"
# By name, B, dtype, options and the kernel of step 1. One sequence needs no plan.
CALLS = {
    "one sequence, sinks": (1, jnp.bfloat16, {"sinks": True}, SPLIT),
    "fixed splits": (2, jnp.float16, {"num_splits": 3}, SPLIT),
    "fixed splits, sinks": (2, jnp.bfloat16, {"num_splits": 3, "sinks": True}, SPLIT),
    "plan": (2, jnp.float16, {}, PLANNED),
    "plan, sinks": (2, jnp.float16, {"sinks": True}, PLANNED),
}


@pytest.mark.parametrize("rows", [(1, 16, 2), (3, 18, 2)], ids=["few rows", "many rows"])
@pytest.mark.parametrize("H", flash_decode.HEAD_DIMS)
@pytest.mark.parametrize("name", CALLS)
def test_every_call_lowers_for_cuda(name, H, rows):
    B, dtype, options, kernel = CALLS[name]
    T, *heads = rows
    text = lowered(B, T, 512, *heads, H, dtype, **options)
    assert text.count("custom_call @mosaic_gpu") == 2
    assert kernel in text


@pytest.fixture
def in_one(monkeypatch):
    """As on a GPU with as many multiprocessors as the kernels want."""
    monkeypatch.setattr(
        flash_decode, "merges_in_one", lambda *shapes: blocks_to_merge_in_one(*shapes) is not None
    )


# By name, B and options; the kernel, and whether it is all.
IN_ONE = {
    "one sequence": (1, {}, "flash_decode_mosaic_gpu", 1),
    "one sequence, sinks": (1, {"sinks": True, "softcap": 20.0}, "flash_decode_mosaic_gpu", 1),
    "plan": (60, {}, "flash_decode_planned_mosaic_gpu", 1),
    "plan, sinks": (60, {"sinks": True, "softcap": 20.0}, "flash_decode_planned_mosaic_gpu", 1),
    "fixed splits": (1, {"num_splits": 3}, SPLIT, 2),
    "few items": (3, {}, PLANNED, 2),
}


# Rows and head_dim: 8 rows, 1, 15, and 6 of every head_dim.
IN_ONE_SIZES = [
    *(((1, 16, 2), 128), ((1, 4, 4), 128), ((5, 6, 2), 128)),
    *(((3, 8, 4), H) for H in flash_decode.HEAD_DIMS),
]


@pytest.mark.parametrize(("rows", "H"), IN_ONE_SIZES)
@pytest.mark.parametrize("name", IN_ONE)
def test_one_launch_lowers_for_cuda(in_one, name, rows, H):
    B, options, kernel, count = IN_ONE[name]
    T, *heads = rows
    text = lowered(B, T, 512, *heads, H, jnp.bfloat16, **options)
    assert text.count("custom_call @mosaic_gpu") == count
    assert kernel in text


@pytest.mark.parametrize("shape", [(1, 8, 128, 16, 8), (1, 16, 2048, 6, 6), (50, 8, 128, 16, 8)])
def test_one_launch_of_the_most_shared_memory_lowers_for_cuda(in_one, shape):
    """Of the widest heads as many rows as there can be, in few chunks: most to merge at once."""
    assert lowered(*shape, 256, jnp.bfloat16).count("custom_call @mosaic_gpu") == 1


def test_lengths_change_nothing_in_the_program(in_one):
    """The slots are a constant of it: one for all calls, and not filled in by a kernel."""

    def layers(q, k, v, lo, hi):
        for _ in range(3):
            q, _ = flash_decode.attend(q, k, v, lo, hi, scale=0.1, out_dtype=q.dtype)
        return q

    text = lowered_for_cuda(layers, *input_shapes(1, 1, 512, 16, 2, 128))
    # 8 parts of 8 rows of 64 slots.
    assert text.count("tensor<16388xi32>") >= 1
    assert text.count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("B", [1, 2])
def test_equal_layers_share_one_lowering(B):
    def layers(q, k, v, lo, hi):
        for _ in range(8):
            q, _ = flash_decode.attend(q, k, v, lo, hi, scale=0.1, out_dtype=q.dtype)
        return q

    text = lowered_for_cuda(layers, *input_shapes(B, 1, 1024, 16, 2, 128))
    assert text.count("custom_call @mosaic_gpu") == 2


def test_exports_for_cuda():
    kernel_calls = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    call = jax.jit(functools.partial(flash_decode.attend, scale=0.1, out_dtype=jnp.bfloat16))
    export = jax.export.export(call, platforms=["cuda"], disabled_checks=[kernel_calls])
    exported = export(*input_shapes(2, 1, 1024, 16, 2, 128))
    assert exported.platforms == ("cuda",)
    assert [(x.shape, x.dtype) for x in exported.out_avals] == [
        ((2, 1, 16, 128), jnp.bfloat16),
        ((2, 1, 16), jnp.float32),
    ]
    assert exported.mlir_module().count("custom_call @mosaic_gpu") == 2
