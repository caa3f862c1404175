"""The command as one process of several: joining the others, and which words of it are heard."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, cast

from jaxdecode.cli.output import Report
from jaxdecode.errors import RequestError
from jaxdecode.processes import Member, find_member, join

_FILTER = Path(__file__).with_name("stderr_filter.py")


def join_processes(
    report: Report, coordinator: str | None, num_processes: int | None, process_id: int | None,
    join_timeout: int, heartbeat_timeout: int,
) -> None:  # fmt: skip
    """Joins the other processes, if options or launcher say that there are any.

    From then on only process 0 writes to stdout and says more than warnings and errors.

    Raises:
      DecodeError: the options contradict each other, or the others do not come.
    """
    member = find_member(os.environ, coordinator, num_processes, process_id)
    if member is None:
        return
    report.together = True
    report.quiet |= member.process_id > 0
    _separate_stdout(member)
    if not logging.getLogger("jaxdecode").isEnabledFor(logging.DEBUG):  # -v shows all
        _filter_stderr(member)
    join(member, timeout=join_timeout, heartbeat_timeout=heartbeat_timeout)


def refuse_launcher(verb: str) -> None:
    """Refuses to run as several processes.

    Raises:
      RequestError: a launcher started more than one.
    """
    member = find_member(os.environ)
    if member is not None:
        raise RequestError(
            f"{verb} runs in one process, but the launcher started {member.num_processes}; start "
            "one, or use `jaxdecode generate`"
        )


def _separate_stdout(member: Member) -> None:
    """Leaves stdout to the text of process 0: JAX's CPU collectives write to the descriptor."""
    if member.process_id == 0:
        encoding, errors = sys.stdout.encoding, sys.stdout.errors
        sys.stdout = os.fdopen(os.dup(1), "w", encoding=encoding, errors=errors)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _filter_stderr(member: Member) -> None:
    """Lets a child read stderr, as only another process can still speak when JAX aborts this one.

    The child is out of reach of Ctrl-C and ends when the last descriptor of its pipe is closed.
    """
    command = [sys.executable, "-I", str(_FILTER), str(member.process_id)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    with cast(IO[bytes], child.stdin) as pipe:
        os.dup2(pipe.fileno(), 2)
