"""Files of a model directory: where they may lie, and strict JSON."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jaxdecode.checkpoint.files import check_plain, parse_json, read_json, resolve_inside, shown
from jaxdecode.errors import CheckpointError, PathError

NAME = "model.safetensors"


@pytest.fixture
def directory(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / NAME).write_text("weights")
    return directory


def test_plain_file(directory):
    assert resolve_inside(directory, NAME) == directory / NAME
    check_plain(directory, "a b..safetensors")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/etc/passwd", "a/b", "./x", "x/", "a\\b", "x\0", "x\n", "\x1b[2J"],
)
def test_name_that_is_a_path(directory, name):
    for check in (check_plain, resolve_inside):
        with pytest.raises(PathError, match="is not a plain file name") as caught:
            check(directory, name)
        assert str(caught.value).isprintable()


def test_link_within_the_directory(directory):
    (directory / NAME).rename(directory / "blob")
    (directory / NAME).symlink_to("blob")
    assert resolve_inside(directory, NAME) == directory / "blob"


def test_directory_behind_a_link(directory):
    (directory.parent / "link").symlink_to(directory)
    assert resolve_inside(directory.parent / "link", NAME) == directory / NAME


@pytest.mark.parametrize("target", ["../outside", "/etc/hostname", "../model-too/file"])
def test_link_out_of_the_directory(directory, target):
    (directory.parent / "outside").write_text("")
    (directory.parent / "model-too").mkdir()
    (directory.parent / "model-too" / "file").write_text("")
    (directory / NAME).unlink()
    (directory / NAME).symlink_to(target)
    with pytest.raises(PathError, match="leads out of its directory"):
        resolve_inside(directory, NAME)


def test_link_to_itself(directory):
    (directory / NAME).unlink()
    (directory / NAME).symlink_to(NAME)
    with pytest.raises(CheckpointError, match=r"(?i)symlink loop|too many levels"):
        resolve_inside(directory, NAME)


def test_what_is_no_file(directory):
    os.mkfifo(directory / "pipe")
    (directory / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(CheckpointError, match="is not a regular file"):
            resolve_inside(directory, name)
        with pytest.raises(CheckpointError, match="is not a regular file"):
            read_json(directory / name, 100)
    with pytest.raises(CheckpointError, match="no such file or directory; download the file again"):
        resolve_inside(directory, "nothing")


def test_hugging_face_cache_links_to_its_own_blobs_only(tmp_path):
    repository = tmp_path / "models--me--tiny"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    other = tmp_path / "models--you--other" / "blobs"
    for folder in (snapshot, blobs, other):
        folder.mkdir(parents=True)
    (blobs / "1").write_text("")
    (other / "2").write_text("")
    (repository / "3").write_text("")
    (snapshot / "good").symlink_to("../../blobs/1")
    assert resolve_inside(snapshot, "good") == blobs / "1"
    for i, target in enumerate([other / "2", repository / "3"]):
        (snapshot / f"bad{i}").symlink_to(target)
        with pytest.raises(PathError, match="leads out of its directory"):
            resolve_inside(snapshot, f"bad{i}")
    # A directory that is not laid out like the cache has no such blobs.
    plain = tmp_path / "plain" / "snapshots" / "abc"
    plain.mkdir(parents=True)
    (tmp_path / "plain" / "blobs").mkdir()
    (tmp_path / "plain" / "blobs" / "1").write_text("")
    (plain / "file").symlink_to("../../blobs/1")
    with pytest.raises(PathError, match="leads out of its directory"):
        resolve_inside(plain, "file")


def test_strict_json(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, -2.5, null, {"b": "\\u00e9"}]}')
    assert read_json(path, 100) == {"a": [1, -2.5, None, {"b": "\u00e9"}]}
    with pytest.raises(CheckpointError, match=r"x.json is larger than 10 bytes"):
        read_json(path, 10)
    with pytest.raises(CheckpointError, match=r"y.json: no such file"):
        read_json(tmp_path / "y.json", 10)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "Expecting value"),
        (b"{} {}", "Extra data"),
        (b"[" * 200_000, "recursion"),
        (b'{"a": Infinity}', "Infinity is not a JSON number"),
        (b'{"a": {"b": 1, "b": 1}}', "key 'b' appears twice"),
        (b'{"a": -' + b"1" * 21 + b"}", "an integer of 22 digits"),
        (b'{"a": "\xff"}', "can't decode byte 0xff"),
        (b"3", "must hold a JSON object, found 3"),
    ],
)
def test_json_that_is_refused(data, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        parse_json(data, Path("x.json"))
    assert "x.json" in str(caught.value)


def test_shown_values_are_short_and_printable():
    assert shown("größe") == "größe"
    assert shown("\x1b[31m") == r"'\x1b[31m'"
    assert shown({"a": 1}) == "{'a': 1}"
    assert len(shown("x" * 10_000)) < 200
