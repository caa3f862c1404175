"""Child process: passes stderr on, with one line in place of what JAX says when it gives up.

When one of several processes is lost, JAX ends the others from a thread of its own: log lines, a
stack trace, and abort(). Python cannot catch that, so this process, which outlives the one that
started it, reads its stderr and says the same in one line. Run as a script, with the process's
number as argument; it imports nothing of the package.
"""

from __future__ import annotations

import re
import sys
from typing import BinaryIO

# How a record of native code begins: severity and date, time, thread, file and line.
_RECORD = re.compile(rb"[IWEF]\d{4} [\d:.]+ +\d+ ([\w.]+):\d+\] ")
# Of these, the last says it all.
_RUNTIME = (
    b"coordination_service.cc", b"coordination_service_agent.cc", b"preemption_sync_manager.cc",
)  # fmt: skip
_ERROR = b"error: "
_GIVES_UP = b"Terminating process because the JAX distributed service detected fatal errors"


def pass_on(source: BinaryIO, target: BinaryIO, process_id: bytes) -> None:
    """Copies lines until one says why the process ends; what comes after that is noise."""
    hidden = False
    for line in source:
        record = _RECORD.match(line)
        if _GIVES_UP in line:
            line, record = _ERROR + _explain(line + _rest_of_record(source)), None
        if line.startswith(_ERROR):
            target.write(b"error: process %s: %s" % (process_id, line.removeprefix(_ERROR)))
            break
        if record or line.startswith(b"warning: "):
            hidden = record is not None and record[1] in _RUNTIME
        if not hidden:
            target.write(line)
            target.flush()
    target.flush()
    for _ in source:
        pass


def _rest_of_record(source: BinaryIO) -> bytes:
    """The lines up to the stack trace or the next record."""
    lines = []
    for line in source:
        if line.startswith(b"***") or _RECORD.match(line):
            break
        lines.append(line)
    return b"".join(lines)


def _explain(record: bytes) -> bytes:
    """Why JAX gave up, as a line."""
    silent = re.search(rb"stopped sending heartbeats\):\s*(.*?)\s*The tasks", record, re.DOTALL)
    if silent:
        gone = b", ".join(silent[1].split())
    elif b"Failed to send RPC to coordination service" in record:
        gone = b"0"
    else:
        status = record.partition(b"absl::Status: ")[2].partition(b"\n")[0]
        return b"the processes lost each other: %s\n" % status
    return b"lost process %s, which died or cannot be reached; its own messages say why\n" % gone


if __name__ == "__main__":
    pass_on(sys.stdin.buffer, sys.stderr.buffer, sys.argv[1].encode())
