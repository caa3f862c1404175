"""The charts and tables of results files that benchmarks/decode.py wrote.

    python benchmarks/charts.py benchmarks/results/h200/decode_*.json

Draws each file's chart as a .png beside it, and prints its table, which is the README's.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from decode_cases import CHARTS

from jaxdecode import bench_output


def main(arguments: Sequence[str]) -> int:
    """Draws and prints; returns the exit status."""
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    for path in map(pathlib.Path, arguments):
        results = json.loads(path.read_bytes())
        drawn = draw(results, path.with_suffix(".png"))
        print(
            f"{CHARTS[results['chart']].title}{f': {drawn}' if drawn else ''}\n\n{table(results)}"
        )
    return 0


def draw(results: dict[str, Any], path: pathlib.Path) -> pathlib.Path | None:
    """Draws the chart, if the results have one, of the batch size or depth that most rows have."""
    chart = CHARTS[results["chart"]]
    if chart.x is None:
        return None
    other = "batch" if chart.x == "depth" else "depth"
    usual = statistics.mode(row[other] for row in results["rows"])
    rows = [row for row in results["rows"] if row[other] == usual]
    title = f"{chart.title}, on {results['device']}"
    bench_output.draw_chart(rows, path, x=chart.x, title=title)
    return path


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, ordered by size."""

    def size(row: dict[str, Any]) -> tuple[float, int]:
        depth = row["depth"]
        return statistics.fmean(depth) if isinstance(depth, list) else depth, row["batch"]

    return bench_output.markdown(sorted(results["rows"], key=size))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
