"""The sample of combinations that the GPU tests run."""

from __future__ import annotations

import itertools

from covering import covering
from test_flash_decode_gpu import DIMENSIONS, GRID


def pairs(combinations):
    return {pair for c in combinations for pair in itertools.combinations(c.items(), 2)}


def test_every_pair_of_values_meets():
    dimensions = {"a": (1, 2, 3), "b": ("x", "y"), "c": (None, 1), "d": (True, False)}
    found = covering(dimensions)
    assert pairs(found) == pairs(
        dict(zip(dimensions, values, strict=True))
        for values in itertools.product(*dimensions.values())
    )
    assert len(found) < 9  # of 24; six are needed for a and b alone
    assert covering(dimensions) == found


def test_one_dimension_and_one_value():
    assert covering({"a": (1, 2), "b": (3,)}) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]


def test_the_gpu_grid_holds_every_pair_and_is_small():
    everything = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(DIMENSIONS, 2)
        for x in DIMENSIONS[a]
        for y in DIMENSIONS[b]
    }
    assert pairs(GRID) == everything
    assert 100 <= len(GRID) <= 200
