"""Decode attention on one GPU: jaxdecode beside jax.nn, torch's SDPA, FlashAttention-3, FlashInfer.

    python benchmarks/attention.py [--only "1x512 16/2,ragged"] [--budget-s 540] [--output PATH]

What is measured and how: README.md beside this file. The results are written after every case, so
a run that ends early leaves what it measured; nothing is resumed. Exit status 1 when jaxdecode
failed at a case or anyone's result was wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable

from attention_cases import CASES, IMPLEMENTATIONS, JAX_PEERS, OURS, TORCH_PEERS, Case, WrongResult
from attention_summary import summary
from attention_worker import Worker, WorkerError
from source_hash import ROOT, source_hash

FOLDER = pathlib.Path(__file__).resolve().parent
CASE_TIMEOUT_S = 90.0


def main() -> int:
    """Runs the cases, writes the results file, prints the summary; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="parts of the names of cases, with commas between")
    parser.add_argument("--implementations", help="their names, with commas between; default all")
    parser.add_argument("--budget-s", type=float, default=540.0, help="start no case after it")
    parser.add_argument("--torch-python", default=sys.executable, help="Python with torch")
    parser.add_argument(
        "--output", type=pathlib.Path, default=ROOT / "benchmarks/results/h200/attention.json"
    )
    options = parser.parse_args()
    cases = chosen_cases(options.only)
    names = chosen_implementations(options.implementations)
    jax_environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        # Room for torch; by itself JAX takes three quarters of the GPU at its start.
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5",
    }
    jax_command = [sys.executable, str(FOLDER / "attention_jax.py")]
    torch_command = [options.torch_python, str(FOLDER / "attention_torch.py")]
    sides = [
        Side(jax_command, names, OURS + JAX_PEERS, jax_environment),
        Side(torch_command, names, TORCH_PEERS, {}),
    ]
    try:
        results = run(sides, cases, options.budget_s, options.output)
    finally:
        for side in sides:
            side.stop()
    print(summary(results))
    return exit_status(results)


def chosen_cases(only: str | None) -> list[int]:
    """Indices of the cases whose names hold one of the terms."""
    if only is None:
        return list(range(len(CASES)))
    terms = [term.strip() for term in only.split(",")]
    for term in terms:
        if not any(term in case.name for case in CASES):
            raise SystemExit(f"--only: no case holds {term!r}: {[case.name for case in CASES]}")
    return [i for i, case in enumerate(CASES) if any(term in case.name for term in terms)]


def chosen_implementations(names: str | None) -> list[str]:
    """The implementations named, or all."""
    chosen = list(IMPLEMENTATIONS) if names is None else [x.strip() for x in names.split(",")]
    unknown = sorted(set(chosen) - set(IMPLEMENTATIONS))
    if unknown:
        raise SystemExit(f"--implementations: no {unknown}, there are {list(IMPLEMENTATIONS)}")
    return chosen


class Side:
    """A process that measures some of the implementations. One that died is started again."""

    def __init__(
        self, command: list[str], names: Iterable[str], able: Iterable[str],
        environment: dict[str, str],
    ) -> None:  # fmt: skip
        self.names = [name for name in names if name in able]
        self._command, self._environment = command, environment
        self._worker: Worker | None = None

    @property
    def is_running(self) -> bool:
        """Whether it can be asked."""
        return self._worker is not None and self._worker.is_running

    def start(self, cases: list[int], seconds: float) -> None:
        """Begins to prepare the cases, for so long; `ready` waits for the end."""
        self._worker = Worker(self._command, self._environment)
        request = {"do": "prepare", "cases": cases, "seconds": seconds}
        self._worker.send({**request, "implementations": self.names})

    def ready(self, seconds: float) -> dict:
        """What it found: versions, "missing" implementations with the reason, the cases it has."""
        found = self._worker.receive(seconds)
        self.names = [name for name in self.names if name not in found["missing"]]
        return found

    def read_peak(self) -> dict[str, float]:
        """Bytes a second that the GPU reads, by method."""
        self._worker.send({"do": "read_peak"})
        return self._worker.receive(CASE_TIMEOUT_S)

    def measure(self, index: int) -> dict[str, dict]:
        """{"us", "kernel_us"}, with JAX "once_us" too, or {"failure"} of each implementation."""
        try:
            self._worker.send({"do": "measure", "case": index})
            return self._worker.receive(CASE_TIMEOUT_S)
        except WorkerError as error:
            return {name: {"failure": str(error)} for name in self.names}

    def stop(self) -> None:
        """Ends the process."""
        if self._worker is not None:
            self._worker.stop()


