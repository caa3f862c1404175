"""Results files, tables and charts from rows."""

from __future__ import annotations

import csv
import datetime
import io
import json
import re
import sys

import jax
import pytest
from bench_rows import prompt_row, row

from jaxdecode import bench_output
from jaxdecode.errors import RequestError
from jaxdecode.read_bandwidth import ReadCeiling

CEILING = ReadCeiling(4.5e12, "tma", {"copy": 4.2e12, "tma": 4.5e12}, 4_000_000_000)


def test_results_have_the_keys_of_every_results_file():
    results = bench_output.results(CEILING, [row()])
    assert list(results) == [
        "device", "jax", "date", "read_peak_tb_s", "read_methods_tb_s", "rows"
    ]  # fmt: skip
    assert (results["device"], results["jax"]) == ("cpu", jax.__version__)
    assert results["date"] == datetime.date.today().isoformat()
    assert (results["read_peak_tb_s"], results["read_methods_tb_s"]["copy"]) == (4.5, 4.2)
    (written,) = json.loads(json.dumps(results, allow_nan=False))["rows"]
    needed = {"model", "mesh", "batch", "depth", "implementation", "tok_s", "bytes_per_step"}
    assert needed | {"bound_tok_s", "fraction_of_bound"} <= written.keys()


def test_the_table_is_aligned_and_in_the_terms_of_llama_bench():
    rows = [row(), row(depth=65536, batch=16, tok_s=1234.5)]
    assert bench_output.markdown(rows).splitlines() == [
        "| model        | attention | test         | batch |        tok/s | GB/s | of the bound |",
        "| ------------ | --------- | ------------ | ----: | -----------: | ---: | -----------: |",
        "| tiny float32 | xla       | tg4 @ d512   |     1 |   30.1 ± 0.2 |   12 |        75.3% |",
        "| tiny float32 | xla       | tg4 @ d65536 |    16 | 1234.5 ± 0.2 |   12 |        75.3% |",
    ]
    assert "| tiny float32 tensor=2 | " in bench_output.markdown([row(mesh="tensor=2")])


def test_prompts_get_a_column_for_their_first_token():
    table = bench_output.markdown([prompt_row(), row()])
    header, _, prompt, decoding = table.splitlines()
    assert header.endswith("| first token, s |")
    assert re.search(r"\| +n/a \| +n/a \| +0\.133 \|$", prompt)
    assert re.search(r"\| +75\.3% \| +\|$", decoding)
    assert "first token" not in bench_output.markdown([row()])


def test_what_was_not_measured_is_said():
    assert bench_output.speed(row(tok_s_std=None)) == "30.1 ± n/a"
    empty = row(tok_s=None, tok_s_std=None, gb_s=None, fraction_of_bound=None)
    assert bench_output.speed(empty) == "n/a ± n/a"
    assert bench_output.markdown([empty]).count("n/a") == 4


def test_csv_can_be_read_back():
    rows = [row(depth=[512, 4096], tok_s_std=None), prompt_row()]
    first, second = csv.DictReader(io.StringIO(bench_output.csv_text(rows)))
    assert first["depth"] == "512+4096"
    assert float(first["tok_s"]) == 30.14
    assert first["tok_s_std"] == second["bound_tok_s"] == ""
    assert second["test"] == "pp16"
    assert list(first) == list(rows[0])


# Charts


def drawn(rows, tmp_path, **options) -> str:
    """The text of the chart."""
    path = tmp_path / "chart.svg"
    bench_output.draw_chart(rows, path, **options)
    # Text is drawn as shapes, and named in a comment before each.
    return "\n".join(re.findall(r"<!-- (.*?) -->", path.read_text()))


def test_the_chart_has_a_line_per_implementation_and_the_bound(tmp_path):
    rows = [
        row(depth=depth, implementation=name, tok_s=speed)
        for depth in (512, 65536)
        for name, speed in (("xla", 30), ("flash_decode", 38), ("some_model", 9))
    ]
    rows += [prompt_row(), row(depth=[512, 4096]), row(depth=0)]
    text = drawn(rows, tmp_path)
    for words in ("tiny", "xla", "flash_decode", "some_model", "upper bound", "512", "64k"):
        assert words in text.splitlines()
    assert text.count("upper bound") == 1
    assert "tokens in the cache" in text


def test_several_batch_sizes_have_lines_and_bounds_of_their_own(tmp_path):
    rows = [row(depth=d, batch=b) for d in (512, 1024) for b in (1, 8)]
    lines = drawn(rows, tmp_path, title="A title").splitlines()
    assert {"A title", "xla, batch 1", "xla, batch 8"} <= set(lines)
    assert {"upper bound, batch 1", "upper bound, batch 8"} <= set(lines)


def test_a_chart_against_the_batch_size(tmp_path):
    lines = drawn([row(batch=b) for b in (1, 4, 64)], tmp_path, x="batch").splitlines()
    assert {"batch size", "1", "4", "64", "xla"} <= set(lines)


@pytest.mark.parametrize("suffix", [".png", ".PDF"])
def test_other_formats(tmp_path, suffix):
    path = tmp_path / f"chart{suffix}"
    bench_output.draw_chart([row()], path)
    assert path.read_bytes()[:4] in (b"\x89PNG", b"%PDF")


def test_what_cannot_be_drawn_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(RequestError, match=r"ending in \.png, \.svg, \.pdf, found chart\.gif"):
        bench_output.draw_chart([row()], tmp_path.joinpath("chart.gif").relative_to(tmp_path))
    with pytest.raises(RequestError, match="nothing to draw"):
        bench_output.draw_chart([prompt_row(), row(depth=0)], tmp_path / "chart.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RequestError, match=r"pip install 'jaxdecode\[plot\]'"):
        bench_output.draw_chart([row()], tmp_path / "chart.png")
    assert list(tmp_path.iterdir()) == []
