"""The command `jaxdecode` as typer sees it, and what becomes of errors.

Nothing here imports jax before a verb runs, so that help comes at once.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

import jaxdecode
from jaxdecode.cli.bench import bench
from jaxdecode.cli.chat import chat
from jaxdecode.cli.convert import convert
from jaxdecode.cli.doctor import doctor
from jaxdecode.cli.generate import generate
from jaxdecode.cli.inspect import inspect
from jaxdecode.cli.interrupts import EXIT_INTERRUPTED
from jaxdecode.cli.output import Report, say_error, write_text
from jaxdecode.cli.plan import plan
from jaxdecode.errors import DecodeError, OutOfMemoryError

EXIT_INTERNAL, EXIT_USER = 1, 2
# In the errors of JAX's collectives, on CPUs and on GPUs, when another process has gone.
_LOST_PROCESS = ("Gloo", "remote process exited")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        write_text(f"jaxdecode {jaxdecode.__version__}\n")
        raise typer.Exit()


@app.callback()
def jaxdecode_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Decode LLaMA models with JAX.

    Text goes to stdout, everything else to stderr.

    Exit codes: 1 internal error or memory that ran out, 2 mistake in the request or its files, or
    one that cannot fit, 130 interrupted.
    """


for verb in (generate, chat, bench, plan, inspect, convert, doctor):
    app.command()(verb)


def run(arguments: Sequence[str], report: Report) -> int:
    """Runs one command line and returns its exit code; errors become one line on stderr."""
    command = typer.main.get_command(app)
    with _log_to_stderr() as log:
        try:
            command.main(args=list(arguments), prog_name="jaxdecode", obj=report)
        except SystemExit as leaving:
            return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        except Exception as error:  # the last door before the user
            log.debug("traceback", exc_info=error)
            return _explain(error)
    return 0


@contextlib.contextmanager
def _log_to_stderr() -> Iterator[logging.Logger]:
    """The package's own log on stderr; -v lets debug messages through."""
    log, handler = logging.getLogger("jaxdecode"), logging.StreamHandler(sys.stderr)
    log.addHandler(handler)
    log.setLevel(logging.WARNING)
    try:
        yield log
    finally:
        log.removeHandler(handler)


def _explain(error: Exception) -> int:
    """Says what went wrong in one line and returns the exit code."""
    if isinstance(error, DecodeError):
        say_error(str(error))
        return EXIT_INTERNAL if isinstance(error, OutOfMemoryError) else EXIT_USER
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        say_error(f"{where}{error.strerror or error}")
        return EXIT_USER
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        say_error(
            f"out of memory ({error}); lower --context, or use --dtype bfloat16 or a smaller model"
        )
        return EXIT_INTERNAL
    if any(sign in str(error) for sign in _LOST_PROCESS):
        say_error("lost another process, which died or cannot be reached; its own messages say why")
        return EXIT_INTERNAL
    say_error(f"internal error: {type(error).__name__}: {error}; -v shows the traceback")
    return EXIT_INTERNAL
