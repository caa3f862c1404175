"""The charts and tables of benchmarks/sharded.py, from results made by hand."""

from __future__ import annotations

import importlib
import json

import pytest
from bench_rows import row


@pytest.fixture
def charts(script):
    return script("sharded_charts")


def decoded(**changes) -> dict:
    made = {"mesh": "tensor=4", "devices": 4, "num_layers": 48, "predicted_tok_s": 28.0}
    made["collectives"] = "peer"
    return row(**(made | changes))


DEPTH = [
    decoded(depth=512, implementation="flash_decode", tok_s=36.0, fraction_of_bound=0.9),
    decoded(depth=512, implementation="flash_decode_nosplit", tok_s=6.0),
    decoded(depth=512, implementation="flash_decode", collectives="xla", tok_s=31.0),
    decoded(depth=65536, implementation="xla", collectives="xla", predicted_tok_s=None),
    decoded(depth=65536, implementation="flash_decode", tok_s=24.0, predicted_tok_s=None),
]
SCALING = [
    decoded(depth=depth, mesh=mesh, devices=n, tok_s=20.0 * n)
    for n, mesh in ((4, "tensor=4"), (1, ""))
    for depth in (512, 8192)
]
LAYERS = [
    {
        "mesh": "tensor=4", "implementation": "xla", "collectives": "peer", "depth": 512,
        "us": 143.04, "idle_us": 3.0,
        "items_us": {"matvecs": 88.0, "attention": 8.0, "collectives": 32.0, "rest": 12.0},
    }
]  # fmt: skip
ATTENTION = [
    {"B": 4, "devices": n, "bytes": 2_048_000_000 // n, "us": us, "predicted_us": None}
    for n, us in ((2, 250.0), (1, 475.0))
]
COLLECTIVES = [
    {
        "collective": name, "implementation": by, "devices": n, "bytes": size, "us": us,
        "predicted_us": 16.0,
    }
    for name, by, n, size, us in (
        ("all_reduce", "psum", 4, 16384, 15.96),
        ("all_reduce", "psum", 4, 2048, 15.0),
        ("all_reduce", "psum", 2, 16384, 14.0),
        ("all_gather", "all_gather", 4, 4224, 16.5),
    )
]  # fmt: skip
LINES = {
    "depth": (DEPTH, "| 512 | 36.0 | 6.0 | 31.0 |  | 40.0 | 90.0% | 6.0 | 28.0 |"),
    "scaling": (SCALING, "| tiny | tensor=4 | peer | 8k | 80.0 ± 0.2 | 40.0 | 75.3% | 28.0 |"),
    "million": (SCALING[-1:], "| tiny | one GPU |  | 8k | 20.0 ± 0.2 | 40.0 | 75.3% | 28.0 |"),
    "layers": (LAYERS, "| tensor=4 | xla | peer | 512 | 143.0 | 88.0 | 8.0 | 32.0 | 12.0 | 3.0 |"),
    "attention": (ATTENTION, "| 4 | 2 | 1024 | 250.0 | 1.90 |  |"),
    "collectives": (COLLECTIVES, "| all_reduce | psum | 4 | 16 KB | 16.0 | 16.0 |"),
}


@pytest.mark.parametrize("part", LINES)
def test_each_part_has_a_table_and_some_a_chart(charts, tmp_path, capsys, part):
    rows, line = LINES[part]
    path = tmp_path / f"sharded_{part}.json"
    path.write_text(json.dumps({"part": part, "device": "toy", "rows": rows}))
    assert charts.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{part}, toy"
    assert line in lines
    columns = {text.count("|") for text in lines[2:] if text}
    assert len(columns) == 1
    drawn = path.with_suffix(".png")
    assert drawn.exists() == (part in ("depth", "scaling", "collectives"))
    if drawn.exists():
        assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("part", LINES)
def test_a_file_without_rows_has_no_chart(charts, tmp_path, capsys, part):
    path = tmp_path / f"sharded_{part}.json"
    path.write_text(json.dumps({"part": part, "device": "toy", "rows": []}))
    assert charts.main([str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"{part}, toy\n\n| ")
    assert list(tmp_path.glob("*.png")) == []


def test_the_parts_are_those_that_are_measured(charts):
    assert set(charts.TABLES) == set(importlib.import_module("sharded").PARTS) == set(LINES)
    assert set(charts.CHARTS) < set(charts.TABLES)


def drawn(charts, monkeypatch, draw, rows) -> dict[str, list]:
    """What the lines of a chart connect, by their names in the legend."""
    seen = {}

    def look(figure, axes, path):
        for line in axes.get_lines():
            seen[line.get_label()] = [tuple(point) for point in line.get_xydata().tolist()]

    monkeypatch.setattr(charts, "_save", look)
    draw({"device": "toy", "rows": rows}, None)
    return seen


def test_scaling_starts_at_the_fewest_devices(charts, monkeypatch):
    lines = drawn(charts, monkeypatch, charts.draw_scaling, SCALING)
    assert lines["8k tokens"] == lines["512 tokens"] == [(1, 20), (4, 80)]
    assert "in proportion" in lines


def test_depths_tell_collectives_apart(charts, monkeypatch):
    """By the name of the line, where an implementation comes with others than at first."""
    seen = []
    monkeypatch.setattr(charts.bench_output, "draw_chart", lambda rows, *_, **__: seen.extend(rows))
    charts.draw_depth({"device": "toy", "rows": DEPTH}, None)
    other = "flash_decode, collectives by xla"
    assert {row["implementation"]: row["tok_s"] for row in seen if row["depth"] == 512} == {
        "flash_decode": 36.0, "flash_decode_nosplit": 6.0, other: 31.0, "planner_model": 28.0,
    }  # fmt: skip
    header, _ = charts.table_of_speeds(DEPTH)
    assert header[1:5] == ["flash_decode", "flash_decode_nosplit", other, "xla"]


def test_latencies_are_of_the_most_devices(charts, monkeypatch):
    lines = drawn(charts, monkeypatch, charts.draw_collectives, COLLECTIVES)
    assert lines["all_reduce, psum"] == [(2048, 15), (16384, 15.96)]
    assert lines["all_gather, all_gather"] == [(4224, 16.5)]
    assert lines["all_reduce, the planner's model"] == [(2048, 16), (16384, 16)]


def test_without_a_file_the_help_is_shown(charts, capsys):
    assert charts.main([]) == 2
    assert "sharded_*.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "text"), [(544, "544 B"), (16384, "16 KB"), (8 * 2**20, "8 MB"), (4224, "4.12 KB")]
)
def test_sizes(charts, size, text):
    assert charts.readable_size(size) == text
