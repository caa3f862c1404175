"""What `pytest -m gpu --gpu-record PATH` writes, tried on tests that need no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax

TESTS = """
import time
import pytest

@pytest.mark.parametrize("i", range(5))
def test_pass(i): pass

def test_fail():
    time.sleep(0.6)
    raise ValueError

def test_skip(): pytest.skip("no reason")

@pytest.fixture
def broken(): raise KeyError

def test_error(broken): pass

@pytest.mark.xfail
def test_xfail(): raise ValueError
"""


def run(project_root, tmp_path, *arguments):
    """pytest as in the project, on the tests above, with their conftest as a plugin."""
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-q"]
    path = os.pathsep.join([str(project_root / "tests"), str(project_root)])
    return subprocess.run(
        [*command, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "CI": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_record_of_several_processes_counts_once(project_root, tmp_path, monkeypatch):
    path = tmp_path / "new" / "gpu_tests.json"
    options = ["-n", "2", "-m", "not gpu", "-p", "no:benchmark"]
    done = run(project_root, tmp_path, *options, "--gpu-record", str(path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"GPU tests recorded in {path}" in done.stdout
    record = json.loads(path.read_text())
    monkeypatch.syspath_prepend(project_root / "benchmarks")
    import results_check
    import source_hash

    assert len(record.pop("date")) == len("2026-01-02")
    assert record.pop("failures") == ["test_it.py::test_error", "test_it.py::test_fail"]
    ((file, seconds),) = record.pop("seconds").items()
    assert file == "test_it.py"
    assert 1 <= seconds < 60
    assert record == {
        "device": "cpu",
        "jax": jax.__version__,
        "source": source_hash.source_hash(),
        "command": 'pytest -p conftest -p no:cacheprovider -q -n 2 -m "not gpu" -p no:benchmark',
        "exit_status": 1,
        "passed": 5,
        "failed": 1,
        "error": 1,
        "skipped": 1,
        "xfailed": 1,
        "xpassed": 0,
    }
    (named,) = results_check.stale_results(path.parent, record["source"])
    assert named == "gpu_tests.json: records a run of tests that ended with status 1"


def test_results_check_wants_a_record_of_the_current_code(project_root, tmp_path, monkeypatch):
    path = tmp_path / "gpu_tests.json"
    done = run(project_root, tmp_path, f"--gpu-record={path}", "-k", "pass")
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.syspath_prepend(project_root / "benchmarks")
    from results_check import stale_results

    record = json.loads(path.read_text())
    assert record["command"].endswith("-q -k pass")
    assert stale_results(tmp_path, record["source"]) == []
    assert "measured other code" in stale_results(tmp_path, "0")[0]
