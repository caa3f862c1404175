"""Products with weights: how a vector is multiplied on a GPU, and that it changes no result."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdecode.models import projection
from jaxdecode.models.projection import project


def operands(B, T, D, *columns, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 1 + len(columns))
    shapes = [(B, T, D), *[(D, *shape) for shape in columns]]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("form", ["_plainly", "_as_two_rows"])
@pytest.mark.parametrize("B", [1, 3])
def test_both_forms_are_the_products(form, B):
    x, q, kv = operands(B, 1, 16, (4, 8), (2, 2, 8))
    found = getattr(projection, form)(x, q, kv)
    expected = [np.einsum("btd,d...->bt...", *map(np.asarray, (x, w))) for w in (q, kv)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_results_have_the_dtype_of_the_operands():
    x, weight = operands(1, 1, 16, (8,), dtype=jnp.bfloat16)
    for form in (projection._plainly, projection._as_two_rows):
        (found,) = form(x, weight)
        assert found.dtype == jnp.bfloat16


def rows_multiplied(platform, B, T, *columns, D=64):
    """Rows of the left operands of the products, as lowered."""
    shapes = [(B, T, D), *[(D, *shape) for shape in columns]]
    structs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    lowered = jax.jit(project).trace(*structs).lower(lowering_platforms=(platform,))
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    return [int(line.split("(tensor<")[1].split("x")[1]) for line in products]


def test_a_vector_gets_company_on_a_gpu_where_the_weight_is_small(monkeypatch):
    monkeypatch.setattr(projection, "_MOST_SUMMED", 64 * 100)
    assert rows_multiplied("cuda", 1, 1, (100,)) == [2]
    assert rows_multiplied("cuda", 1, 1, (101,)) == [1]
    # A large weight goes with a small one: XLA makes one product of both.
    assert rows_multiplied("cuda", 1, 1, (200,), (2, 10)) == [2, 2]
    assert rows_multiplied("cuda", 1, 5, (100,)) == [5]
    assert rows_multiplied("cuda", 4, 1, (100,)) == [1]
    assert rows_multiplied("cpu", 1, 1, (100,)) == [1]


def test_gradients():
    x, weight = operands(1, 1, 16, (8,))

    def loss(form):
        return jax.grad(lambda x, w: jnp.sum(form(x, w)[0] ** 2), argnums=(0, 1))(x, weight)

    for ours, theirs in zip(loss(project), loss(projection._plainly), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
