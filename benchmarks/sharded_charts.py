"""The charts and tables of results files that benchmarks/sharded.py wrote.

    python benchmarks/sharded_charts.py benchmarks/results/h200/sharded_*.json

Draws speed against context, speed against devices and latency against size, as a .png beside each
file, and prints every file's table, which is the README's. Charts need matplotlib.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from kernel_items import ITEMS
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxdecode import bench_output
from jaxdecode.bench import NO_SPLIT

Results = dict[str, Any]
Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]


def main(arguments: Sequence[str]) -> int:
    """Draws and prints; returns the exit status."""
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    for path in map(pathlib.Path, arguments):
        results = json.loads(path.read_bytes())
        part = results["part"]
        if part in CHARTS and results["rows"]:
            CHARTS[part](results, path.with_suffix(".png"))
        header, lines = TABLES[part](results["rows"])
        print(f"{part}, {results['device']}\n\n{markdown(header, lines)}")
    return 0


def draw_depth(results: Results, path: pathlib.Path) -> None:
    """Tokens per second against the context, the planner's prediction dotted."""
    rows = [row | {"implementation": _how(row, results["rows"])} for row in results["rows"]]
    predicted = [
        row
        | {
            "implementation": "planner_model",
            "tok_s": row["predicted_tok_s"],
            "tok_s_std": None,
        }
        for row in rows
    ]
    title = f"{_what(rows)}, on {results['device']}"
    bench_output.draw_chart([*rows, *predicted], path, x="depth", title=title)


def draw_scaling(results: Results, path: pathlib.Path) -> None:
    """Tokens per second against devices, and what as many times one device's speed would be."""
    rows = results["rows"]
    figure, axes = _chart("GPUs", "tokens per second")
    axes.set_title(f"{rows[0]['model']}, batch 1, on {results['device']}")
    for depth, points in _lines(rows, "depth", "devices", "tok_s").items():
        (line,) = axes.plot(*points, "o-", label=f"{bench_output.readable_count(depth)} tokens")
        counts, speeds = points
        ideal = [speeds[0] * count / counts[0] for count in counts]
        axes.plot(counts, ideal, ":", color=line.get_color())
    axes.plot([], [], "k:", label="in proportion")
    counts = sorted({row["devices"] for row in rows})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_ylim(bottom=0)
    _save(figure, axes, path)


def draw_collectives(results: Results, path: pathlib.Path) -> None:
    """Microseconds against bytes, on the most devices, a line per collective and implementation."""
    rows = _on_most_devices(results["rows"])
    named = [row | {"line": f"{row['collective']}, {row['implementation']}"} for row in rows]
    figure, axes = _chart("bytes on each GPU", "microseconds")
    axes.set_title(f"{rows[0]['devices']} GPUs, {results['device']}")
    for name, points in _lines(named, "line", "bytes", "us").items():
        axes.plot(*points, "o-", label=name)
    predicted = _lines(named, "collective", "bytes", "predicted_us")
    if "all_reduce" in predicted:
        axes.plot(*predicted["all_reduce"], "k:", label="all_reduce, the planner's model")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    sizes = sorted({row["bytes"] for row in rows if row["collective"] == "all_reduce"})
    axes.set_xticks(sizes, [readable_size(size) for size in sizes])
    axes.minorticks_off()
    _save(figure, axes, path)


CHARTS: dict[str, Callable[[Results, pathlib.Path], None]] = {
    "depth": draw_depth,
    "scaling": draw_scaling,
    "collectives": draw_collectives,
}


def table_of_speeds(rows: list[Row]) -> Table:
    """A line per depth: each implementation's tokens per second, and the bound."""
    names = list(dict.fromkeys(_how(row, rows) for row in rows))
    ours = names[0] if names else ""
    header = ["tokens", *names, "bound", "of the bound", "times unsplit", "predicted"]
    lines = []
    for depth in sorted({row["depth"] for row in rows}):
        here = {_how(row, rows): row for row in rows if row["depth"] == depth}
        best = here.get(ours) or next(iter(here.values()))
        speeds = [here[name]["tok_s"] if name in here else None for name in names]
        unsplit = here[NO_SPLIT]["tok_s"] if NO_SPLIT in here else None
        lines.append(
            [
                bench_output.readable_count(depth),
                *(_shown(speed, ".1f") for speed in speeds),
                _shown(best["bound_tok_s"], ".1f"),
                _shown(best["fraction_of_bound"], ".1%"),
                _shown(_ratio(best["tok_s"], unsplit), ".1f"),
                _shown(best["predicted_tok_s"], ".1f"),
            ]
        )
    return header, lines


