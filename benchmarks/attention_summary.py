"""What the results of the attention benchmark say: the goals, who is faster, and a table.

    python benchmarks/attention_summary.py [RESULTS_FILE]

All times are `kernel_us` unless `us` is said. A peer counts where it has a row.
"""

from __future__ import annotations

import json
import math
import pathlib
import sys
from collections.abc import Iterable

from attention_cases import (
    BATCH_CASES,
    CAPACITY_CASES,
    JAX_PEERS,
    MODEL_CASES,
    PEERS,
    Case,
    full,
)
from source_hash import ROOT

RESULTS = ROOT / "benchmarks/results/h200/attention.json"
# Within this much two times count as equal.
EQUAL = 0.01
GOALS_US = {
    full(1, 512): 4.0,
    full(1, 2048): 4.6,
    full(1, 8192): 6.5,
    full(1, 32768): 12.0,
    full(1, 65536): 19.0,
    full(1, 131072): 34.0,
    full(1, 524288): 122.0,
    BATCH_CASES[0]: 140.0,
}
GEOMETRIC_MEAN_GOAL = 1.3
UNSPLIT_GOALS = {full(1, 65536): 38, full(1, 524288): 45}  # times faster than FlashAttention-3
FRACTION_GOALS = ((2e9, 0.97), (5e8, 0.95))  # from so many bytes on
CAPACITY_GOAL = 1.05
TABLE_CASES = (*MODEL_CASES, full(64, 1024), *BATCH_CASES[:1], *CAPACITY_CASES[:1])
TABLE_COLUMNS = {
    "flash_decode": "jaxdecode",
    "xla": "jax.nn xla",
    "cudnn": "jax.nn cudnn",
    "sdpa_flash": "SDPA flash",
    "sdpa_cudnn": "SDPA cudnn",
    "fa3": "FA3",
    "fa3_nosplit": "FA3, 1 split",
    "flashinfer": "FlashInfer",
}

Times = dict[Case, dict[str, float]]


def times(results: dict, key: str = "kernel_us") -> Times:
    """A field of the rows, by case and implementation."""
    found: Times = {}
    for row in results["rows"]:
        kv_len = row["kv_len"]
        lengths = tuple(kv_len) if isinstance(kv_len, list) else (kv_len,) * row["B"]
        case = Case(row["B"], row["S"], row["N"], row["K"], lengths)
        found.setdefault(case, {})[row["implementation"]] = row[key]
    return found


def ours(by_name: dict[str, float]) -> float | None:
    """Of what decode_attention chooses; None where that was not measured."""
    return by_name.get("jaxdecode", by_name.get("flash_decode"))


def best_peer(by_name: dict[str, float], peers: Iterable[str] = PEERS) -> tuple[float, str] | None:
    """The least time of the peers and its name; None without peers."""
    return min(((by_name[name], name) for name in peers if name in by_name), default=None)


def speedups(
    found: Times, cases: Iterable[Case], peers: Iterable[str] = PEERS
) -> dict[Case, float]:
    """How many times faster than the best peer ours is, where both were measured."""
    pairs = {case: best_peer(found.get(case, {}), peers) for case in cases}
    return {
        case: best[0] / time
        for case, best in pairs.items()
        if best is not None and (time := ours(found[case])) is not None
    }


