"""The kernel that only reads: interpreted on the CPU with race detection, lowered, run on a GPU.

conftest.py leaves this file out where jax has no interpreter for it (before 0.11.2).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_runs import lowered_for_cuda

from jaxdecode.pallas_kernels.read_kernel import read_sums
from jaxdecode.pallas_kernels.split_config import NUM_SMS
from jaxdecode.read_bandwidth import measure_read_ceiling


def column_sums(x, num_blocks):
    return np.asarray(read_sums(x, num_blocks=num_blocks), np.float64).sum(axis=(0, 1))


# Rounds of the ring: none, less than one, several; and blocks without a tile.
@pytest.mark.parametrize(("tiles", "num_blocks"), [(19, 2), (3, 1), (2, 3)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_every_element_is_read_once(interpreter, tiles, num_blocks, dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64 * tiles, 128)), dtype)
    expected = np.asarray(x, np.float64).sum(axis=0)
    np.testing.assert_allclose(column_sums(x, num_blocks), expected, atol=1e-4)


@pytest.mark.parametrize("num_blocks", [NUM_SMS, 2 * NUM_SMS])
def test_lowers_for_cuda(num_blocks):
    x = jax.ShapeDtypeStruct((15_990_784, 128), jnp.bfloat16)
    text = lowered_for_cuda(functools.partial(read_sums, num_blocks=num_blocks), x)
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("shape", [(64, 64), (65, 128), (64, 128, 1)], ids=str)
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"x must have shape \[rows, 128\].* found"):
        read_sums(jnp.zeros(shape, jnp.bfloat16))


@pytest.mark.gpu
def test_gpu_reads_every_element():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64 * 5000, 128)), jnp.bfloat16)
    expected = np.asarray(x, np.float64).sum(axis=0)
    for num_blocks in (NUM_SMS, 2 * NUM_SMS):
        np.testing.assert_allclose(column_sums(x, num_blocks), expected, atol=0.05)


@pytest.mark.gpu
@pytest.mark.alone
def test_gpu_ceiling_includes_the_kernel():
    ceiling = measure_read_ceiling()
    assert {"copy", "sum", "matvec", "tma", "tma2"} == ceiling.methods.keys()
    assert max(ceiling.methods["tma"], ceiling.methods["tma2"]) > 0.9 * ceiling.bytes_per_second
