"""A process that measures, and the side that asks it: one JSON object a line, both ways.

JAX and torch both count kernels through CUPTI, which serves one of them in a process, so each has
a process of its own. The asking side takes turns, so that they never measure at the same time.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

LAST_WORDS_S = 10.0
KEPT_LINES = 20  # of what a worker says on stderr, to explain its end


class WorkerError(Exception):
    """The process ended, did not answer in time, or failed at what it was asked."""


class Worker:
    """Starts `command` and asks it one thing at a time."""

    def __init__(self, command: list[str], environment: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=None if environment is None else {**os.environ, **environment},
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._said: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._read, self._listen)
        ]
        for thread in self._threads:
            thread.start()

    def send(self, request: dict) -> None:
        """Sends a request; its answer comes from `receive`."""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            self.stop()
            raise WorkerError(self._explain("ended")) from error

    def receive(self, timeout_s: float) -> Any:
        """The answer to the last request. A worker that gives none is stopped: it may hang."""
        try:
            answer = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            self.stop()
            raise WorkerError(self._explain(f"gave no answer in {timeout_s:.0f} s")) from None
        if answer is None:
            # Its pipe closes before it says why it ends.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(LAST_WORDS_S)
            self.stop()
            raise WorkerError(self._explain("ended"))
        found = json.loads(answer)
        if "failure" in found:
            raise WorkerError(found["failure"])
        return found["answer"]

    @property
    def is_running(self) -> bool:
        """Whether it can be asked again."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Ends the process; no harm if it has ended already."""
        self._process.kill()
        self._process.wait()
        for thread in self._threads:
            thread.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            pipe.close()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _listen(self) -> None:
        for line in self._process.stderr:
            self._said.append(line.rstrip())
            print(line, end="", file=sys.stderr)

    def _explain(self, what: str) -> str:
        return "\n".join([f"the process {what}; the last it said:", *self._said])


def attempt(measure: Callable[[], dict]) -> dict:
    """What `measure` returns, or {"failure": why it returned nothing}."""
    try:
        return measure()
    except Exception as error:  # noqa: BLE001  whatever an implementation raises is its result
        return {"failure": describe(error)}


def describe(error: Exception) -> str:
    """The type and the first lines of the message."""
    return f"{type(error).__name__}: {error}"[:500]


def serve(answer: Callable[[dict], Any]) -> None:
    """Answers requests until there are no more. What libraries print goes to stderr."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        request = json.loads(line)
        reply = attempt(lambda request=request: {"answer": answer(request)})
        print(json.dumps(reply), file=channel, flush=True)
