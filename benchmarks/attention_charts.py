"""Draws the attention benchmark's two charts: time against length, and fraction of the ceiling.

    python benchmarks/attention_charts.py [RESULTS_FILE]

Writes attention_time.png and attention_fraction.png beside the results file. Needs matplotlib.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

from attention_cases import LENGTH_CASES
from attention_summary import RESULTS, times
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by people of any colour vision, and a marker each. A dashed
# line is the same implementation without splitting.
STYLES: dict[str, dict[str, Any]] = {
    "flash_decode": {"label": "jaxdecode", "color": "#D55E00", "marker": "o", "linewidth": 2.5},
    "flash_decode_nosplit": {
        "label": "jaxdecode, no splitting", "color": "#D55E00", "marker": "o", "linestyle": "--",
    },
    "xla": {"label": "jax.nn xla", "color": "#0072B2", "marker": "s"},
    "cudnn": {"label": "jax.nn cudnn", "color": "#56B4E9", "marker": "D"},
    "sdpa_flash": {"label": "SDPA flash", "color": "#F0E442", "marker": "v"},
    "sdpa_cudnn": {"label": "SDPA cudnn", "color": "#CC79A7", "marker": "^"},
    "fa3": {"label": "FlashAttention-3", "color": "#009E73", "marker": "P"},
    "fa3_nosplit": {
        "label": "FlashAttention-3, no splitting", "color": "#009E73", "marker": "P",
        "linestyle": "--",
    },
    "flashinfer": {"label": "FlashInfer", "color": "#000000", "marker": "X"},
}  # fmt: skip


def lines(results: dict, key: str) -> dict[str, tuple[list[int], list[float]]]:
    """Lengths and values of a field at batch 1, by implementation, those that have any."""
    found = times(results, key)
    points = {
        name: [(case.S, found[case][name]) for case in LENGTH_CASES if name in found.get(case, {})]
        for name in STYLES
    }
    return {name: tuple(map(list, zip(*xy, strict=True))) for name, xy in points.items() if xy}


def draw_time(results: dict, path: pathlib.Path) -> None:
    """Kernel time against length, both axes to base 2, over the time to read the cache once."""
    figure, axes = new_chart(results, "Time of one call (us)")
    for name, (lengths, microseconds) in lines(results, "kernel_us").items():
        axes.plot(lengths, microseconds, **STYLES[name])
    lengths = [case.S for case in LENGTH_CASES]
    floor = [case.bytes / results["read_peak_tb_s"] / 1e6 for case in LENGTH_CASES]
    axes.plot(lengths, floor, color="grey", linestyle=":", label="reading keys and values once")
    axes.set_yscale("log", base=2)
    axes.set_ylim(bottom=2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    finish(figure, axes, path)


def draw_fraction(results: dict, path: pathlib.Path) -> None:
    """Fraction of the read ceiling against length, the length to base 2."""
    label = f"Fraction of the read ceiling ({results['read_peak_tb_s']:.2f} TB/s)"
    figure, axes = new_chart(results, label)
    for name, (lengths, fractions) in lines(results, "fraction_of_peak").items():
        axes.plot(lengths, fractions, **STYLES[name])
    axes.axhline(1, color="grey", linestyle=":")
    axes.set_ylim(0, 1.05)
    finish(figure, axes, path)


def new_chart(results: dict, ylabel: str) -> tuple[Figure, Axes]:
    """A figure whose horizontal axis is the length of the cache."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    lengths = [case.S for case in LENGTH_CASES]
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [short(S) for S in lengths])
    axes.set_xlabel("Length of the KV cache (tokens)")
    axes.set_ylabel(ylabel)
    axes.set_title(f"Decode attention, batch 1, 16/2 heads of 128, bfloat16, {results['device']}")
    axes.grid(alpha=0.3)
    return figure, axes


def short(length: int) -> str:
    """512, 64k, 1M."""
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if length >= size:
            return f"{length // size}{unit}"
    return str(length)


def finish(figure: Figure, axes: Axes, path: pathlib.Path) -> None:
    """Adds the legend and writes the file."""
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(path, dpi=150)


def main(path: pathlib.Path) -> None:
    """Draws both charts of a results file."""
    results = json.loads(path.read_text())
    draw_time(results, path.with_name("attention_time.png"))
    draw_fraction(results, path.with_name("attention_fraction.png"))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
