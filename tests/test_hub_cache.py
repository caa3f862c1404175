"""Models in the local Hugging Face cache, by name."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from tiny_hf import TINY, write_model

from jaxdecode.checkpoint import load, open_source
from jaxdecode.checkpoint.hub_cache import is_hub_name
from jaxdecode.errors import CheckpointError, PathError

REVISION = "0123456789abcdef0123456789abcdef01234567"


def assert_refused(name, *words, error=CheckpointError):
    with pytest.raises(error) as caught:
        load(name)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "is_name"),
    [
        ("HuggingFaceTB/SmolLM2-135M", True), ("a/b", True), ("meta-llama/Llama-3.1_8B", True),
        ("a", False), ("a/b/c", False), ("../b", False), ("a/..", False), ("a/.b", False),
        ("/a", False), ("a/", False), ("~/a", False), ("a b/c", False), ("a/b\n", False),
        ("ä/b", False), ("a/" + "b" * 300, False),
    ],
)  # fmt: skip
def test_names(name, is_name):
    assert is_hub_name(name) is is_name


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face cache with me/tiny in it, laid out as its own tools do."""
    hub = tmp_path / "hub"
    repository = hub / "models--me--tiny"
    snapshot = repository / "snapshots" / REVISION
    for directory in (snapshot, repository / "blobs", repository / "refs"):
        directory.mkdir(parents=True)
    for file in write_model(tmp_path / "files").iterdir():
        blob = repository / "blobs" / f"blob-of-{file.name}"
        shutil.move(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    (repository / "refs" / "main").write_text(REVISION)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    return hub


def test_name_in_the_hugging_face_cache(hub):
    assert load("me/tiny")[0].config == TINY
    source = open_source("me/tiny")
    assert source.path == hub / "models--me--tiny" / "snapshots" / REVISION


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"])
def test_where_the_cache_is(hub, tmp_path, monkeypatch, variable):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    places = {
        "HF_HUB_CACHE": "place",
        "HF_HOME": "place/hub",
        "XDG_CACHE_HOME": "place/huggingface/hub",
        "HOME": "place/.cache/huggingface/hub",
    }
    place = tmp_path / places[variable]
    place.parent.mkdir(parents=True, exist_ok=True)
    hub.rename(place)
    monkeypatch.setenv(variable, str(tmp_path / "place"))
    assert load("me/tiny")[0].config == TINY


def test_name_that_is_not_in_the_cache(hub):
    assert_refused("me/other", "me/other: no such directory, and not in the Hugging Face cache")
    assert_refused("me/other", str(hub), "download it with `hf download me/other`")


def test_path_goes_before_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "me" / "tiny", dataclasses.replace(TINY, vocab_size=41))
    assert load("me/tiny")[0].config.vocab_size == 41


def test_revisions(hub):
    repository = hub / "models--me--tiny"
    (repository / "refs" / "main").unlink()
    assert load("me/tiny")[0].config == TINY  # there is only one
    (repository / "snapshots" / "other").mkdir()
    assert_refused("me/tiny", "holds 2 revisions and none is marked as main")
    (repository / "refs" / "main").write_text("other")
    assert_refused("me/tiny", "holds no model")
    (repository / "refs" / "main").write_text("../../../elsewhere")
    assert_refused("me/tiny", "refs/main must name a revision; found ../../../elsewhere")
    (repository / "refs" / "main").write_bytes(b"\xff")
    assert_refused("me/tiny", "holds 2 revisions")


def test_link_out_of_the_cache(hub, tmp_path):
    snapshot = hub / "models--me--tiny" / "snapshots" / REVISION
    outside = tmp_path / "outside.safetensors"
    shutil.copy(snapshot / "model.safetensors", outside)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(outside)
    assert_refused("me/tiny", "leads out of its directory", error=PathError)
