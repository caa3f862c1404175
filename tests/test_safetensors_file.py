"""Damaged and hostile safetensors files, and indexes that point where they should not."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny_hf import PEAK_MEMORY, bits, hf_tensors, read_index, write_index, write_model

from jaxdecode.checkpoint import safetensors_file
from jaxdecode.checkpoint.hf_directory import open_hf_directory
from jaxdecode.checkpoint.safetensors_file import SafetensorsFile, open_safetensors
from jaxdecode.checkpoint.source import TensorInfo
from jaxdecode.errors import CheckpointError, PathError

TENSORS = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]},
}
DATA = np.arange(6, dtype=np.float32).tobytes()


def file_bytes(header, data=DATA):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def changed(name, **changes):
    return TENSORS | {name: TENSORS[name] | changes}


WHOLE = file_bytes(TENSORS)
DAMAGED = {
    "empty": (b"", "has 0 bytes, too few"),
    "five bytes": (b"\1\0\0\0\0", "has 5 bytes, too few"),
    "cut in the header": (WHOLE[:30], "its header claims"),
    "cut in the data": (WHOLE[:-1], "is damaged"),
    "header of 2^62 bytes": (struct.pack("<Q", 1 << 62) + WHOLE[8:], f"claims {1 << 62} bytes"),
    "header of 2^64 - 1 bytes": (b"\xff" * 8 + WHOLE[8:], "its header claims"),
    "no UTF-8": (file_bytes(b'{"\xff\xfe": 1}'), "does not hold valid JSON: 'utf-8' codec"),
    "no JSON": (file_bytes(b"{" * 50), "does not hold valid JSON"),
    "nested deep": (file_bytes(b'{"a":' + b"[" * 100_000), "does not hold valid JSON"),
    "an array": (file_bytes(b"[]"), "must hold a JSON object"),
    "overlap": (file_bytes(changed("b", data_offsets=[8, 16])), "is damaged"),
    "hole": (file_bytes(changed("b", data_offsets=[20, 28]), DATA + bytes(4)), "is damaged"),
    "negative offset": (file_bytes(changed("a", data_offsets=[-16, 0])), "is damaged"),
    "offsets reversed": (file_bytes(changed("a", data_offsets=[16, 0])), "is damaged"),
    "offset past the end": (file_bytes(changed("b", data_offsets=[16, 2**40])), "is damaged"),
    "shape and bytes differ": (file_bytes(changed("a", shape=[3, 2])), "is damaged"),
    "shape overflows": (file_bytes(changed("a", shape=[2**40, 2**40])), "is damaged"),
    "negative size": (file_bytes(changed("a", shape=[-2, -2])), "is damaged"),
    "unknown dtype": (file_bytes(changed("a", dtype="F99")), "is damaged"),
    "key twice": (
        file_bytes(json.dumps(TENSORS)[:-1].encode() + b"," + json.dumps(TENSORS)[1:].encode()),
        "key 'a' appears twice",
    ),
    "key twice, with another shape": (
        file_bytes(b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},'
                   + json.dumps(TENSORS)[1:].encode()),
        "key 'a' appears twice",
    ),
    "trailing bytes": (WHOLE + b"!", "is damaged"),
    "header too large": (
        file_bytes(json.dumps(TENSORS).encode() + b" " * (3 << 20)),
        "the most allowed are 2097152",
    ),
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 269060552\n",
        "is a Git LFS pointer; run `git lfs pull`",
    ),
    "web page": (b"<!DOCTYPE html><html><body>Entry not found</body></html>", "is a web page"),
    "bare web page": (b"\n<html><title>Sign in</title></html>", "is a web page"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document"),
    "PyTorch file": (b"PK\3\4" + bytes(100), "is a zip or PyTorch file; convert"),
    "pickle": (b"\x80\x04\x95" + bytes(100), "is a Python pickle; convert it"),
    "GGUF": (b"GGUF" + bytes(100), "is a GGUF file"),
}  # fmt: skip


def write(path, data):
    path.write_bytes(data)
    return path


def test_whole_file(tmp_path):
    file = SafetensorsFile(write(tmp_path / "model.safetensors", WHOLE))
    assert file.tensors == {
        "a": TensorInfo((2, 2), "float32", 16),
        "b": TensorInfo((2,), "float32", 8),
    }
    piece = file.read("a", (slice(1, 2), slice(0, 1)))
    np.testing.assert_array_equal(piece, [[2.0]])
    file.close()


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file(tmp_path, name):
    data, words = DAMAGED[name]
    path = write(tmp_path / "model.safetensors", data)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=words) as caught:
        SafetensorsFile(path)
    assert time.perf_counter() - start < 1
    message = str(caught.value)
    assert "model.safetensors" in message
    assert message.isprintable()
    assert len(message) < 500


def test_damaged_files_take_no_memory(tmp_path, project_root):
    for i, (data, _) in enumerate(DAMAGED.values()):
        write(tmp_path / f"{i}.safetensors", data)
    code = """
