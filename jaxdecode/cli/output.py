"""What the verbs print: answers to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, TextIO

from jaxdecode.units import readable_bytes

if TYPE_CHECKING:
    import jax

    from jaxdecode.plan import Plan
    from jaxdecode.stats import Stats

OnProgress = Callable[[str, int, int], None]

# A model, a file name or a tensor name must not steer the terminal that shows it.
_CONTROL = dict.fromkeys((*range(32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")
_CONTROL_IN_TEXT = {c: mark for c, mark in _CONTROL.items() if chr(c) not in "\n\t"}


@dataclasses.dataclass
class Report:
    """What stderr says about one run of the command.

    Attributes:
      quiet: only warnings and errors are said.
      device: where the model runs, once chosen.
      plan: of the memory that the run takes, once its size is known.
      prompt_tokens, generated_tokens: of the running generation, so far.
      generating_since: when its first token came (time.monotonic), None before.
      stats: of the last generation, None while one is running.
      together: whether this is one process of several.
    """

    quiet: bool = False
    device: jax.Device | None = None
    plan: Plan | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0
    generating_since: float | None = None
    stats: Stats | None = None
    together: bool = False

    def start(self, prompt_tokens: int) -> None:
        """A generation begins."""
        self.prompt_tokens, self.generated_tokens = prompt_tokens, 0
        self.generating_since = self.stats = None

    def count_token(self) -> None:
        """One more token was generated."""
        self.generated_tokens += 1
        self.generating_since = self.generating_since or time.monotonic()

    def say(self, line: str) -> None:
        """One line on stderr, unless quiet."""
        if not self.quiet:
            _write(sys.stderr, one_line(line) + "\n")

    def footer(self) -> str:
        """Speeds, compilation apart, and memory, in one line."""
        memory = f"peak memory: {readable_bytes(peak_memory(self.device))}"
        if self.stats is None:
            return f"{self._so_far()} | {memory}"
        prompt = f"prompt: {self.stats.prompt_tokens} tokens, {_rate(self.stats.prompt_tps)}"
        made = f"{self.stats.generated_tokens} tokens, {_rate(self.stats.generation_tps)}"
        compiling = f"compile: {self.stats.compile_seconds:.2f} s"
        return f"{prompt} | generation: {made} | {compiling} | {memory}"

    def _so_far(self) -> str:
        made = f"prompt: {self.prompt_tokens} tokens | generation: {self.generated_tokens} tokens"
        if self.generating_since is None:
            return made
        seconds = time.monotonic() - self.generating_since
        return f"{made}, {_rate(self.generated_tokens / seconds if seconds > 0 else None)}"

    def last_words(self) -> str:
        """What is left to say when the run is interrupted."""
        return "" if self.quiet else f"\n{self.footer()}\ninterrupted\n"

    def say_last_words(self) -> None:
        """The same, said."""
        _write(sys.stderr, self.last_words())


def _rate(tokens_per_second: float | None) -> str:
    if tokens_per_second is None or not math.isfinite(tokens_per_second):
        return "n/a tok/s"
    return f"{tokens_per_second:.1f} tok/s"


def peak_memory(device: jax.Device | None) -> int:
    """Bytes: the device's own count where it keeps one, else this process's resident set."""
    counts = device.memory_stats() if device is not None else None
    if counts and "peak_bytes_in_use" in counts:
        return counts["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def accept_any_text() -> None:
    """Lets stdout show what its encoding lacks as question marks: that is no reason to end."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def write_text(text: str) -> None:
    """Writes a piece of the answer to stdout at once; ends the run if nobody reads any more."""
    if not _write(sys.stdout, text.translate(_CONTROL_IN_TEXT) if sys.stdout.isatty() else text):
        raise SystemExit(0)


def write_json(answer: dict[str, Any]) -> None:
    """Writes the answer as one JSON object on one line; numbers that are not finite become null."""
    escapes = not (sys.stdout.encoding or "").lower().startswith("utf")
    write_text(json.dumps(_finite(answer), ensure_ascii=escapes, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def one_line(text: str) -> str:
    """Text from anywhere, fit for one line of a terminal."""
    return " ".join(text.splitlines()).translate(_CONTROL)


def say_error(message: str) -> None:
    """One line on stderr, said even if quiet."""
    _write(sys.stderr, f"error: {one_line(message)}\n")


def say_warning(message: str) -> None:
    """One line on stderr, said even if quiet."""
    _write(sys.stderr, f"warning: {one_line(message)}\n")


def _write(stream: TextIO, text: str) -> bool:
    """Writes at once; False if nobody reads any more."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        # What is still buffered must have somewhere to go when the interpreter flushes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True


@contextlib.contextmanager
def progress_bars(report: Report, unit: Literal["bytes", "tokens"]) -> Iterator[OnProgress]:
    """Gives `on_progress(what, done, total)`, which draws one bar per `what` on a terminal."""
    if report.quiet or not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    count: ProgressColumn = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        count,
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def on_progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield on_progress
