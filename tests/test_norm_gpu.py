"""Residual and norm on a GPU: every width and number of rows against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from norm_runs import EPS, WIDTHS, check, inputs

from jaxdecode.pallas_kernels import norm

pytestmark = pytest.mark.gpu


def add_and_norm(*operands):
    return norm.add_and_norm(*operands, EPS)


@pytest.mark.parametrize("dtype", norm.DTYPES)
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize(("B", "T"), [(1, 1), (4, 3)])
def test_against_the_reference(B, T, D, dtype):
    operands = inputs(B, T, D, dtype)
    jitted = jax.jit(add_and_norm)
    assert "mosaic_gpu" in jitted.lower(*operands).as_text()
    check(jitted(*operands), *operands)


def test_as_many_rows_as_it_takes():
    operands = inputs(norm.MAX_ROWS, 1, 8192, jnp.bfloat16)
    check(jax.jit(add_and_norm)(*operands), *operands)
