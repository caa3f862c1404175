"""benchmarks/decode.py with tiny models, its cases, its cost model, and the charts of its files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxdecode import bench, generate
from jaxdecode.models.config import PRESETS
from jaxdecode.models.kv_cache import round_up_capacity

# 75 % of an H200, which is what JAX takes.
H200_BYTES = 0.75 * 139 * 2**30


@pytest.fixture
def decode(script):
    return script("decode")


def run(decode, tmp_path, *arguments) -> tuple[int, dict[str, dict]]:
    """The exit status, and the results by chart."""
    options = ["--tiny", "--tokens", "2", "--repetitions", "2", "--output", str(tmp_path)]
    status = decode.main([*arguments, *options])
    files = {path: json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))}
    assert all(path.name == f"decode_{results['chart']}.json" for path, results in files.items())
    return status, {results["chart"]: results for results in files.values()}


@contextlib.contextmanager
def compilation_cache_of(script, folder, monkeypatch):
    """Where benchmarks make one, and none afterwards."""
    monkeypatch.setattr(script("runs").tempfile, "mkdtemp", lambda: str(folder))
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
        compilation_cache.reset_cache()


def test_charts_of_one_model(decode, tmp_path, script, capsys):
    status, files = run(decode, tmp_path, "capacity", "depth")
    assert status == 0
    assert capsys.readouterr().err.count("codellama-34b: random weights") == 1
    results = files["depth"]
    for key in ("device", "jax", "source", "date", "read_peak_tb_s", "rows"):
        assert results[key]
    assert results["source"] == script("source_hash").source_hash()
    rows = [row for row in results["rows"] if row["measured"]]
    assert [row["depth"] for row in rows] == [1, 64, 8, 128, 32, 2, 16, 4, 1]
    for row in rows:
        assert (row["model"], row["mesh"], row["implementation"]) == ("codellama-34b", "", "xla")
        bound = row["batch"] * 1e12 * results["read_peak_tb_s"] / row["bytes_per_step"]
        assert row["bound_tok_s"] == pytest.approx(bound)
        assert row["fraction_of_bound"] == pytest.approx(row["tok_s"] / bound)
    # What this machine lacks is named, case by case.
    missing = {line["case"].split(",")[0] for line in results["left_out"]}
    assert {"flash_decode", "flash_decode_nosplit"} <= missing
    assert len(rows) + len(results["left_out"]) == len(decode.CHARTS["depth"].cases)
    assert {row["capacity"] for row in files["capacity"]["rows"]} == {256}


def test_calls_of_generate_beside_one_dispatch(decode, tmp_path, script, monkeypatch):
    case = script("decode_cases").Case((2048, 2048), "xla", called=True)
    chart = dataclasses.replace(decode.CHARTS["call"], cases=(case,))
    monkeypatch.setitem(decode.CHARTS, "call", chart)
    asked = []
    monkeypatch.setattr(
        decode, "generate", lambda *args, **rest: (asked.append(rest), generate(*args, **rest))[1]
    )
    status, files = run(decode, tmp_path, "call")
    assert status == 0
    (row,) = files["call"]["rows"]
    assert (row["test"], row["batch"], row["tokens"]) == ("call2 @ d2", 2, 2)
    assert row["seconds"] > 0 < row["seconds_at_once"]
    assert row["fraction_of_bound"] == pytest.approx(row["tok_s"] / row["bound_tok_s"])
    assert row["gb_s"] == pytest.approx(row["tok_s"] / 2 * row["bytes_per_step"] / 1e9)
    assert [x["implementation"] for x in asked] == ["xla"] * 4
    assert row["repetitions"] == 2


def test_compiling_ahead_leaves_nothing_to_compile(decode, script, tmp_path, monkeypatch):
    """One program for each of the two capacities: what is measured is what was compiled."""
    folder = tmp_path / "compiled"
    jax.clear_caches()  # what is in memory is not written
    with compilation_cache_of(script, folder, monkeypatch):
        status, files = run(decode, tmp_path, "depth", "--compile-ahead")
    assert status == 0
    assert {row["capacity"] for row in files["depth"]["rows"]} == {128, 256}
    assert len(list(folder.glob("jit_decode-*-cache"))) == 2


def test_what_the_next_process_finds_compiled(script, tmp_path, monkeypatch, capfd):
    compile_step = script("compile_step")
    monkeypatch.setattr(compile_step, "CASES", compile_step.CASES[:1])
    path = tmp_path / "results" / "compile_step.json"
    assert compile_step.main(["--tiny", "--output", str(path)]) == 0, capfd.readouterr().err
    results = json.loads(path.read_text())
    assert results["source"] == script("source_hash").source_hash()
    first, following = results["rows"]
    assert (first["process"], following["process"]) == ("first", "next")
    assert (first["from_cache"], following["from_cache"]) == (False, True)
    assert first["implementation"] == "xla"
    assert min(row[key] for row in (first, following) for key in ("lower_s", "compile_s")) > 0


def test_a_process_that_fails_to_compile_is_heard(script, tmp_path, monkeypatch, capfd):
    compile_step = script("compile_step")
    monkeypatch.setattr(compile_step, "CASES", compile_step.CASES[:1])
    path = tmp_path / "compile_step.json"
    status = compile_step.main(["--tiny", "--tokens", "-1", "--output", str(path)])
    assert status == 1
    assert "-1" in capfd.readouterr().err
    assert not path.exists()


def test_the_cost_model_stands_beside_each_depth(decode, tmp_path, script):
    _, files = run(decode, tmp_path, "depth")
    fastertransformer = script("fastertransformer")
    rows = files["depth"]["rows"]
    modelled = {row["depth"]: row for row in rows if not row["measured"]}
    assert modelled.keys() == {row["depth"] for row in rows if row["measured"]}
    for row in modelled.values():
        assert row["implementation"] == fastertransformer.NAME
        assert row["seconds"] is row["tok_s_std"] is None
        assert 0 < row["fraction_of_bound"] < 1


def test_the_cost_model(script):
    step_seconds = script("fastertransformer").step_seconds
    config = PRESETS["codellama-34b"]
    # 64 heads, each of which reads 2 * 1000 * 128 * 2 bytes at 1.5 / 132 of the ceiling, 48 times.
    expected = 67.0 + 48 * 512_000 / 1e9 * 132 / 1.5
    assert step_seconds(config, 67 * 10**9, 1000, 1, 2, 1e9) == pytest.approx(expected)
    # 5 sequences have more heads than there are multiprocessors: three waves.
    several = step_seconds(config, 67 * 10**9, 1000, 5, 2, 1e9)
    assert several - 67.0 == pytest.approx(3 * (expected - 67.0))
    # Many sequences with KV heads of their own read at the ceiling.
    mha, batch = PRESETS["llama-2-7b"], 33 * 8
    floor = batch * 1000 * mha.kv_bytes_per_token(2) / 1e9
    assert step_seconds(mha, 0, 1000, batch, 2, 1e9) == pytest.approx(floor)
    assert step_seconds(config, 1, 38741, 1, 2, 1e9) is not None
    assert step_seconds(config, 1, 38742, 1, 2, 1e9) is None


def test_a_budget_that_is_over_leaves_a_file_that_says_so(decode, tmp_path):
    status, files = run(decode, tmp_path, "ragged", "--budget-s", "-1")
    results = files["ragged"]
    assert (status, results["rows"]) == (0, [])
    assert {line["reason"] for line in results["left_out"]} == {"the time was over"}
    assert len(results["left_out"]) == len(decode.CHARTS["ragged"].cases)


def test_the_budget_allows_what_took_so_long_before(script, monkeypatch):
    runs, now = script("runs"), iter([0.0, 5.0, 5.0])
    monkeypatch.setattr(runs.time, "monotonic", lambda: next(now))
    clock = runs.Clock(10.0)
    assert clock.allows(4.0)
    assert not clock.allows(6.0)


def test_a_case_that_fails_is_named_and_the_others_go_on(decode, tmp_path, monkeypatch):
    measure = bench.Bench.decode

    def fail_when_even(self, lengths, *arguments, **options):
        if len(set(lengths)) == 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: no room\nsecond line")
        return measure(self, lengths, *arguments, **options)

    monkeypatch.setattr(bench.Bench, "decode", fail_when_even)
    status, files = run(decode, tmp_path, "ragged")
    assert status == 1
    assert [row["test"] for row in files["ragged"]["rows"]] == ["tg2 @ d1..16"]
    reasons = {line["reason"] for line in files["ragged"]["left_out"]}
    assert "failed: RuntimeError: RESOURCE_EXHAUSTED: no room" in reasons


def test_every_case_fits_one_h200(script):
    cases = script("decode_cases")
    for chart in cases.CHARTS.values():
        config = PRESETS[chart.preset]
        assert len(set(chart.cases)) == len(chart.cases)
        for case in chart.cases:
            slots = round_up_capacity(case.capacity or max(case.lengths) + 32)
            assert max(case.lengths) + 32 <= slots
            cache = len(case.lengths) * slots * config.kv_bytes_per_token(2)
            assert 2 * config.num_parameters + cache + 5e9 < H200_BYTES, case


def test_the_ragged_batch_has_as_many_tokens_as_the_even_one(script):
    cases = script("decode_cases")
    assert (min(cases.RAGGED), max(cases.RAGGED), len(cases.RAGGED)) == (512, 16384, 32)
    assert cases.EVEN == pytest.approx(statistics.fmean(cases.RAGGED), abs=1)
    assert list(cases.RAGGED) != sorted(cases.RAGGED)


def test_charts_and_tables_of_results(script, tmp_path, capsys):
    from bench_rows import row

    charts = script("charts")
    rows = [row(depth=d, batch=b) for b in (1, 16) for d in (4096, 512) if (d, b) != (512, 16)]
    for name, path in (("mha", tmp_path / "a.json"), ("ragged", tmp_path / "b.json")):
        path.write_text(json.dumps({"chart": name, "device": "toy", "rows": rows}))
    assert charts.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    out = capsys.readouterr().out
    assert "LLaMA-2-7B (32 KV heads), float16, batch 1: " in out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "b.png").exists()
    tests = [line.split("|")[3:5] for line in charts.table({"rows": rows}).splitlines()[2:]]
    assert [[cell.strip() for cell in cells] for cells in tests] == [
        ["tg4 @ d512", "1"], ["tg4 @ d4096", "1"], ["tg4 @ d4096", "16"],
    ]  # fmt: skip
    assert charts.main([]) == 2
