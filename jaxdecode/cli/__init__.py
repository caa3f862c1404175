"""The command line: `jaxdecode VERB`. One file per verb; what they share is beside them."""

from __future__ import annotations

import os
import sys

from jaxdecode.cli.interrupts import EXIT_INTERRUPTED, watch_interrupts
from jaxdecode.cli.output import Report, accept_any_text


def main() -> int:
    """Entry point of the process; returns its exit code."""
    report = Report()
    watch_interrupts(report.last_words)
    accept_any_text()
    try:
        # Here, so that Ctrl-C is looked after from the first moment on.
        from jaxdecode.cli.app import run

        code = run(sys.argv[1:], report)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:
        report.say_last_words()
        # Without the interpreter's clean-up, which would wait for what the device still computes.
        os._exit(EXIT_INTERRUPTED)
    if report.together and report.stats is None:
        # JAX's clean-up would wait for the others, which wait for this process.
        os._exit(code)
    return code
