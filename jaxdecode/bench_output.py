"""What becomes of measurements: a results file, a Markdown table, CSV, and the chart.

Rows are mappings with the keys of `jaxdecode.bench.Row`, as they come from it or from a file. An
implementation that ends in "_model" is computed, not measured, and drawn dotted.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxdecode.bench import Row
from jaxdecode.errors import RequestError
from jaxdecode.read_bandwidth import ReadCeiling

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]

CHART_SUFFIXES = (".png", ".svg", ".pdf")
NOT_MEASURED = "n/a"
_COLORS = {
    "flash_decode": "#1f6fb4",
    "xla": "#d9762b",
    "cudnn": "#4a9a50",
    "flash_decode_nosplit": "#a63d57",
}
_MODEL_COLOR = "#777777"
# A standard deviation of more than this share of the mean says that something else was going on.
_STEADY = 0.02


def results(ceiling: ReadCeiling, rows: Rows) -> dict[str, Any]:
    """The content of a results file; a benchmark of the repository adds the hash of its source."""
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "read_peak_tb_s": ceiling.bytes_per_second / 1e12,
        "read_methods_tb_s": {name: rate / 1e12 for name, rate in ceiling.methods.items()},
        "rows": [dict(row) for row in rows],
    }


def markdown(rows: Rows) -> str:
    """A table with a line per row, in the terms of llama-bench."""
    header = ["model", "attention", "test", "batch", "tok/s", "GB/s", "of the bound"]
    prompts = any(row["bytes_per_step"] is None for row in rows)
    lines = [header, *map(_cells, rows)]
    if prompts:
        header.append("first token, s")
        for line, row in zip(lines[1:], rows, strict=True):
            line.append(_shown(row["seconds"], ".3f") if row["bytes_per_step"] is None else "")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    # Words to the left, numbers to the right.
    aligned = [
        [
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    rule = ["-" * width if i < 3 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (aligned[0], rule, *aligned[1:]))


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        " ".join(filter(None, (row["model"], row["dtype"], row["mesh"]))),
        row["implementation"],
        row["test"],
        str(row["batch"]),
        speed(row),
        _shown(row["gb_s"], ".0f"),
        _shown(row["fraction_of_bound"], ".1%"),
    ]


def speed(row: Mapping[str, Any]) -> str:
    """'30.1 ± 0.2': tokens per second, mean and standard deviation."""
    return f"{_shown(row['tok_s'], '.1f')} ± {_shown(row['tok_s_std'], '.1f')}"


def _shown(value: float | None, form: str) -> str:
    return NOT_MEASURED if value is None else format(value, form)


def csv_text(rows: Rows) -> str:
    """A header and a line per row; lists are joined by +, what was not measured is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in dataclasses.fields(Row)]
    writer.writerow(names)
    for row in rows:
        values = [row[name] for name in names]
        writer.writerow("+".join(map(str, x)) if isinstance(x, list) else x for x in values)
    return text.getvalue()


def check_chart(path: Path) -> None:
    """Raises RequestError if no chart can be drawn into this file; call it before measuring."""
    if path.suffix.lower() not in CHART_SUFFIXES:
        raise RequestError(
            f"a chart must be a file ending in {', '.join(CHART_SUFFIXES)}, found {path}"
        )
    _figure_class()


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RequestError(
            "charts need matplotlib; install it with pip install 'jaxdecode[plot]'"
        ) from None
    return Figure


def draw_chart(rows: Rows, path: Path, *, x: str = "depth", title: str = "") -> None:
    """Draws tokens per second against `x`, a line per implementation, and the bound dashed.

    The chart of the Flash-Decoding article, https://pytorch.org/blog/flash-decoding/. Prompts,
    ragged batches and depth 0 have no place in it. Where repetitions differ by more than 2 % the
    point is hollow, with its standard deviation, and no line goes through it.

    Args:
      path: a .png, .svg or .pdf file.
      x: "depth" or "batch".
      title: above the chart; the model's name if empty.

    Raises:
      RequestError: matplotlib is missing, or there is nothing to draw.
    """
    check_chart(path)
    rows = [row for row in rows if row["bytes_per_step"] and _has_place(row[x])]
    if not rows:
        raise RequestError(f"{path}: nothing to draw, no row is of decoding at one depth above 0")
    figure = _figure_class()(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    _draw_lines(axes, rows, x)
    points = sorted({row[x] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(points, [readable_count(point) for point in points])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in the cache" if x == "depth" else "batch size")
    axes.set_ylabel("tokens per second")
    axes.set_title(title or ", ".join(dict.fromkeys(row["model"] for row in rows)))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _has_place(value: Any) -> bool:
    """Whether it can stand on a logarithmic axis."""
    return isinstance(value, int) and value > 0


def _draw_lines(axes: Axes, rows: Rows, x: str) -> None:
    """A line per implementation of each model and batch size (or depth), and their bounds."""
    other = "batch" if x == "depth" else "depth"
    varying = [name for name in ("model", other) if len({row[name] for row in rows}) > 1]

    def line(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(f"{name} {row[name]}" for name in varying)

    for group in dict.fromkeys(map(line, rows)):
        members = [row for row in rows if line(row) == group]
        suffix = "".join(f", {part}" for part in group)
        bound = sorted({row[x]: row["bound_tok_s"] for row in members}.items())
        axes.plot(*zip(*bound, strict=True), "k--", label=f"upper bound{suffix}")
        for name in dict.fromkeys(row["implementation"] for row in members):
            measured = [
                row
                for row in sorted(members, key=lambda row: row[x])
                if row["implementation"] == name and row["tok_s"] is not None
            ]
            if measured:
                color = _COLORS.get(name, _MODEL_COLOR if name.endswith("_model") else None)
                _draw_line(axes, measured, x, None if group else color, f"{name}{suffix}")


def _draw_line(axes: Axes, rows: Rows, x: str, color: str | None, label: str) -> None:
    """A line through the steady points; those that varied stand beside it, hollow, with how much
    they did."""
    style = "o:" if rows[0]["implementation"].endswith("_model") else "o-"
    steady = [(row[x], row["tok_s"]) for row in rows if not _varied(row)]
    points = zip(*steady, strict=True) if steady else ([], [])
    (line,) = axes.plot(*points, style, label=label, color=color)
    varied = [(row[x], row["tok_s"], row["tok_s_std"]) for row in rows if _varied(row)]
    if varied:
        depths, speeds, deviations = zip(*varied, strict=True)
        axes.errorbar(depths, speeds, deviations, fmt="o", color=line.get_color(), mfc="white")


def _varied(row: Mapping[str, Any]) -> bool:
    """Whether the repetitions tell little of the speed."""
    return (row["tok_s_std"] or 0.0) > _STEADY * row["tok_s"]


def readable_count(count: int) -> str:
    """65536 -> '64k'; in powers of 1024."""
    return f"{count // 1024}k" if count and count % 1024 == 0 else str(count)