def table_of_meshes(rows: list[Row]) -> Table:
    """A line per model, mesh and depth."""
    header = [
        "model", "mesh", "collectives by", "tokens", "tok/s", "bound", "of the bound", "predicted",
    ]  # fmt: skip
    lines = [
        [
            row["model"], row["mesh"] or "one GPU", row["collectives"] if row["mesh"] else "",
            bench_output.readable_count(row["depth"]), bench_output.speed(row),
            _shown(row["bound_tok_s"], ".1f"), _shown(row["fraction_of_bound"], ".1%"),
            _shown(row["predicted_tok_s"], ".1f"),
        ]
        for row in sorted(rows, key=lambda row: (row["model"], row["depth"], row["devices"]))
    ]  # fmt: skip
    return header, lines


def table_of_layers(rows: list[Row]) -> Table:
    """A line per step: microseconds of a layer, itemised."""
    header = ["mesh", "attention by", "collectives by", "tokens", "us a layer", *ITEMS, "idle"]
    lines = [
        [
            row["mesh"] or "one GPU", row["implementation"],
            row["collectives"] if row["mesh"] else "",
            bench_output.readable_count(row["depth"]), _shown(row["us"], ".1f"),
            *(_shown(row["items_us"][item], ".1f") for item in ITEMS),
            _shown(row["idle_us"], ".1f"),
        ]
        for row in rows
    ]  # fmt: skip
    return header, lines


def table_of_attention(rows: list[Row]) -> Table:
    """A line per batch and number of devices, with the speed against one device."""
    header = ["batch", "GPUs", "MB read by each", "us", "times one GPU", "predicted us"]
    alone = {row["B"]: row["us"] for row in rows if row["devices"] == 1}
    lines = [
        [
            str(row["B"]), str(row["devices"]), _shown(row["bytes"] / 1e6, ".0f"),
            _shown(row["us"], ".1f"), _shown(_ratio(alone.get(row["B"]), row["us"]), ".2f"),
            _shown(row["predicted_us"], ".1f"),
        ]
        for row in sorted(rows, key=lambda row: (row["B"], row["devices"]))
    ]  # fmt: skip
    return header, lines


def table_of_collectives(rows: list[Row]) -> Table:
    """A line per collective, number of devices and size."""
    header = ["collective", "by", "GPUs", "size", "us", "predicted us"]
    order = sorted(rows, key=lambda row: (row["collective"], row["devices"], row["bytes"]))
    lines = [
        [
            row["collective"], row["implementation"], str(row["devices"]),
            readable_size(row["bytes"]), _shown(row["us"], ".1f"),
            _shown(row["predicted_us"], ".1f"),
        ]
        for row in order
    ]  # fmt: skip
    return header, lines


TABLES: dict[str, Callable[[list[Row]], Table]] = {
    "depth": table_of_speeds,
    "layers": table_of_layers,
    "collectives": table_of_collectives,
    "attention": table_of_attention,
    "million": table_of_meshes,
    "scaling": table_of_meshes,
}


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rule = ["---"] * len(header)
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *lines))


def readable_size(num_bytes: int) -> str:
    """16384 -> '16 KB', in powers of 1024."""
    for size, unit in ((2**20, "MB"), (2**10, "KB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} B"


def _lines(rows: list[Row], name: str, x: str, y: str) -> dict[Any, tuple[list, list]]:
    """The xs and ys of the rows that have both, by `name`, in order of x."""
    points: dict[Any, list[tuple]] = {}
    for row in sorted(rows, key=lambda row: row[x]):
        if row[y] is not None:
            points.setdefault(row[name], []).append((row[x], row[y]))
    return {key: tuple(map(list, zip(*xy, strict=True))) for key, xy in points.items()}


def _how(row: Row, rows: list[Row]) -> str:
    """The implementation, and its collectives where it comes with others first."""
    name = row["implementation"]
    first = next(each["collectives"] for each in rows if each["implementation"] == name)
    return name if row["collectives"] == first else f"{name}, collectives by {row['collectives']}"


def _on_most_devices(rows: list[Row]) -> list[Row]:
    most = max(row["devices"] for row in rows)
    return [row for row in rows if row["devices"] == most]


def _what(rows: list[Row]) -> str:
    row = rows[0]
    return ", ".join(filter(None, (row["model"], row["mesh"], row["dtype"], "batch 1")))


def _chart(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, axes: Axes, path: pathlib.Path) -> None:
    axes.legend()
    figure.savefig(path, dpi=150)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