def run(sides: list[Side], cases: list[int], budget_s: float, output: pathlib.Path) -> dict:
    """Prepares all sides at once, then measures case by case, a side at a time.

    The first side is JAX's, which also measures the read ceiling.
    """
    deadline = time.monotonic() + budget_s
    results = {
        "device": None, "jax": None, "source": source_hash(),
        "date": datetime.date.today().isoformat(), "read_peak_tb_s": None,
        "read_rates_tb_s": {}, "versions": {}, "missing": {}, "rows": [], "failures": [],
        "not_measured": [CASES[index].name for index in cases],
    }  # fmt: skip
    for side in sides:
        side.start(cases, budget_s / 2)
    found = sides[0].ready(budget_s)
    results |= {"device": found["device"], "jax": found["versions"]["jax"]}
    for side in sides[1:]:
        await_side(side, budget_s, results)
    rates = sides[0].read_peak()
    peak = max(rates.values())
    results["read_peak_tb_s"] = round(peak / 1e12, 4)
    results["read_rates_tb_s"] = {method: round(rate / 1e12, 4) for method, rate in rates.items()}
    for position, index in enumerate(cases):
        if time.monotonic() > deadline or index not in found["cases"]:
            break
        for side in sides:
            if side.names and not side.is_running:  # the case before this one broke it
                left = max(CASE_TIMEOUT_S, deadline - time.monotonic())
                side.start(cases[position:], left / 2)
                await_side(side, left, results)
            if side.names:
                record(results, CASES[index], side.measure(index), peak)
        results["not_measured"].remove(CASES[index].name)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
    return results


def await_side(side: Side, seconds: float, results: dict) -> None:
    """Waits until it is ready, and notes what it has; one that cannot start has nothing."""
    try:
        found = side.ready(seconds)
    except WorkerError as error:
        results["missing"] |= {name: str(error) for name in side.names}
        side.names = []
        return
    results["versions"] |= found["versions"]
    results["missing"] |= found["missing"]


def record(results: dict, case: Case, measured: dict[str, dict], peak: float) -> None:
    """Adds the rows and failures of one case, and prints them."""
    for name, found in measured.items():
        row = case.row() | {"implementation": name}
        if "failure" in found:
            results["failures"].append(row | {"reason": found["failure"]})
            print(f"{case.name:28} {name:22} FAILED {found['failure'].splitlines()[0]}")
            continue
        times = {key: round(value, 3) for key, value in found.items()}
        us, kernel_us = times["us"], times["kernel_us"]
        fraction = round(case.bytes / (kernel_us * 1e-6) / peak, 4)
        results["rows"].append(row | times | {"fraction_of_peak": fraction})
        print(f"{case.name:28} {name:22} {us:10.2f} us {kernel_us:10.2f} kernel_us {fraction:.3f}")
    sys.stdout.flush()


def exit_status(results: dict) -> int:
    """1 where ours failed or any result was wrong; a peer that cannot serve a case is no fault."""
    return int(
        any(
            failure["implementation"] in OURS or failure["reason"].startswith(WrongResult.__name__)
            for failure in results["failures"]
        )
    )


if __name__ == "__main__":
    sys.exit(main())
