"""What a process takes to compile the step that `jaxdecode.generate` runs, and the next one.

    python benchmarks/compile_step.py [--output FILE] [--tiny]

For each case two processes, one after the other, share a compilation cache that is empty at first.
A row is one of them: `lower_s` is tracing and lowering, the Pallas kernels included, which no cache
keeps; `compile_s` is what XLA takes, and what Mosaic takes to make machine code of the kernels;
`from_cache` says whether the program was found in the cache. Weights are random.
--tiny does it with tiny models on any machine: it tests the script.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
from runs import tiny
from source_hash import ROOT, source_hash

from jaxdecode import bench
from jaxdecode.models.config import PRESETS
from jaxdecode.models.random_model import random_model

# (preset, batch, tokens in the cache)
CASES = [
    ("codellama-34b", 1, 512),
    ("llama-3.1-8b", 1, 2048),
    ("llama-3.1-8b", 32, 2048),
    ("llama-2-7b", 1, 512),
]
PROCESSES = ("first", "next")
_FOUND = "/jax/compilation_cache/cache_hits"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the results file after each row; exit status 1 if a process failed."""
    options = parse(arguments)
    if options.case is not None:
        print(json.dumps(measured(*CASES[options.case], options)))
        return 0
    rows: list[dict[str, Any]] = []
    for index in range(len(CASES)):
        with tempfile.TemporaryDirectory() as cache:
            for process in PROCESSES:
                child = run_child(index, cache, sys.argv[1:] if arguments is None else arguments)
                if child.returncode:
                    print(f"{CASES[index]}, {process} process: {child.stderr}", file=sys.stderr)
                    return 1
                about, row = json.loads(child.stdout)
                rows.append({"process": process, **row})
                print(rows[-1], file=sys.stderr, flush=True)
                header = {"source": source_hash(), "date": datetime.date.today().isoformat()}
                write(options.output, header | about | {"rows": rows})
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=pathlib.Path, default=ROOT / "benchmarks/results/h200/compile_step.json"
    )
    parser.add_argument("--tokens", type=int, default=8, help="of a dispatch")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to test this script")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_child(
    case: int, cache: str, arguments: Sequence[str]
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """One process that measures one case, and keeps what it compiles in that folder."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, __file__, *arguments, "--case", str(case)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def measured(
    preset: str, batch: int, depth: int, options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What runs here, and the row of this process without its name."""
    config = tiny(PRESETS[preset]) if options.tiny else PRESETS[preset]
    model = random_model(config)
    timer = bench.Bench(model, preset, 1.0, options.tokens, 1)  # the bound is not asked for
    dispatch = timer.dispatch([depth] * batch)
    found: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
    start = time.perf_counter()
    lowered = dispatch.lower()
    lowering = time.perf_counter()
    lowered.compile()
    end = time.perf_counter()
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__}, {
        "model": preset, "batch": batch, "depth": depth, "tokens": options.tokens,
        "implementation": dispatch.choice.implementation, "from_cache": _FOUND in found,
        "lower_s": lowering - start, "compile_s": end - lowering,
    }  # fmt: skip


def write(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
