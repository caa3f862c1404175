"""Directories that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest
from naive_llama import random_model
from tiny_hf import assert_same_params

from jaxdecode.checkpoint import atomic, load, save
from jaxdecode.checkpoint.atomic import new_directory, write_error
from jaxdecode.checkpoint.export import export_safetensors
from jaxdecode.errors import CheckpointError


def fill(path, text="weights"):
    with new_directory(path, 10) as directory:
        assert not path.exists() or not any(path.iterdir())
        assert directory.parent == path.parent
        assert directory.name.startswith(".")
        (directory / "inner").mkdir()
        (directory / "inner" / "file").write_text(text)


def contents(path):
    return (path / "inner" / "file").read_text()


@pytest.mark.parametrize("write", [save, export_safetensors])
def test_models_go_where_the_path_leads(tmp_path, monkeypatch, write):
    """Where a link leads, `..` is beside that."""
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "inner")
    monkeypatch.chdir(tmp_path / "far" / "inner")
    monkeypatch.setenv("HOME", str(tmp_path))
    model = random_model()
    for path, place in (
        ("../beside", "far/beside"), (tmp_path / "link" / ".." / "other", "far/other"),
        ("~/home", "home"),
    ):  # fmt: skip
        write(model, path)
        assert (tmp_path / place / "config.json").is_file()
        assert_same_params(load(path)[0].params(), model.params())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far", "home", "link"]


def test_new_directory(tmp_path):
    path = tmp_path / "a" / "b"
    fill(path)
    assert contents(path) == "weights"
    assert [file.name for file in path.parent.iterdir()] == ["b"]
    # Others may read it as far as the umask lets them.
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask


def test_empty_directory_is_as_good_as_none(tmp_path):
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty")
    assert contents(tmp_path / "empty") == "weights"


def test_nothing_is_overwritten(tmp_path):
    fill(tmp_path / "old", "old")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("old", "file", "link"):
        with pytest.raises(CheckpointError, match=f"{name} exists already, .* choose another name"):
            fill(tmp_path / name)
    assert contents(tmp_path / "old") == "old"
    assert len(list(tmp_path.iterdir())) == 3


def test_directory_that_appears_meanwhile(tmp_path):
    def race():
        with new_directory(tmp_path / "x", 0) as directory:
            (directory / "mine").write_text("")
            fill(tmp_path / "x", "theirs")

    with pytest.raises(CheckpointError, match=r"could not be written: .*not empty"):
        race()
    assert contents(tmp_path / "x") == "theirs"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_disk_without_room(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * 10**9)
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: usage)
    words = r"x needs 3.50 GB, but only 2.00 GB are free there; free space or choose another"
    with pytest.raises(CheckpointError, match=words), new_directory(tmp_path / "x", 35 * 10**8):
        pass
    assert list(tmp_path.iterdir()) == []


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"could not be written: .*(directory|exists)"):
        fill(tmp_path / "file" / "x")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt("^C")])
@pytest.mark.parametrize("when", ["while filling", "while renaming"])
def test_nothing_is_left_after_an_error(tmp_path, monkeypatch, error, when):
    def fail(*arguments):
        raise error

    if when == "while renaming":
        monkeypatch.setattr(Path, "rename", fail)

    def write():
        with new_directory(tmp_path / "x", 0) as directory:
            (directory / "half").write_text("")
            if when == "while filling":
                fail()

    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    words = r"x could not be written: No space left on device|\^C"
    with pytest.raises(expected, match=words):
        write()
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_swept(tmp_path):
    """What a killed save leaves goes with the next save; what another process fills stays."""
    path = tmp_path / "x"
    with new_directory(path, 0) as hidden:
        pass
    path.rmdir()
    prefix = hidden.name[:-8]
    dead, busy, link, file = (tmp_path / f"{prefix}{word}" for word in "1234")
    other = tmp_path / prefix.replace(".x-", ".y-")
    for directory in (dead, busy, other):
        directory.mkdir()
        (directory / "half").write_text("")
    link.symlink_to(other)
    file.write_text("")
    handle = os.open(busy, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    fill(path)
    os.close(handle)
    assert not dead.exists()
    assert (busy / "half").exists()
    assert (other / "half").exists()
    assert not link.is_symlink()
    assert not file.exists()


@pytest.mark.parametrize("name", ["a b", "v[1]*?", "größe", "-n", "a" * 250])
def test_any_name(tmp_path, name):
    fill(tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_the_disks_complaint_is_found_in_a_long_message():
    message = "RESOURCE_EXHAUSTED: Error writing\nlocal file: No space left on device [a=1]\nmore"
    error = str(write_error(Path("x"), ValueError(message)))
    assert error.startswith("x could not be written: No space left on device; free space")
    assert "x could not be written: the last line;" in str(
        write_error(Path("x"), ValueError("first\nthe last line"))
    )
    assert "x could not be written: ValueError;" in str(write_error(Path("x"), ValueError()))
