"""The README's examples run, and its table says what the results file says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
from cli_runs import make_model
from smollm2 import smollm2_gguf


@pytest.fixture(scope="module")
def readme(project_root) -> str:
    return (project_root / "README.md").read_text()


def examples(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run_example(code: str, tmp_path, **environment: str):
    """In a process of its own, as a user would."""
    script = tmp_path / "example.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=240, cwd=tmp_path,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_there_are_six_examples(readme):
    assert len(examples(readme)) == 6


@pytest.mark.slow
@pytest.mark.network
def test_the_ten_line_example(readme, tmp_path):
    smollm2_gguf()
    code = examples(readme)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    printed = run_example(code, tmp_path)
    assert "length" in printed or "stop" in printed
    assert len(printed.split()) > 20


@pytest.mark.parametrize("index", [1, 2, 3])
def test_examples_for_own_models(readme, tmp_path, index):
    run_example(examples(readme)[index], tmp_path)


def test_the_example_over_several_devices(readme, tmp_path):
    make_model(tmp_path / "path/to/llama")
    printed = run_example(examples(readme)[4], tmp_path, JAX_NUM_CPU_DEVICES="4")
    assert printed.strip().isalpha()


@pytest.mark.parametrize("devices", ["1", "4"])
def test_attention_over_several_devices(readme, tmp_path, devices):
    run_example(examples(readme)[5], tmp_path, JAX_NUM_CPU_DEVICES=devices)


def test_a_broken_example_is_noticed(tmp_path):
    with pytest.raises(AssertionError, match="NameError"):
        run_example("not_a_name", tmp_path)


def test_the_speed_table_is_the_results_file(readme, project_root, monkeypatch):
    monkeypatch.syspath_prepend(str(project_root / "benchmarks"))
    spec = importlib.util.spec_from_file_location(
        "cpu_generate", project_root / "benchmarks/cpu_generate.py"
    )
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    path = "benchmarks/results/cpu/cpu_generate.json"
    shown = readme.split(f"<!-- table: {path} -->\n")[1].split("<!-- end of table -->")[0]
    results = json.loads((project_root / path).read_text())
    assert shown.strip() == benchmark.table(results)
