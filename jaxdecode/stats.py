"""Counting and timing one call of generate, compilation apart."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import jax


@dataclasses.dataclass(frozen=True)
class Stats:
    """Tokens and seconds of one call.

    Attributes:
      prompt_tokens, generated_tokens: over all sequences.
      prompt_seconds, generation_seconds: on the clock, without compilation. While tokens are
        generated ahead, what the host does meanwhile counts too, the reader of a stream included.
      compile_seconds: spent in calls that compiled.
    """

    prompt_tokens: int
    generated_tokens: int
    prompt_seconds: float
    generation_seconds: float
    compile_seconds: float

    @property
    def prompt_tps(self) -> float | None:
        """Prompt tokens per second; None if no time was measured."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds > 0 else None

    @property
    def generation_tps(self) -> float | None:
        """Generated tokens per second; None if no time was measured."""
        return (
            self.generated_tokens / self.generation_seconds if self.generation_seconds > 0 else None
        )


class Stopwatch:
    """Adds up the phases of a call. Compilation is what JAX reports of itself in between."""

    def __init__(self) -> None:
        self._seconds = {"prompt": 0.0, "generation": 0.0, "compile": 0.0}
        self._end = 0.0

    @contextlib.contextmanager
    def phase(self, name: str, *, since_last: bool = False) -> Iterator[None]:
        """Times a block as "prompt" or "generation"; what JAX compiles in it is counted apart. With
        `since_last`, the time from the end of the last block on belongs to it."""
        compiled = 0.0

        def on_duration(event: str, duration_secs: float, **_: str | int) -> None:
            nonlocal compiled
            if event.startswith("/jax/core/compile/"):
                compiled += duration_secs

        jax.monitoring.register_event_duration_secs_listener(on_duration)
        start = self._end if since_last else time.perf_counter()
        try:
            yield
        finally:
            self._end = time.perf_counter()
            elapsed = self._end - start
            jax.monitoring.unregister_event_duration_listener(on_duration)
            compiled = min(compiled, elapsed)
            self._seconds["compile"] += compiled
            self._seconds[name] += elapsed - compiled

    def stats(self, prompt_tokens: int, generated_tokens: int) -> Stats:
        return Stats(
            prompt_tokens=prompt_tokens,
            generated_tokens=generated_tokens,
            prompt_seconds=self._seconds["prompt"],
            generation_seconds=self._seconds["generation"],
            compile_seconds=self._seconds["compile"],
        )
