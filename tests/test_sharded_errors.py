"""What sharded_decode_attention refuses, in which words, before anything is compiled."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from attention_runs import count_compiles
from jax.sharding import AxisType
from meshes import seq_mesh

from jaxdecode.pallas_kernels import sharded_decode_attention

S = 64
ERRORS = {
    "no such seq axis": (dict(seq_axis="s"), r"seq_axis='s': the mesh has no axis 's'; it has "
                         r"'data', 'tensor', 'seq'"),
    "no such batch axis": (dict(batch_axis="rows"), r"batch_axis='rows': the mesh has no axis"),
    "no such head axis": (dict(head_axis=("tensor", "x")), r"head_axis=.*no axis 'x'"),
    "capacity": (dict(S=63), r"seq_axis='seq' has 2 devices, which do not divide capacity=63"),
    "batch": (dict(B=3, batch_axis="data"), r"batch_axis='data' has 2 .* do not divide batch=3"),
    "heads": (dict(head_axis=("data", "tensor")), r"has 4 devices, .* divide num_kv_heads=2"),
    "an axis twice": (dict(batch_axis="seq"), r"a mesh axis cuts one dimension only; found "
                      r"batch_axis='seq', seq_axis='seq', head_axis=None"),
    "block zero": (dict(block=0), r"block must be an integer that divides 32, the slots of one "
                   r"device, or None; found 0"),
    "block negative": (dict(block=-8), r"block must be an integer .* found -8$"),
    "block too large": (dict(block=64), r"block must be an integer .* found 64$"),
    "block not a divisor": (dict(block=12), r"block must be an integer .* found 12$"),
    "block a float": (dict(block=8.0), r"block must be an integer .* found 8\.0$"),
    "block a truth": (dict(block=True), r"block must be an integer .* found True$"),
    "length past the end": (dict(kv_len=65), r"kv_len must lie in \[0, 64\]"),
    "window": (dict(window=0), r"window must be an integer >= 1"),
    "shapes": (dict(T=0), r"every dimension must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), ERRORS.values(), ids=ERRORS)
def test_what_does_not_fit_is_refused_before_anything_is_compiled(changes, message):
    sizes = {"B": 2, "T": 1, "S": S} | {k: v for k, v in changes.items() if k in "BTS"}
    options = {k: v for k, v in changes.items() if k not in "BTS"}
    q = np.ones((sizes["B"], sizes["T"], 4, 8), np.float32)
    k = np.ones((sizes["B"], sizes["S"], 2, 8), np.float32)
    call = functools.partial(
        sharded_decode_attention, q, k, k, **({"kv_len": 5} | options),
        mesh=seq_mesh(2, data=2, tensor=2),
    )  # fmt: skip

    def attempt():
        with pytest.raises(ValueError, match=message):
            call()

    assert count_compiles(attempt) == 0


def test_an_implementation_that_cannot_serve_is_refused():
    q, k = np.ones((2, 1, 4, 8), np.float32), np.ones((2, S, 2, 8), np.float32)
    call = functools.partial(sharded_decode_attention, q, k, k, 5, mesh=seq_mesh(2))
    with pytest.raises(NotImplementedError, match="flash_decode cannot serve this call"):
        call(implementation="flash_decode")
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        call(implementation="fast")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_keys_on_other_devices_are_an_error(kind):
    q, k = np.ones((2, 1, 4, 8), np.float32), np.ones((2, S, 2, 8), np.float32)
    k = jax.device_put(k, jax.devices()[7])
    with pytest.raises(ValueError, match=r"incompatible devices.*device ids \[7\]"):
        sharded_decode_attention(q, k, k, 5, mesh=seq_mesh(4, kind))
