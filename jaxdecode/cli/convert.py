"""`jaxdecode convert`: any model to Hugging Face safetensors or to Orbax."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from jaxdecode.cli import options
from jaxdecode.cli.output import OnProgress, Report, progress_bars
from jaxdecode.errors import RequestError

if TYPE_CHECKING:
    from jaxdecode.checkpoint import WeightSource

SourceArgument = Annotated[
    str, typer.Argument(metavar="PATH|NAME", help="The model, as -m of generate takes it.")
]
TargetArgument = Annotated[Path, typer.Argument(metavar="DIRECTORY", help="The directory to make.")]
Format = Annotated[
    Literal["safetensors", "orbax"],
    typer.Option("--format", help="Hugging Face's safetensors, or Orbax."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the model that DIRECTORY holds.")]


def convert(
    context: typer.Context,
    source: SourceArgument,
    target: TargetArgument,
    form: Format = "safetensors",
    dtype: options.Dtype = None,
    force: Force = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write a model again in another format or another type."""
    from jaxdecode.cli import runtime

    report: Report = context.obj
    report.quiet = quiet
    check_target(target, force)
    runtime.select_device("cpu")
    opened = runtime.open_model(report, source)
    try:
        with (
            replacing(target, opened.path) as directory,
            progress_bars(report, "bytes") as on_progress,
        ):
            write = write_orbax if form == "orbax" else write_safetensors
            write(opened, directory, dtype, on_progress)
    finally:
        opened.close()
    report.say(f"wrote {target}")


def check_target(target: Path, force: bool) -> None:
    """Raises RequestError if `target` holds something that must not be replaced."""
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise RequestError(
            f"{target} exists already; choose another directory, or replace it with --force"
        )
    if target.is_symlink() or not (target / "config.json").is_file():
        raise RequestError(
            f"{target} is not a model directory (it has no config.json), so --force does not "
            "replace it; delete it yourself or choose another directory"
        )


@contextlib.contextmanager
def replacing(target: Path, source: Path) -> Iterator[Path]:
    """The directory to write: `target` itself, or one beside it that takes its place at the end.

    Raises:
      RequestError: `source` is inside of what would be replaced.
    """
    if not target.exists() or not any(target.iterdir()):
        yield target
        return
    if source.resolve().is_relative_to(target.resolve()):
        raise RequestError(
            f"{target} holds the model that is being converted; choose another directory"
        )
    place = target.resolve()
    fresh, old = (
        place.with_name(f".{place.name}.{word}-{secrets.token_hex(4)}") for word in ("new", "old")
    )
    try:
        yield fresh
        place.rename(old)
        fresh.rename(place)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def write_safetensors(
    source: WeightSource, directory: Path, dtype: str | None, on_progress: OnProgress
) -> None:
    """Block by block from file to file."""
    from jaxdecode.checkpoint import export_safetensors

    export_safetensors(source, directory, dtype=dtype, on_progress=on_progress)


def write_orbax(
    source: WeightSource, directory: Path, dtype: str | None, on_progress: OnProgress
) -> None:
    """Through a model in memory, which is what Orbax saves."""
    from jaxdecode.checkpoint import save
    from jaxdecode.checkpoint.loading import load_params
    from jaxdecode.models.llama import Llama

    dtype = dtype or ("bfloat16" if source.quantised else source.config.dtype)
    params = load_params(source, dtype, on_progress=on_progress)
    save(Llama.from_params(source.config, params), directory, source.tokenizer())
