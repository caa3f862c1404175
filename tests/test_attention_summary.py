"""What the attention benchmark says of its results: goals, table and charts."""

from __future__ import annotations

import json

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def cases(project_root, monkeypatch):
    monkeypatch.syspath_prepend(project_root / "benchmarks")
    import attention_cases

    return attention_cases


def synthetic_results(cases):
    """Ours 10 us plus the time of reading at 4 TB/s, each peer a known multiple of it."""
    factors = {"flash_decode": 1.0, "xla": 3.0, "cudnn": 1.5, "fa3": 2.0, "fa3_nosplit": 40.0}
    rows = []
    for case in cases.CASES:
        ours = 10 + case.bytes / 4e6
        for name, factor in factors.items():
            if case.is_ragged and name == "fa3":
                continue
            time = ours * factor
            rows.append(
                case.row()
                | {
                    "implementation": name,
                    "us": time + 5,
                    "kernel_us": time,
                    "fraction_of_peak": case.bytes / time / 4e6,
                }
            )
    return {
        "device": "NVIDIA H200", "jax": "0.11.2", "source": "", "date": "", "versions": {},
        "read_peak_tb_s": 4.0, "missing": {"flashinfer": "no wheel\nat all"}, "rows": rows,
        "failures": [cases.CASES[0].row() | {"implementation": "sdpa_flash", "reason": "cannot"}],
        "not_measured": ["2x2 1/1"],
    }  # fmt: skip


def test_summary_compares_with_the_goals(cases):
    from attention_summary import summary

    lines = summary(synthetic_results(cases)).splitlines()
    assert lines[0] == "NVIDIA H200, jax 0.11.2, read ceiling 4.0 TB/s"
    (line,) = [line for line in lines if line.startswith("1x512 16/2")]
    shown = " ".join(line.split())
    assert shown == "1x512 16/2 10.13 4.0 MISS 15.20 cudnn (1.50 times ours)"
    assert any("geometric mean: 1.500 (goal 1.3)" in line and line[:2] == "ok" for line in lines)
    assert "ok   1x65536 16/2: 40.0 times fa3_nosplit (goal 38)" in lines
    assert "MISS 1x524288 16/2: 40.0 times fa3_nosplit (goal 45)" in lines
    assert "ok   1x65536 16/2 filled 2048: 1.000 of 1x2048 16/2 (goal 1.05)" in lines
    assert "ok   16x8192 32/32: 0.982 of the ceiling (goal 0.97)" in lines
    assert "MISS 64x8192 16/2: 0.931 of the ceiling (goal 0.95)" in lines
    assert lines[-3:] == [
        "missing: flashinfer: no wheel",
        "failed: 1x512 16/2 sdpa_flash: cannot",
        "not measured: 2x2 1/1",
    ]
    assert not any("our time" in line for line in lines)


def test_summary_names_every_faster_peer(cases):
    from attention_summary import summary

    results = synthetic_results(cases)
    for row in results["rows"]:
        if row["S"] == 8192 and row["B"] == 8 and row["implementation"] == "cudnn":
            row["kernel_us"] *= 0.5
            row["us"] *= 0.5
    lines = summary(results).splitlines()
    assert "MISS 8x8192 16/2: the best peer takes 0.750 of our time" in lines
    assert sum("MISS 8x8192 16/2: in us, jax.nn's best takes 0." in line for line in lines) == 1


def test_geometric_mean():
    from attention_summary import geometric_mean

    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert np.isnan(geometric_mean([]))


def test_table_has_a_row_for_each_shape_and_marks_the_fastest(cases):
    from attention_summary import TABLE_CASES, table

    head, rule, *rows = table(synthetic_results(cases)).splitlines()
    assert head == (
        "| batch x capacity, heads | KV MB | jaxdecode | jax.nn xla | jax.nn cudnn | FA3 "
        "| FA3, 1 split | of the ceiling |"
    )
    assert rule == "|" + "---|" * 8
    assert len(rows) == len(TABLE_CASES)
    assert rows[0] == "| 1x512 16/2 | 0.5 | **10.1** | 30.4 | 15.2 | 20.3 | 405.2 | 1% |"
    (ragged,) = [row for row in rows if "ragged" in row]
    assert "| - |" in ragged


def test_charts_hold_every_implementation(cases, tmp_path):
    import attention_charts

    results = synthetic_results(cases)
    shown = attention_charts.lines(results, "kernel_us")
    assert list(shown) == ["flash_decode", "xla", "cudnn", "fa3", "fa3_nosplit"]
    lengths, microseconds = shown["fa3"]
    assert lengths == [2**i for i in range(9, 21)]
    assert microseconds[0] == pytest.approx(2 * (10 + 1024 * 512 / 4e6))
    assert [attention_charts.short(S) for S in (512, 65536, 2**20)] == ["512", "64k", "1M"]
    path = tmp_path / "attention.json"
    path.write_text(json.dumps(results))
    attention_charts.main(path)
    for name in ("attention_time.png", "attention_fraction.png"):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 20_000


def test_every_implementation_has_a_style_or_is_left_out_on_purpose(cases):
    from attention_charts import STYLES

    assert set(cases.IMPLEMENTATIONS) - set(STYLES) == {"jaxdecode", "jaxdecode_xla"}
    looks = [(style["color"], style.get("linestyle")) for style in STYLES.values()]
    assert len(set(looks)) == len(looks)


def test_readme_shows_the_results_as_soon_as_there_are_any(project_root):
    from attention_summary import table

    path = "benchmarks/results/h200/attention.json"
    readme, marker = (project_root / "README.md").read_text(), f"<!-- table: {path} -->\n"
    assert (marker in readme) is (project_root / path).exists()
    if marker in readme:
        shown = readme.split(marker)[1].split("<!-- end of table -->")[0]
        assert shown.strip() == table(json.loads((project_root / path).read_text()))
        for chart in ("attention_time.png", "attention_fraction.png"):
            assert f"benchmarks/results/h200/{chart}" in readme
            assert (project_root / "benchmarks/results/h200" / chart).exists()


def test_ours_is_what_the_door_chooses():
    from attention_summary import ours

    assert ours({"jaxdecode": 1.0, "flash_decode": 2.0, "cudnn": 1.0}) == 1.0
    assert ours({"flash_decode": 2.0, "cudnn": 1.0}) == 2.0
    assert ours({"cudnn": 1.0}) is None