from jaxdecode.checkpoint.safetensors_file import SafetensorsFile
from jaxdecode.errors import CheckpointError
before = peak_memory()
count = 0
for path in pathlib.Path(sys.argv[1]).iterdir():
    try:
        SafetensorsFile(path)
    except CheckpointError:
        count += 1
print(count, peak_memory() - before)
"""
    command = [sys.executable, "-c", PEAK_MEMORY + code, str(tmp_path)]
    result = subprocess.run(command, cwd=project_root, capture_output=True, text=True, check=True)
    count, grown = map(int, result.stdout.split())
    assert count == len(DAMAGED)
    assert grown < 50e6


@settings(max_examples=300)
@given(
    where=st.integers(0, len(WHOLE) - 1),
    bytes_=st.binary(min_size=1, max_size=4),
    cut=st.integers(0, 8),
)
def test_random_damage_is_noticed_or_harmless(tmp_path_factory, where, bytes_, cut):
    data = WHOLE[:where] + bytes_ + WHOLE[where + len(bytes_) :]
    path = write(tmp_path_factory.getbasetemp() / "damaged.safetensors", data[: len(data) - cut])
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    # What is accepted describes the bytes that are there, no more and no fewer.
    assert sum(info.num_bytes for info in file.tensors.values()) == len(DATA)
    for name, info in file.tensors.items():
        if info.dtype_name == "float32":
            piece = file.read(name, tuple(slice(0, size) for size in info.shape))
            assert piece.tobytes() in data


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        SafetensorsFile(tmp_path / "model.safetensors")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_slices_of_every_dtype(tmp_path, monkeypatch, dtype):
    # The mapping is renewed over and over, which must not be visible.
    monkeypatch.setattr(safetensors_file, "_REMAP_BYTES", 10)
    array = np.arange(60, dtype=np.float32).reshape(10, 6).astype(dtype)
    save_file({"x": array}, tmp_path / "model.safetensors")
    file = SafetensorsFile(tmp_path / "model.safetensors")
    for index in [
        (slice(0, 10), slice(0, 6)), (slice(3, 7), slice(0, 6)), (slice(0, 10), slice(2, 5)),
        (slice(9, 10), slice(5, 6)), (slice(4, 4), slice(0, 6)),
    ]:  # fmt: skip
        piece = file.read("x", index)
        assert piece.dtype == dtype
        np.testing.assert_array_equal(bits(piece), bits(array[index]))
    assert file.tensors["x"].dtype_name == np.dtype(dtype).name
    with pytest.raises(CheckpointError, match="tensor y cannot be read"):
        file.read("y", (slice(0, 1),))


def test_file_that_goes_away_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "_REMAP_BYTES", 0)
    path = write(tmp_path / "model.safetensors", WHOLE)
    file = SafetensorsFile(path)
    file.read("b", (slice(0, 2),))
    path.unlink()
    with pytest.raises(CheckpointError, match="is damaged: No such file"):
        file.read("b", (slice(0, 2),))


@pytest.fixture
def sharded(tmp_path):
    return write_model(tmp_path / "model", shards=3)


def assert_refused(directory, words, error=CheckpointError):
    with pytest.raises(error, match=words) as caught:
        open_safetensors(directory)
    assert str(directory) in str(caught.value)


def test_sharded_model(sharded):
    files = open_safetensors(sharded)
    assert sorted(files) == sorted(hf_tensors())
    assert len({file.path for file in files.values()}) == 3


def test_lone_file_under_any_name(tmp_path):
    directory = write_model(tmp_path)
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    assert sorted(open_safetensors(directory)) == sorted(hf_tensors())


def test_other_files_beside_the_model_are_left_alone(tmp_path, sharded):
    for directory in (write_model(tmp_path / "one"), sharded):
        write(directory / "consolidated.safetensors", b"not even safetensors")
        assert sorted(open_safetensors(directory)) == sorted(hf_tensors())


@pytest.fixture(scope="module")
def audited():
    """The list to which opened paths are added, where it is not None. Hooks cannot be removed."""
    record = {"opened": None}

    def hook(event, arguments):
        if record["opened"] is not None and event == "open":
            record["opened"].append(os.fsdecode(arguments[0]) if arguments[0] else "")

    sys.addaudithook(hook)
    return record


@pytest.fixture
def opened_paths(monkeypatch, audited):
    """opened_paths() gives the list of what is opened meanwhile, in Python or by safetensors."""

    def recording_safe_open(path, **keywords):
        if audited["opened"] is not None:
            audited["opened"].append(os.fspath(path))
        return safe_open(path, **keywords)

    safe_open = safetensors_file.safe_open
    monkeypatch.setattr(safetensors_file, "safe_open", recording_safe_open)

    @contextlib.contextmanager
    def record():
        audited["opened"] = []
        try:
            yield audited["opened"]
        finally:
            audited["opened"] = None

    return record


OUTSIDE = [
    "../outside.safetensors", "/etc/passwd", "/etc/passwd.safetensors", "..", ".", "",
    "a/b.safetensors", "a\\b.safetensors", "./model-00001-of-00003.safetensors",
    "\x00.safetensors", "x\n.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_index_that_names_a_path(sharded, opened_paths, name):
    save_file({"x": np.zeros(1, np.float32)}, sharded.parent / "outside.safetensors")
    weight_map = read_index(sharded)
    weight_map["model.norm.weight"] = name
    write_index(sharded, weight_map)
    with pytest.raises(CheckpointError), opened_paths() as opened:
        open_hf_directory(sharded)
    assert opened
    assert all(path.startswith(f"{sharded}{os.sep}") for path in opened)


def test_index_that_leaves_the_directory(sharded):
    weight_map = read_index(sharded)
    for name in ("../x.safetensors", "/etc/x.safetensors", "a\\x.safetensors"):
        write_index(sharded, weight_map | {"model.norm.weight": name})
        assert_refused(sharded, "is not a plain file name", PathError)


def test_the_record_of_opened_paths_notices(tmp_path, sharded, opened_paths):
    other = write(tmp_path / "other", b"")
    with opened_paths() as opened:
        open_hf_directory(sharded).close()
        other.read_bytes()
    assert str(other) in opened
    for name in ("config.json", "model.safetensors.index.json", *set(read_index(sharded).values())):
        assert str(sharded / name) in opened


@pytest.mark.parametrize(
    "name", ["model-00002-of-00003.safetensors", "model.safetensors.index.json"]
)
def test_link_out_of_the_directory(sharded, opened_paths, name):
    outside = sharded.parent / name
    (sharded / name).rename(outside)
    (sharded / name).symlink_to(outside)
    with pytest.raises(PathError, match="leads out of its directory"), opened_paths() as opened:
        open_hf_directory(sharded)
    assert opened
    assert str(outside) not in opened
    assert str(sharded / name) not in opened


def test_shard_that_links_to_itself(sharded):
    name = "model-00002-of-00003.safetensors"
    (sharded / name).unlink()
    (sharded / name).symlink_to(name)
    assert_refused(sharded, "1 missing: model-00002")


def test_missing_and_left_over_shards(sharded):
    (sharded / "model-00002-of-00003.safetensors").rename(
        sharded / "model-00002-of-00004.safetensors"
    )
    assert_refused(
        sharded,
        "1 missing: model-00002-of-00003.safetensors; "
        "1 not in the index: model-00002-of-00004.safetensors",
    )


def test_whole_model_beside_shards(sharded):
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded / "model.safetensors")
    assert_refused(sharded, "1 not in the index: model.safetensors")
    (sharded / "model.safetensors.index.json").unlink()
    assert_refused(sharded, "4 safetensors files but no model.safetensors.index.json")


def test_tensor_in_two_files(sharded):
    weight_map = read_index(sharded)
    file = sharded / weight_map["model.norm.weight"]
    tensors = {name: array for name, array in hf_tensors().items() if weight_map[name] == file.name}
    other = next(name for name in weight_map if name not in tensors)
    save_file(tensors | {other: hf_tensors()[other]}, file)
    assert_refused(sharded, f"{other} is in {file.name}, but not meant to be")


def test_index_and_files_disagree(sharded):
    weight_map = read_index(sharded)
    del weight_map["model.norm.weight"]
    write_index(sharded, weight_map)
    assert_refused(sharded, "model.norm.weight is in .*, but not in the index")
    weight_map["model.norm.weight"] = weight_map["model.embed_tokens.weight"]
    weight_map["more"] = "model-00001-of-00003.safetensors"
    write_index(sharded, weight_map)
    assert_refused(sharded, "more is not in model-00001-of-00003.safetensors")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "a must be mapped to a file name, found 3"),
        ('{"weight_map": {"a": "x.bin"}}', "'x.bin' is not a safetensors file; convert"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "key 'a' appears twice"),
        ("[" * 10_000, "does not hold valid JSON"),
        ("null", "must hold a JSON object"),
    ],
)
def test_damaged_index(sharded, text, words):
    (sharded / "model.safetensors.index.json").write_text(text)
    assert_refused(sharded, words)


def test_damaged_shard_among_good_ones(sharded):
    write(sharded / "model-00003-of-00003.safetensors", WHOLE[:-1])
    assert_refused(sharded, "model-00003-of-00003.safetensors is damaged")
