"""Ctrl-C that works while the main thread is inside native code.

Python delivers KeyboardInterrupt between two of its own instructions, so a long compilation would
delay it by as long as it takes. The C-level handler writes to a pipe at once; a thread reads it and
ends the process when the main thread has not done so in time, or at the second Ctrl-C.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable

EXIT_INTERRUPTED = 130
# Progress bars hide it.
_SHOW_CURSOR = b"\x1b[?25h"


def watch_interrupts(last_words: Callable[[], str], grace: float = 1.5) -> None:
    """Bounds the time from Ctrl-C to the end of the process; call once, from the main thread.

    Args:
      last_words: text for stderr when the main thread did not end by itself.
      grace: seconds that the main thread has for that.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(read_end, last_words, grace), daemon=True)
    watcher.start()


def _watch(read_end: int, last_words: Callable[[], str], grace: float) -> None:
    _wait_for_interrupt(read_end, None)
    again = _wait_for_interrupt(read_end, grace)
    # Written past sys.stderr, whose lock the main thread may hold.
    if os.isatty(2):
        os.write(2, _SHOW_CURSOR)
    if not again:
        os.write(2, last_words().encode("utf-8", "replace"))
    os._exit(EXIT_INTERRUPTED)


def _wait_for_interrupt(read_end: int, seconds: float | None) -> bool:
    """Reads signal numbers until a SIGINT (True) or until the time is over (False)."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([read_end], [], [], left)[0]:
            return False
        if os.read(read_end, 1)[0] == signal.SIGINT:
            return True
