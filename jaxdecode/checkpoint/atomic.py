"""Directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

from jaxdecode.checkpoint.files import shown, sync
from jaxdecode.errors import CheckpointError

# What ends a write on a full or closed disk, by the words that every library passes on.
_DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
)  # fmt: skip


@contextlib.contextmanager
def new_directory(path: Path, num_bytes: int, hidden: Path | None = None) -> Iterator[Path]:
    """A directory to fill, which takes the name `path` once the block ends without an error.

    It is filled under a hidden name beside `path` and renamed when all of it is on the disk. After
    an error nothing is left; after a kill the hidden directory is, until the next save to `path`.

    Args:
      path: must not exist, or be an empty directory.
      num_bytes: about what will be written; checked against the free space first.
      hidden: one of `hidden_directory`; None: any.

    Raises:
      CheckpointError: `path` exists, or the disk is full or not writable.
    """
    parent = path.parent
    temporary = hidden or hidden_directory(path, secrets.randbits(32))
    try:
        _check_free(path)
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent, _hidden_prefix(path.name))
        _check_space(path, num_bytes)
        temporary.mkdir()
    except OSError as error:
        raise write_error(path, error) from None
    lock = os.open(temporary, os.O_RDONLY)
    try:
        _lock(lock)
        yield temporary
        _flush(temporary)
        temporary.rename(path)
        sync(parent)
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


def hidden_directory(path: Path, number: int) -> Path:
    """Where `path` is filled: a name that differs by path and by number, of 32 bits."""
    return path.with_name(f"{_hidden_prefix(path.name)}{number:08x}")


def whole_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path, `~` and `..` of its folders followed as the file system does.

    What libraries make of `..` differs: the text is shortened, which a link on the way makes
    another place, or the path is refused.
    """
    path = Path(os.path.expanduser(path)).absolute()  # noqa: PTH111  # Path's raises without a home
    return Path(os.path.realpath(path.parent)) / path.name


def write_error(path: Path, error: BaseException) -> CheckpointError:
    """The error for a failed write to `path`; finds the disk's complaint in a library's message."""
    text = str(error)
    reasons = [os.strerror(code) for code in _DISK_ERRORS if os.strerror(code) in text]
    lines = text.strip().splitlines() or [type(error).__name__]
    return CheckpointError(
        f"{path} could not be written: {reasons[0] if reasons else shown(lines[-1])}; free space "
        "or choose another place. Nothing was left under that name"
    )


def _check_free(path: Path) -> None:
    if path.is_symlink() or path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise CheckpointError(
            f"{path} exists already, and a model is never overwritten; delete it or choose another "
            "name"
        )


def _check_space(path: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        raise CheckpointError(
            f"{path} needs {num_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free there; "
            "free space or choose another place"
        )


def _hidden_prefix(name: str) -> str:
    # Orbax takes its path for a pattern, so nothing but plain characters may be in it.
    plain = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)
    return f".{plain[:60]}-{zlib.crc32(os.fsencode(name)):08x}.incomplete-"


def _sweep(parent: Path, prefix: str) -> None:
    """Delete what killed saves left: their locks went with them."""
    for leftover in parent.iterdir():
        if not leftover.name.startswith(prefix):
            continue
        if leftover.is_symlink() or not leftover.is_dir():
            leftover.unlink(missing_ok=True)
            continue
        handle = os.open(leftover, os.O_RDONLY)
        with contextlib.suppress(OSError):  # another process is still filling it
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)
        os.close(handle)


def _lock(handle: int) -> None:
    # Some network file systems have no locks; then leftovers stay, and nothing else changes.
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _flush(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))
