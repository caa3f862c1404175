"""Few combinations that still hold every pair of values, where all combinations are too many."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Value = tuple[str, Any]  # a dimension's name and one of its values


def covering(dimensions: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Combinations, one value of each dimension, in which every two values of different dimensions
    meet. The same ones in every process; close to the fewest, not the fewest.

    Each starts with the first pair not met yet and takes, dimension by dimension, the value that
    meets most values for the first time.
    """
    left = dict.fromkeys(
        frozenset([(a, x), (b, y)])
        for a, b in itertools.combinations(dimensions, 2)
        for x in dimensions[a]
        for y in dimensions[b]
    )
    combinations = []
    while left:
        taken = dict(sorted(next(iter(left)), key=lambda pair: list(dimensions).index(pair[0])))
        for name, values in dimensions.items():
            if name not in taken:
                # Turned a step further each time, so that equal gains do not favour the first.
                turn = len(combinations) % len(values)
                taken[name] = max(
                    (*values[turn:], *values[:turn]),
                    key=lambda x: sum(frozenset([(name, x), met]) in left for met in taken.items()),
                )
        for pair in itertools.combinations(taken.items(), 2):
            left.pop(frozenset(pair), None)
        combinations.append({name: taken[name] for name in dimensions})
    return combinations
