"""Files of a model directory, which a stranger may have made: where they lie and what they hold.

And, of those that we write, when they are safe.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from jaxdecode.errors import CheckpointError, PathError

_MAX_SHOWN = 120


def shown(value: object) -> str:
    """A value from a file, fit for an error message: one short line without control characters."""
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def check_plain(directory: Path, name: str) -> None:
    """Raise PathError unless `name` is a plain file name, which cannot lead out of `directory`."""
    if name != Path(name).name or name in ("", "..") or "\\" in name or not name.isprintable():
        raise PathError(
            f"{directory}: {shown(repr(name))} is not a plain file name; a model's files lie side "
            "by side in its directory, so download the model again"
        )


def resolve_inside(directory: Path, name: str) -> Path:
    """The real path of the file `name` of a model directory.

    A link may lead elsewhere in the directory, or, from a snapshot of the Hugging Face cache, to
    the blobs of the same repository, which is how that cache stores every file.

    Raises:
      PathError: `name` is not a plain file name, or leads out of the directory.
      CheckpointError: there is no such file, or it is not a regular file.
    """
    check_plain(directory, name)
    path = directory / name
    try:
        real, real_directory = path.resolve(strict=True), directory.resolve(strict=True)
        regular = stat.S_ISREG(real.stat().st_mode)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise CheckpointError(f"{path}: {_reason(error)}; download the file again") from None
    if not any(real.is_relative_to(root) for root in _roots(real_directory)):
        raise PathError(
            f"{path} leads out of its directory, to {real}; put the file itself there, or load the "
            "directory that holds it"
        )
    if not regular:
        raise CheckpointError(f"{path} is not a regular file; download the file again")
    return real


def _roots(directory: Path) -> tuple[Path, ...]:
    """Where the files of a model directory may lie: see `resolve_inside`."""
    snapshots = directory.parent
    if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
        return directory, snapshots.parent / "blobs"
    return (directory,)


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """The object in a JSON file, read strictly.

    Raises:
      CheckpointError: the file is missing, larger than `max_bytes`, or not what `parse_json` takes.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: {_reason(error)}") from None
    if len(data) > max_bytes:
        raise CheckpointError(
            f"{path} is larger than {max_bytes} bytes, the most such a file may have"
        )
    if data.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer; run `git lfs pull` to fetch the file")
    return parse_json(data, path)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """The object in some JSON found in `path`.

    Raises:
      CheckpointError: it is not UTF-8, not valid JSON (NaN, repeated keys and integers beyond 64
        bits are not), nested too deep, or not an object.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_int=_integer,
            parse_constant=_refuse_constant,
            object_pairs_hook=_object,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} does not hold valid JSON: {shown(str(error))}; download the file again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object, found {shown(value)}; download the file again"
        )
    return value


def sync(path: Path) -> None:
    """Waits until a file, or the list of a directory's files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} appears twice")
        result[key] = value
    return result


def _reason(error: Exception) -> str:
    """What the system says of a file, without the path, which the message names anyway."""
    return (getattr(error, "strerror", None) or str(error)).lower()
