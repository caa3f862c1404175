"""What is left of stderr when JAX gives up, on what it writes in two of its versions."""

from __future__ import annotations

import io

import pytest

from jaxdecode.cli.stderr_filter import pass_on

TRACE = """*** Check failure stack trace: ***
    @     0x7fe1bec40634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
    @     0x7fe1c60a71f5  (unknown)
"""
GIVES_UP = (
    "F1122 17:33:07.167451    1434 client.h:80] Terminating process because the JAX distributed "
    "service detected fatal errors. This most likely indicates that another task died; see the "
    "other task logs for more details. absl::Status: "
)
SILENT = """UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
{}
The tasks have crashed. Check the task logs for an earlier error.
"""
RPC = """
RPC: /xla.coordination.CoordinationService/PollForError [type.googleapis.com/x='']
"""
LOCATION = """=== Source Location Trace: ===
external/xla+/xla/pjrt/distributed/coordination/coordination_service.cc:232

"""
NOISE = (
    "E1122 17:33:07.165963    1416 coordination_service.cc:1549] [1921] Use error polling to "
    "propagate the following error to all tasks: " + SILENT.format(1)
)
POLLED = (
    "E1122 17:33:07.166544    1434 coordination_service_agent.cc:289] Polled an error from "
    "coordination service (this can be an error from this or another task).\n"
)
NO_ANSWER = (
    "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted"
    "\nAdditional GRPC error information from remote target coordination_service:\n:UNKNOWN:x\n"
)
OTHER = "W1122 17:33:06.000000    1416 cuda_driver.cc:1] something\nof two lines\n"


def lost(who):
    return (
        f"error: process 2: lost process {who}, which died or cannot be reached; "
        "its own messages say why\n"
    )


CASES = {
    "nothing": ("", ""),
    "others' words": (f"device: cpu\n{OTHER}seed: 1\n", f"device: cpu\n{OTHER}seed: 1\n"),
    "silent process": (NOISE + POLLED + GIVES_UP + SILENT.format(1) + RPC + TRACE, lost("1")),
    "newer": (
        NOISE + LOCATION + POLLED + GIVES_UP + SILENT.format(1) + RPC + LOCATION + TRACE,
        lost("1"),
    ),
    "several silent": (GIVES_UP + SILENT.format("1\n3") + TRACE, lost("1, 3")),
    "no coordinator": (POLLED + GIVES_UP + NO_ANSWER + TRACE, lost("0")),
    "between others": (OTHER + GIVES_UP + NO_ANSWER + NOISE + TRACE + OTHER, OTHER + lost("0")),
    "another reason": (
        GIVES_UP + "ABORTED: 1 unexpectedly tried to connect.\n" + RPC + TRACE,
        "error: process 2: the processes lost each other: ABORTED: 1 unexpectedly tried to "
        "connect.\n",
    ),
    "cut short": (GIVES_UP + "ABORTED: x", "error: process 2: the processes lost each other: "
    "ABORTED: x\n"),
    "own error first": (
        NOISE + "error: out of memory\n" + POLLED + GIVES_UP + NO_ANSWER + TRACE,
        "error: process 2: out of memory\n",
    ),
    "warning after noise": (NOISE + "warning: a\nb\n", "warning: a\nb\n"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_passes(case):
    written, expected = CASES[case]
    target = io.BytesIO()
    pass_on(io.BytesIO(written.encode()), target, b"2")
    assert target.getvalue().decode() == expected
