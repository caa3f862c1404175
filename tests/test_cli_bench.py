"""`jaxdecode bench` in this process: tables, files, charts, mistakes, and what an error leaves."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import sys

import pytest
from bench_rows import ROW
from cli_runs import MAX_POSITIONS, fails, make_model

from jaxdecode import bench, read_bandwidth
from jaxdecode.bench import NO_SPLIT
from jaxdecode.cli import bench_model
from jaxdecode.cli.bench import make_plan
from jaxdecode.cli.output import Report
from jaxdecode.models.config import PRESETS
from jaxdecode.models.sharding import Sharding
from jaxdecode.pallas_kernels import flash_decode
from jaxdecode.read_bandwidth import ReadCeiling


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny", tokenizer=False)


@pytest.fixture
def measuring(cli, model, monkeypatch):
    """Gives a call of `bench` on a tiny model without a tokenizer; the ceiling is not measured."""
    ceiling = ReadCeiling(1e10, "sum", {"copy": 9e9, "sum": 1e10}, 2**29)
    monkeypatch.setattr(read_bandwidth, "measure_read_ceiling", lambda: ceiling)

    def call(*arguments):
        options = ("-m", model, "--no-compilation-cache", "-n", 4, "-r", 2)
        return cli("bench", *options, *arguments)

    return call


def table(out: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    header, _, *rows = lines
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_what_is_said_of_attention_tells_where_a_step_attends(monkeypatch, capsys):
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: None)
    names, sharding = ["auto", "flash_decode", NO_SPLIT, "xla"], Sharding()
    config = PRESETS["llama-3.1-8b"]
    chosen = bench_model.choose_attention(Report(), config, "bfloat16", names, sharding)
    assert chosen == ["auto", NO_SPLIT, "xla"]
    where = "a step of one token attends inside the layers' kernel"
    assert capsys.readouterr().err.splitlines()[1:] == [
        f"attention auto: flash_decode: the kernels for this GPU; {where}",
        f"attention flash_decode: flash_decode: asked for; {where}",
        f"attention {NO_SPLIT}: {NO_SPLIT}: asked for",
        "attention xla: xla: asked for",
    ]


def test_the_table_goes_to_stdout_and_the_rest_to_stderr(measuring):
    code, out, err = measuring("-d", "0,100", "-b", "1", "--attn", "auto,xla")
    assert code == 0
    rows = table(out)
    assert [row["test"] for row in rows] == ["tg4", "tg4 @ d100"]
    assert {row["attention"] for row in rows} == {"xla"}  # auto and xla are the same here
    assert all(" ± " in row["tok/s"] and row["of the bound"].endswith("%") for row in rows)
    said = err.splitlines()
    assert said[0] == "device: cpu; weights: float32"
    assert said[1].startswith("attention auto: xla: the portable implementation; ")
    assert said[2] == "attention xla: xla: asked for"
    assert said[3] == "memory: read at 10 GB/s by sum (copy 9, sum 10)"
    assert said[4].startswith("tg4, batch 1, xla: ")
    assert said[4].endswith(" s)")
    assert "% of the bound (after compiling for " in said[4]
    assert said[-1].startswith("peak memory: ")
    assert measuring("-d", "100", "-q")[2] == ""


def test_the_ceiling_is_measured_in_the_same_run(cli, model, monkeypatch):
    monkeypatch.setattr(read_bandwidth, "_CPU_BYTES", 2**22)
    options = ("-m", model, "--no-compilation-cache", "-n", 4, "-r", 1, "-d", 100)
    code, out, _ = cli("bench", *options, "--format", "json")
    results = json.loads(out)
    assert code == 0
    assert results["read_peak_tb_s"] == max(results["read_methods_tb_s"].values())
    (row,) = results["rows"]
    peak = 1e12 * results["read_peak_tb_s"]
    assert row["bound_tok_s"] == pytest.approx(peak / row["bytes_per_step"])
    assert row["tok_s_std"] is None  # of a single repetition
    assert row["model"] == model.name


def test_ragged_batches_prompts_and_a_capacity(measuring):
    code, out, _ = measuring(
        "-d", "7+100, 100", "-p", "16", "-b", "2", "--capacity", "120", "--format", "csv"
    )
    prompt, ragged, even = csv.DictReader(io.StringIO(out))
    assert code == 0
    assert (prompt["test"], prompt["batch"], prompt["bound_tok_s"]) == ("pp16", "2", "")
    assert (ragged["test"], ragged["depth"]) == ("tg4 @ d7..100", "7+100")
    assert (even["test"], even["batch"], even["capacity"]) == ("tg4 @ d100", "2", "128")


def test_every_depth_is_measured_at_every_batch_size_but_a_ragged_one_once():
    plan = make_plan("0,5+6,7", "1,2", 4, "16,32", 1, "xla, auto,xla", None)
    assert plan.batches == [[0], [0, 0], [5, 6], [7], [7, 7]]
    assert plan.prompts == [(16, 1), (16, 2), (32, 1), (32, 2)]
    assert plan.attention == ["xla", "auto"]


def test_prompts_only(measuring):
    code, out, _ = measuring("-n", "0", "-p", "16", "-b", "2", "-r", "1")
    (row,) = table(out)
    assert code == 0
    assert (row["test"], row["of the bound"]) == ("pp16", "n/a")
    assert row["tok/s"].endswith(" ± n/a")
    assert float(row["first token, s"]) >= 0


def test_random_weights_for_a_preset(measuring, monkeypatch):
    shape = dataclasses.replace(
        PRESETS["tinyllama"], vocab_size=64, embed_dim=32, ffw_dim=64, num_layers=1,
        num_q_heads=4, head_dim=8,
    )  # fmt: skip
    monkeypatch.setitem(PRESETS, "tinyllama", shape)
    options = ("--preset", "tinyllama", "--random", "-d", "5", "--dtype", "float16")
    code, out, _ = measuring("-m", "smollm2-135m", *options)
    (row,) = table(out)
    assert (code, row["model"]) == (0, "tinyllama float16")


def test_files(measuring, tmp_path):
    file, chart = tmp_path / "results.json", tmp_path / "chart.svg"
    code, out, _ = measuring("-d", "100", "--format", "json", "-o", file, "--plot", chart)
    assert (code, out) == (0, "")
    assert len(json.loads(file.read_text())["rows"]) == 1
    assert "upper bound" in chart.read_text()
    assert sorted(tmp_path.iterdir()) == [chart, file]  # nothing temporary stays


def test_rows_before_an_error_are_kept(measuring, monkeypatch):
    decode = bench.Bench.decode

    def fail_beyond(self, lengths, *arguments, **options):
        if lengths[0] > 100:
            raise RuntimeError("RESOURCE_EXHAUSTED: no room")
        return decode(self, lengths, *arguments, **options)

    monkeypatch.setattr(bench.Bench, "decode", fail_beyond)
    code, out, err = measuring("-d", "100,200")
    assert code == 1
    assert [row["test"] for row in table(out)] == ["tg4 @ d100"]
    assert err.splitlines()[-1].startswith("error: out of memory (RESOURCE_EXHAUSTED: no room)")
    assert "error: " in fails(measuring("-d", "200"), code=1)


def test_rows_before_an_interruption_are_kept(measuring, monkeypatch):
    decode = bench.Bench.decode

    def interrupt_beyond(self, lengths, *arguments, **options):
        if lengths[0] > 100:
            raise KeyboardInterrupt
        return decode(self, lengths, *arguments, **options)

    monkeypatch.setattr(bench.Bench, "decode", interrupt_beyond)
    code, out, _ = measuring("-d", "100,200")
    assert code == 130
    assert [row["test"] for row in table(out)] == ["tg4 @ d100"]


def test_beyond_the_trained_positions_there_is_a_warning(measuring, monkeypatch):
    monkeypatch.setattr(bench.Bench, "decode", lambda *_, **__: ROW)
    assert "warning" not in measuring("-d", MAX_POSITIONS - 4)[2]
    code, _, err = measuring("-d", MAX_POSITIONS, "-q")
    assert code == 0
    assert f"warning: beyond the {MAX_POSITIONS} positions" in err


MISTAKES = {
    "depth": (["-d", "5,x"], "-d takes integers from 0 to 1073741824, found 'x'"),
    "negative": (["-d", "-5"], "-d takes integers from 0 to 1073741824, found '-5'"),
    "huge": (["-d", "9" * 40], "-d takes integers from 0"),
    "gap": (["-b", "1,,2"], "-b takes a list such as 1,8, found '1,,2'"),
    "batch": (["-b", "0"], "-b takes integers from 1 to 65536, found '0'"),
    "prompt": (["-p", "0"], "-p takes integers from 1"),
    "tokens": (["-n", "-1"], "-n must be an integer from 0 to 1024, found -1"),
    "many tokens": (["-n", "2000"], "-n must be an integer from 0 to 1024, found 2000"),
    "repetitions": (["-r", "0"], "-r must be an integer from 1 to 10000, found 0"),
    "nothing": (["-n", "0"], "-n 0 measures prompts only; give their lengths with -p"),
    "capacity": (["--capacity", "100", "-d", "99"], "need a capacity of 103, found 100"),
    "attention": (["--attn", "fast"], "attention must be one of auto, flash_decode, "),
    "not here": (["--attn", "xla,flash_decode"], "attention flash_decode: "),
    "not random": (["-m", "smollm2-135m", "--preset", "tinyllama"], "add --random"),
    "no preset": (["--random"], "--random makes weights for a --preset; name one"),
    "two models": (["--preset", "tinyllama", "--random"], "give -m or --preset, found both"),
    "preset": (["-m", "smollm2-135m", "--preset", "gpt", "--random"], "is unknown; known: smollm2"),
    "model": (["-m", "not/there/at/all"], "no such file or directory"),
    "output": (["-o", "not/there.md"], "-o not/there.md cannot be written"),
    "plot": (["--plot", "not/there.png"], "--plot not/there.png cannot be written"),
    "no chart": (["--plot", "chart.gif"], "ending in .png, .svg, .pdf, found chart.gif"),
    "empty chart": (["--plot", "chart.png", "-d", "0"], "--plot draws decoding at depths above 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_said_before_anything_is_measured(measuring, monkeypatch, name):
    monkeypatch.setattr(bench.Bench, "decode", None)
    arguments, message = MISTAKES[name]
    assert message in fails(measuring(*arguments))


def test_a_chart_without_matplotlib(measuring, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = fails(measuring("-d", "5", "--plot", tmp_path / "chart.png"))
    assert "pip install 'jaxdecode[plot]'" in line


def test_a_batch_cut_over_data(measuring):
    code, out, err = measuring("-d", "5", "-b", "2", "--mesh", "data=2", "--format", "csv")
    assert code == 0, err
    (row,) = csv.DictReader(io.StringIO(out))
    assert (row["mesh"], row["batch"]) == ("data=2", "2")


def test_meshes_that_do_not_fit(cli):
    options = ["bench", "--preset", "smollm2-135m", "--random", "--device", "cpu"]
    error = fails(cli(*options, "--mesh", "tensor=2"))
    assert "axis tensor=2 does not divide num_kv_heads=3" in error
    error = fails(cli(*options, "--mesh", "data=2", "-b", "3"))
    assert "a batch of 3 is not divided by the mesh axis data=2" in error


def test_what_cannot_fit_is_refused_before_it_is_made(cli, monkeypatch):
    monkeypatch.setattr(bench_model, "random_model", None)
    options = ["bench", "--preset", "codellama-34b", "--random", "--device", "cpu"]
    error = fails(cli(*options, "-d", "100000000"))
    assert "does not fit into memory: weights 67.5 GB" in error
