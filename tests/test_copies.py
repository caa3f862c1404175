"""Where the copies of the attention kernels begin and end, which only a GPU would notice.

conftest.py leaves this file out where jax cannot trace the kernels (before 0.11.2).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
import test_fused_attend
import test_fused_layer
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_runs import input_shapes

from jaxdecode.pallas_kernels import flash_decode, fused_layer
from jaxdecode.pallas_kernels.split_config import blocks_to_merge_in_one

# Bytes. TMA stops at other addresses of shared memory; Mosaic's interpreter copies from anywhere.
ALIGNMENT = 128


def indices(ref):
    """(index, axis, shape) of all that makes `ref` a part of an array."""
    for transform in ref.transforms:
        for axis, index in enumerate(getattr(transform, "indices", ())):
            yield index, axis, transform.shape


def misplaced(ref) -> list[str]:
    """What brings a part of shared memory off the multiples of 128 bytes."""
    wrong = []
    for index, axis, shape in indices(ref):
        start = getattr(index, "start", index)
        step = math.prod(shape[axis + 1 :]) * jnp.dtype(ref.dtype).itemsize
        # A number that is known only on the device may be any.
        offset = step * start if isinstance(start, int) else step
        if offset % ALIGNMENT:
            wrong.append(f"{start} of axis {axis} of {shape} {ref.dtype}")
    return wrong


def too_wide(ref) -> list[str]:
    """What is larger than the array: Mosaic copies a row as it stands, over the next one."""
    return [
        f"{index.size} of axis {axis} of {shape}"
        for index, axis, shape in indices(ref)
        if getattr(index, "size", 1) > shape[axis]
    ]


@pytest.fixture
def copies(monkeypatch):
    """(from, to) of each copy that a kernel makes while it is traced."""
    pairs = []

    def watch(name):
        copy = getattr(plgpu, name)

        def watched(*refs, **options):
            pairs.append(refs[:2])
            return copy(*refs, **options)

        monkeypatch.setattr(plgpu, name, watched)

    watch("copy_smem_to_gmem")
    watch("copy_gmem_to_smem")
    monkeypatch.setattr(
        flash_decode, "merges_in_one", lambda *shapes: blocks_to_merge_in_one(*shapes) is not None
    )
    return pairs


def is_shared(ref) -> bool:
    return str(jax.typeof(ref.ref).memory_space) == "smem"


def trace(B, T, N, K, H, num_splits, out_dtype):
    """Traces a call that no other test makes: what was traced once is not traced again."""

    def call(q, k, v, lo, hi):
        return flash_decode.attend(
            q, k, v, lo, hi, scale=0.3, out_dtype=out_dtype, num_splits=num_splits
        )

    jax.jit(call).trace(*input_shapes(B, T, 392, N, K, H))


# B, (T, N, K) and num_splits: one launch, a plan in two and in one, given splits, a long prompt.
CALLS = [
    *((B, rows, None) for B in (1, 3) for rows in [(1, 4, 4), (1, 9, 3), (5, 14, 2), (17, 9, 3)]),
    *((60, (1, 9, 3), None), (3, (17, 9, 3), 2), (1, (200, 6, 2), None)),
]


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("H", flash_decode.HEAD_DIMS)
@pytest.mark.parametrize(("B", "rows", "num_splits"), CALLS, ids=str)
def test_copies_keep_their_places(copies, B, rows, num_splits, H, out_dtype):
    trace(B, *rows, H, num_splits, out_dtype)
    check(copies)


def check(copies):
    assert copies
    for source, target in copies:
        assert misplaced(source if is_shared(source) else target) == []
        if is_shared(source):
            assert too_wide(target) == []


@pytest.mark.parametrize("attends", [False, True], ids=["attended", "attends"])
@pytest.mark.parametrize("name", test_fused_attend.HEADS)
def test_copies_of_a_layer_keep_their_places(copies, monkeypatch, name, attends):
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: None)
    attended, x, weights = test_fused_layer.structs(name)
    if attends:
        attended = jax.eval_shape(lambda: test_fused_attend.attend_to(name, 0, 9))

    def call(attended, x, weights):
        slots = fused_layer.new_slots(attended, weights)
        return fused_layer.run(attended, x, weights, slots, 1, 3e-5)

    jax.jit(call).trace(attended, x, weights)
    check(copies)


def test_copies_out_of_place_are_noticed(copies):
    jax.clear_caches()  # another test makes this call
    trace(3, 17, 9, 3, 64, None, jnp.bfloat16)
    lse, target = next((x, y) for x, y in copies if is_shared(x) and x.ref.shape == (64,))
    assert misplaced(lse.ref.at[3:11]) == ["3 of axis 0 of (64,) float32"]
    width = target.ref.shape[-1]
    assert not too_wide(target.ref.at[..., pl.ds(jnp.int32(0), width)])
    assert too_wide(target.ref.at[..., pl.ds(jnp.int32(0), width + 8)])
