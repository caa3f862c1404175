"""What the tests of residual and norm share: rows, and what must come of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from reference import OUT_CAPS

EPS = 1e-5
# Tails, several parts, pieces of odd width.
WIDTHS = [128, 136, 256, 576, 1024, 2048, 4096, 5120, 6656, 8192]


def inputs(B: int, T: int, D: int, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, delta, scale. Rows differ by their size, and some places by theirs, so that no part of a
    row can be left out or counted twice unseen."""
    rng = np.random.default_rng(0)
    x, delta = rng.standard_normal((2, B, T, D))
    x *= 4.0 ** (np.arange(B * T) % 5).reshape(B, T, 1)
    x[..., [0, D // 3, -127, -1]] *= 20
    return *(jnp.asarray(each, dtype) for each in (x, delta)), jnp.asarray(rng.random(D), dtype)


def low_precision(total: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The norm of rows in NumPy: each step rounded to their dtype but for the mean square."""
    x = total.astype(np.float32)
    normal = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(EPS))
    scaled = normal.astype(total.dtype).astype(np.float32) * scale.astype(np.float32)
    return scaled.astype(total.dtype)


def check(found, x, delta, scale) -> None:
    """The sum to the bit, and the norm within the tolerance of the project."""
    total, normed = map(np.asarray, found)
    x, delta, scale = map(np.asarray, (x, delta, scale))
    assert total.dtype == normed.dtype == x.dtype
    np.testing.assert_array_equal(total, x + delta)
    exact = total.astype(np.float64)
    exact /= np.sqrt(np.mean(exact**2, axis=-1, keepdims=True) + EPS)
    exact *= scale.astype(np.float64)
    error, allowed = (
        abs(each.astype(np.float64) - exact) for each in (normed, low_precision(total, scale))
    )
    limit = min(2 * allowed.max() + 1e-5, OUT_CAPS[x.dtype.name] * max(1, abs(exact).max()))
    assert error.max() <= limit
    assert error.mean() <= 1.5 * allowed.mean() + 1e-6
