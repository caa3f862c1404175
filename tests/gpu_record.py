"""Writes what a run of the GPU tests found, for `pytest -m gpu --gpu-record PATH`.

The file says how many tests passed, on which device and with which code, so that a claim about GPUs
can be checked without one: `make results-check` names a record of other code or with failures.
"""

from __future__ import annotations

import collections
import datetime
import itertools
import json
import pathlib
import sys
from collections.abc import Iterable

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
OPTION = "--gpu-record"
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


class GpuRecord:
    """A pytest plugin, for the process that reports: with -n, the one that starts the others."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path

    def pytest_terminal_summary(self, terminalreporter, exitstatus, config):
        reports = {name: terminalreporter.stats.get(name, []) for name in OUTCOMES}
        record = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "source": source_hash(),
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["pytest", *without_record(config.invocation_params.args)]),
            "exit_status": int(exitstatus),
            **{name: len(found) for name, found in reports.items()},
            "failures": sorted(x.nodeid for x in reports["failed"] + reports["error"]),
            "seconds": seconds_of_files(itertools.chain(*reports.values())),
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(record, indent=1) + "\n")
        terminalreporter.write_line(f"GPU tests recorded in {self._path}")


def seconds_of_files(reports: Iterable[pytest.TestReport]) -> dict[str, int]:
    """What each file's tests took, one after the other, the slowest file first."""
    seconds: collections.Counter[str] = collections.Counter()
    for report in reports:
        seconds[report.nodeid.partition("::")[0]] += report.duration
    return {name: round(total) for name, total in seconds.most_common()}


def without_record(arguments: tuple[str, ...]) -> list[str]:
    """The arguments without the record's path, which is a matter of one machine."""
    kept, skip = [], False
    for argument in map(str, arguments):
        if not skip and argument != OPTION and not argument.startswith(f"{OPTION}="):
            kept.append(f'"{argument}"' if " " in argument else argument)
        skip = argument == OPTION
    return kept


def source_hash() -> str:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import source_hash as module
    finally:
        sys.path.pop(0)
    return module.source_hash()