def geometric_mean(values: Iterable[float]) -> float:
    """NaN of no values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def summary(results: dict) -> str:
    """The goals against what was measured, and what went wrong, as lines of text."""
    lines = [
        f"{results['device']}, jax {results['jax']}, read ceiling {results['read_peak_tb_s']} TB/s",
        *goal_lines(times(results)),
        *peer_lines(results),
        *unsplit_lines(times(results)),
        *capacity_lines(times(results)),
        *ceiling_lines(results),
    ]
    for name, reason in results["missing"].items():
        lines.append(f"missing: {name}: {reason.splitlines()[0]}")
    for failure in results["failures"]:
        shape = f"{failure['B']}x{failure['S']} {failure['N']}/{failure['K']}"
        lines.append(f"failed: {shape} {failure['implementation']}: {failure['reason']}")
    lines += [f"not measured: {name}" for name in results["not_measured"]]
    return "\n".join(lines)


def goal_lines(found: Times) -> list[str]:
    """One line for each case with a goal."""
    lines = [f"{'case':22} {'ours':>9} {'goal':>7}      {'best peer':>9}"]
    for case, goal in GOALS_US.items():
        time = ours(found.get(case, {}))
        if time is None:
            lines.append(f"{case.name:22} {'-':>9} {goal:7.1f} not measured")
            continue
        peer = best_peer(found[case])
        shown = (
            "-" if peer is None else f"{peer[0]:9.2f} {peer[1]} ({peer[0] / time:.2f} times ours)"
        )
        lines.append(f"{case.name:22} {time:9.2f} {goal:7.1f} {verdict(time <= goal)} {shown}")
    return lines


def peer_lines(results: dict) -> list[str]:
    """The geometric mean, and every case where somebody is faster."""
    found, back_to_back = times(results), times(results, "us")
    mean = geometric_mean(speedups(found, MODEL_CASES).values())
    lines = [
        f"{verdict(mean >= GEOMETRIC_MEAN_GOAL)} best peer / ours over the model shapes, geometric "
        f"mean: {mean:.3f} (goal {GEOMETRIC_MEAN_GOAL})"
    ]
    for case, ratio in speedups(found, found).items():
        if ratio < 1 - EQUAL:
            lines.append(f"MISS {case.name}: the best peer takes {ratio:.3f} of our time")
    for case, ratio in speedups(back_to_back, back_to_back, JAX_PEERS).items():
        if ratio <= 1:
            lines.append(f"MISS {case.name}: in us, jax.nn's best takes {ratio:.3f} of our time")
    return lines


def unsplit_lines(found: Times) -> list[str]:
    """How many times faster than attention that leaves the keys in one piece."""
    lines = []
    for case, goal in UNSPLIT_GOALS.items():
        by_name = found.get(case, {})
        for name in ("fa3_nosplit", "flash_decode_nosplit"):
            if {name, "flash_decode"} <= by_name.keys():
                ratio = by_name[name] / by_name["flash_decode"]
                reached = verdict(ratio >= goal)
                lines.append(f"{reached} {case.name}: {ratio:.1f} times {name} (goal {goal})")
    return lines


def capacity_lines(found: Times) -> list[str]:
    """What a nearly empty cache takes, beside a full one of as many tokens."""
    lines = []
    for large, small in zip(CAPACITY_CASES[::2], CAPACITY_CASES[1::2], strict=True):
        if all("flash_decode" in found.get(case, {}) for case in (large, small)):
            ratio = found[large]["flash_decode"] / found[small]["flash_decode"]
            reached = verdict(ratio <= CAPACITY_GOAL)
            lines.append(
                f"{reached} {large.name}: {ratio:.3f} of {small.name} (goal {CAPACITY_GOAL})"
            )
    return lines


def ceiling_lines(results: dict) -> list[str]:
    """How near the read ceiling the large cases come."""
    lines = []
    for case, by_name in times(results, "fraction_of_peak").items():
        goal = next((goal for least, goal in FRACTION_GOALS if case.bytes >= least), None)
        fraction = ours(by_name)
        if goal is not None and not case.is_ragged and fraction is not None:
            reached = verdict(fraction >= goal)
            lines.append(f"{reached} {case.name}: {fraction:.3f} of the ceiling (goal {goal})")
    return lines


def verdict(reached: bool) -> str:
    """Four letters."""
    return "ok  " if reached else "MISS"


def table(results: dict) -> str:
    """The model shapes, short and ragged batches, and a nearly empty cache, as Markdown."""
    found, fractions = times(results), times(results, "fraction_of_peak")
    names = [name for name in TABLE_COLUMNS if any(name in found.get(c, {}) for c in TABLE_CASES)]
    heads = [
        "batch x capacity, heads",
        "KV MB",
        *(TABLE_COLUMNS[name] for name in names),
        "of the ceiling",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for case in TABLE_CASES:
        by_name = found.get(case)
        if by_name is None:
            continue
        by_name = {**by_name, "flash_decode": ours(by_name)}
        fastest = min(by_name[name] for name in names if by_name.get(name) is not None)
        cells = [cell(by_name.get(name), fastest) for name in names]
        fraction = ours(fractions[case])
        ceiling = "-" if fraction is None else f"{fraction:.0%}"
        lines.append(
            "| " + " | ".join([case.name, f"{case.bytes / 1e6:.1f}", *cells, ceiling]) + " |"
        )
    return "\n".join(lines)


def cell(time: float | None, fastest: float) -> str:
    """A time, in bold when it counts as equal to the fastest."""
    if time is None:
        return "-"
    return f"**{time:.1f}**" if time <= fastest * (1 + EQUAL) else f"{time:.1f}"


if __name__ == "__main__":
    path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    content = json.loads(path.read_text())
    print(summary(content), table(content), sep="\n\n")
