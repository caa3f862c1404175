"""What benchmarks of decoding share: the clock of a run, and a results file that grows row by row.

Cases come in the order of their importance and the file is written after each, so a run that is cut
short, or that its budget ends, leaves a usable file: "left_out" says what is missing and why.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from source_hash import source_hash

from jaxdecode import bench, bench_output
from jaxdecode.errors import DeviceError
from jaxdecode.models.config import LlamaConfig
from jaxdecode.read_bandwidth import ReadCeiling

Row = dict[str, Any]

_COMPILE_THREADS = 8


class Clock:
    """The time of this run, which everything said on stderr begins with."""

    def __init__(self, budget: float):
        self._start, self._budget = time.monotonic(), budget

    def now(self) -> float:
        return time.monotonic() - self._start

    def allows(self, seconds: float) -> bool:
        """Whether so much of the budget is left."""
        return self.now() + seconds <= self._budget

    def say(self, line: str) -> None:
        print(f"[{self.now():6.1f} s] {line}", file=sys.stderr, flush=True)


class Recorder:
    """One results file.

    Attributes:
      name: for what is said.
      rows: what was measured.
      left_out: {"case", "reason"} of what was not.
      failed: how many of these failed.
    """

    def __init__(self, path: pathlib.Path, header: Row, ceiling: ReadCeiling, clock: Clock):
        """`header` begins the file and says which one it is."""
        self.name = ", ".join(map(str, header.values()))
        self.rows: list[Row] = []
        self.left_out: list[dict[str, str]] = []
        self.failed = 0
        self._path, self._header, self._ceiling, self._clock = path, header, ceiling, clock
        self._longest: dict[str, float] = {}
        self._missing: dict[str, str] = {}

    def measure(
        self, case: Any, kind: str, measured: Callable[[], list[Row]], spoken: Callable[[Row], str]
    ) -> None:
        """Adds what `measured` returns, unless it fails, time is over, or its kind is not here.

        Args:
          kind: cases of one kind take about as long, and a DeviceError stands for all of them.
          spoken: the last row in a line.
        """
        reason = self._missing.get(kind)
        if reason is None and not self._clock.allows(self._longest.get(kind, 0.0)):
            reason = "the time was over"
        if reason is not None:
            self.leave_out(case, reason)
            return
        started = self._clock.now()
        try:
            self.rows += measured()
            self._clock.say(f"{self.name}: {case}: {spoken(self.rows[-1])}")
            self.write()
        except DeviceError as error:
            self._missing[kind] = str(error)
            self.leave_out(case, str(error))
        except (RuntimeError, ValueError, TypeError) as error:
            self.failed += 1
            self.leave_out(case, f"failed: {type(error).__name__}: {error}".splitlines()[0])
        self._longest[kind] = max(self._longest.get(kind, 0.0), self._clock.now() - started)

    def leave_out(self, case: Any, reason: str) -> None:
        """Notes why the case has no row."""
        self._clock.say(f"{self.name}: {case}: left out, {reason}")
        self.left_out.append({"case": str(case), "reason": reason})
        self.write()

    def write(self) -> None:
        """Writes the file, whole or not at all."""
        content = {
            **self._header,
            "source": source_hash(),
            **bench_output.results(self._ceiling, self.rows),
            "left_out": self.left_out,
        }
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        temporary.replace(self._path)

    def close(self) -> None:
        """Says what became of the file."""
        self._clock.say(
            f"{self.name}: {self._path}, {len(self.rows)} rows, {len(self.left_out)} cases left out"
        )


class CompileAhead:
    """Compiles what is to be measured, all but the first at once, into a compilation cache.

    Called after the first was measured, so that its time is that of a cold start, and what XLA
    tuned for it serves the others. What fails here fails again, and is heard, when it is
    measured."""

    HELP = "compile many cases at once: their compile_s is that of reading a compilation cache"

    def __init__(self, dispatches: Sequence[Callable[[], bench.Dispatch]]):
        self._left = dispatches[1:]
        if self._left and jax.config.jax_compilation_cache_dir is None:
            jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            compilation_cache.reset_cache()  # or a process without one stays without

    def __call__(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(_COMPILE_THREADS) as pool:
            for dispatch in self._left:
                with contextlib.suppress(DeviceError):
                    pool.submit(dispatch().lower().compile)
        self._left = []


def spoken_speed(row: Row) -> str:
    """A row of decoding in words."""
    return (
        f"{bench_output.speed(row)} tok/s, {row['fraction_of_bound']:.1%} of the bound, "
        f"compiled in {row['compile_s']:.1f} s"
    )


def tiny(config: LlamaConfig) -> LlamaConfig:
    """A configuration of the same kind that any machine runs."""
    return dataclasses.replace(
        config, vocab_size=128, embed_dim=64, ffw_dim=128, num_layers=2, head_dim=128, bos_id=None,
        eos_ids=(),
    )  # fmt: skip
