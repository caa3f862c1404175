"""GGUF headers: what gguf's own reader finds, and every malformed class refused quickly."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time

import gguf
import pytest
from gguf_writing import (
    ARRAY,
    F32,
    STRING,
    U8,
    U32,
    U64,
    array,
    info,
    metadata,
    pair,
    raw_file,
    text,
    u32,
    u64,
    write_model,
)
from hypothesis import example, given
from hypothesis import strategies as st

from jaxdecode.checkpoint.gguf_header import GgufTensor, read_header
from jaxdecode.errors import CheckpointError

Q4_0, Q4_K, IQ2_XXS = 2, 12, 16
ARCHITECTURE = pair("general.architecture", STRING, text("llama"))


def alignment(number):
    return pair("general.alignment", U32, u32(number))


# llama.cpp's classes of malformed files and more: name -> (bytes, words of the message).
MALFORMED = {
    "empty": (b"", "begins with 'GGUF', found b''"),
    "only magic": (b"GGUF", "needs 8 bytes, the file has 4"),
    "bad magic": (raw_file(magic=b"GGML"), "begins with 'GGUF', found b'GGML'"),
    "magic with control codes": (b"\x1b[2J\n", r"found b'\\x1b\[2J'"),
    "lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "Git LFS pointer",
    ),
    "web page": (b"\n<!DOCTYPE html><html>", "a web page"),
    "version 0": (raw_file(version=0), "version 0 cannot be read"),
    "version 1": (raw_file(version=1), "version 1 cannot be read"),
    "future version": (raw_file(version=4), "version 4 cannot be read"),
    "big endian": (raw_file(version=3 << 24), "big-endian files cannot be read"),
    "tensor count": (raw_file(counts=(2**63, 0)), f"announces {2**63} tensors"),
    "key count": (raw_file(counts=(0, 2**64 - 1)), f"announces {2**64 - 1} metadata keys"),
    "tensors missing": (raw_file(counts=(3, 0)), "cut off"),
    "keys missing": (raw_file(counts=(0, 3)), "cut off"),
    "cut in counts": (raw_file()[:20], "needs 24 bytes, the file has 20"),
    "key size": (raw_file(counts=(0, 1)) + u64(2**64 - 1), f"key 0 has {2**64 - 1} bytes"),
    "key size past the end": (raw_file(counts=(0, 1)) + u64(1000), "cut off"),
    "empty key": (raw_file([pair("", U32, u32(1))]), "key 0 has 0 bytes"),
    "key not UTF-8": (raw_file([pair(b"\xff\xfe", U32, u32(1))]), "key 0 is not UTF-8"),
    "value type": (raw_file([pair("a", 13, u32(1))]), "'a' has the unknown value type 13"),
    "value cut off": (raw_file([pair("a", U64, u32(1))]), "cut off"),
    "string size": (raw_file([pair("a", STRING, u64(2**63))]), f"'a' has {2**63} bytes"),
    "string past the end": (raw_file([pair("a", STRING, u64(99) + b"x")]), "cut off"),
    "item type": (raw_file([array("a", 77, 1, b"x")]), "'a' has the unknown value type 77"),
    "nested array": (
        raw_file([pair("a", ARRAY, (u32(ARRAY) + u64(1)) * 2000)]),
        "'a' is an array of arrays",
    ),
    "array length": (raw_file([array("a", U8, 2**63)]), f"'a' has {2**63} items"),
    "array past the end": (raw_file([array("a", F32, 1000, b"x" * 100)]), "cut off"),
    "strings past the end": (raw_file([array("a", STRING, 9, text("b") * 3)]), "cut off"),
    "string in array past the end": (raw_file([array("a", STRING, 1, u64(2**63))]), "cut off"),
    "doubled key": (raw_file([pair("a", U32, u32(1))] * 2), "key 'a' appears twice"),
    "alignment 0": (raw_file([alignment(0)]), "power of two up to 1048576, found 0"),
    "alignment 13": (raw_file([alignment(13)]), "power of two up to 1048576, found 13"),
    "alignment huge": (raw_file([alignment(2**31)]), f"found {2**31}"),
    "alignment of another type": (
        raw_file([pair("general.alignment", F32, u32(0x42000000))]),
        "found 32.0",
    ),
    "tensor name size": (raw_file(counts=(1, 0)) + u64(2**60), f"tensor 0 has {2**60} bytes"),
    "tensor name not UTF-8": (raw_file(infos=[info(b"\x80", [4])]), "tensor 0 is not UTF-8"),
    "no dimensions": (raw_file(infos=[info("w", [])]), "'w' has 0 dimensions"),
    "five dimensions": (raw_file(infos=[info("w", [1] * 5)]), "'w' has 5 dimensions"),
    "2^31 dimensions": (
        raw_file(counts=(1, 0)) + text("w") + u32(2**31),
        f"'w' has {2**31} dimensions",
    ),
    "size 0": (raw_file(infos=[info("w", [0, 4])], data=bytes(64)), "does not fit in a file"),
    "size too big": (raw_file(infos=[info("w", [2**63])], data=bytes(64)), "does not fit"),
    "product overflows to 0": (
        raw_file(infos=[info("w", [2**32, 2**32])], data=bytes(64)),
        "does not fit in a file",
    ),
    "product overflows to 1": (
        raw_file(infos=[info("w", [2**32 + 1, 2**32 - 1])], data=bytes(64)),
        "does not fit in a file",
    ),
    "bytes overflow": (raw_file(infos=[info("w", [2**62])], data=bytes(64)), "does not fit"),
    "unknown tensor type": (raw_file(infos=[info("w", [4], 999)]), "'w' has the unknown type 999"),
    "removed tensor type": (raw_file(infos=[info("w", [32], 4)]), "'w' has the unknown type 4"),
    "tensor type not supported": (
        raw_file(infos=[info("w", [256], IQ2_XXS)]),
        "'w' is stored as IQ2_XXS, .* one of F32, F16, BF16, Q4_0",
    ),
    "rows are no blocks": (
        raw_file(infos=[info("w", [48, 2], Q4_0)], data=bytes(64)),
        "rows of 48, but Q4_0 packs 32",
    ),
    "rows are no K blocks": (
        raw_file(infos=[info("w", [128, 2], Q4_K)], data=bytes(160)),
        "rows of 128, but Q4_K packs 256",
    ),
    "doubled tensor": (
        raw_file(infos=[info("w", [8]), info("w", [8], 0, 32)], data=bytes(64)),
        "tensor 'w' appears twice",
    ),
    "offset not aligned": (
        raw_file(infos=[info("w", [4], 0, 4)], data=bytes(64)),
        "begins at 4, no multiple of the alignment 32",
    ),
    "offset not aligned to a larger alignment": (
        raw_file([alignment(64)], [info("w", [4], 0, 32)], bytes(64), alignment=64),
        "begins at 32, no multiple of the alignment 64",
    ),
    "offset past the end": (
        raw_file(infos=[info("w", [4], 0, 2**63)], data=bytes(64)),
        "data is cut off: 'w' ends at",
    ),
    "offset wraps around": (
        raw_file(infos=[info("w", [4], 0, 2**64 - 32)], data=bytes(64)),
        "data is cut off: 'w' ends at",
    ),
    "overlap": (
        raw_file(infos=[info("v", [16]), info("w", [16], 0, 32)], data=bytes(128)),
        "tensors 'v' and 'w' overlap",
    ),
    "no data": (raw_file(infos=[info("w", [4])]), "data is cut off"),
    "data cut off": (raw_file(infos=[info("w", [16])], data=bytes(60)), "data is cut off"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused(tmp_path, case):
    content, words = MALFORMED[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(path)
    assert time.process_time() - begin < 1
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable(), "one line, no control codes"
    assert len(message) < 500


def test_every_truncation_is_refused(tmp_path):
    content = raw_file([ARCHITECTURE, alignment(32)], [info("w", [2, 4])], bytes(32))
    path = tmp_path / "model.gguf"
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"cut off|found b'"):
            read_header(path)
    path.write_bytes(content)
    with read_header(path).file:
        pass


# Files that are as large as the caps allow, so as to cost the most before they are refused.
LARGE = {
    "4 million empty strings": raw_file([array("a", STRING, 1 << 22)]),
    "array after array": raw_file(counts=(0, 4096)) + array("a", STRING, 1 << 21),
    "keys of 1 kB": raw_file([pair(f"{i:01024}", U8, b"x") for i in range(4095)], counts=(0, 4096)),
    "tensors": raw_file(
        infos=[info(f"{i:064}", [1], 0, 32 * i) for i in range(1 << 16)], data=bytes(32)
    ),
}


def test_time_and_memory_stay_small(tmp_path):
    for case, (content, _) in MALFORMED.items():
        (tmp_path / f"{case.replace('/', '')}.gguf").write_bytes(content)
    for case, content in LARGE.items():
        path = tmp_path / f"{case}.gguf"
        path.write_bytes(content)
        # Zeros behind it, which take no room on the disk: empty strings, as many as anyone wants.
        if path.stat().st_size < 1 << 20:
            os.truncate(path, 1 << 32)
    program = """
import json, pathlib, resource, sys, time
from jaxdecode.checkpoint.gguf_header import read_header
from jaxdecode.errors import CheckpointError

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

before, worst, accepted = peak(), 0, []
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.gguf")):
    begin = time.process_time()
    try:
        read_header(path)
        accepted.append(path.name)
    except CheckpointError:
        pass
    worst = max(worst, time.process_time() - begin)
print(json.dumps({"bytes": peak() - before, "seconds": worst, "accepted": accepted}))
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(done.stdout)
    assert found["accepted"] == []
    assert found["bytes"] < 50e6
    assert found["seconds"] < 5  # a busy machine takes a while; what is wrong takes minutes


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "directory.gguf").mkdir()
    for name in ("pipe.gguf", "directory.gguf"):
        with pytest.raises(CheckpointError, match=f"{name}: not a regular file"):
            read_header(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"none.gguf: cannot be opened \(No such file"):
        read_header(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match=r"cannot be opened \(.*embedded null"):
        read_header(tmp_path / "a\0b.gguf")


@pytest.mark.parametrize("version", [2, 3])
def test_versions_types_and_alignment(tmp_path, version):
    scalars = [(0, b"\xff", 255), (1, b"\xff", -1), (2, b"\xff\xff", 65535), (3, b"\xff\xff", -1)]
    scalars += [(4, u32(2**32 - 1), 2**32 - 1), (5, u32(2**32 - 1), -1)]
    scalars += [(6, u32(0x3FC00000), 1.5), (7, b"\x01", True), (8, text("\u0120ab"), "\u0120ab")]
    scalars += [(10, u64(2**64 - 1), 2**64 - 1), (11, u64(2**64 - 1), -1)]
    scalars += [(12, u64(0x3FF8000000000000), 1.5)]
    pairs = [pair(f"scalar{kind}", kind, raw) for kind, raw, _ in scalars]
    pairs += [array(f"array{kind}", kind, 3, raw * 3) for kind, raw, _ in scalars]
    pairs += [array("nothing", STRING, 0), alignment(128)]
    infos = [info("v", [2, 3], 1, 128), info("w", [32, 2, 1], Q4_0)]
    path = tmp_path / "model.gguf"
    content = raw_file(pairs, infos, bytes(256), version=version, alignment=128)
    path.write_bytes(content)
    header = read_header(path)
    with header.file:
        for kind, _, value in scalars:
            found = header.value(f"scalar{kind}")
            assert found == value
            assert type(found) is type(value)
            assert header.value(f"array{kind}") == [value] * 3
        assert header.value("nothing") == []
        assert header.value("absent") is None
        start = len(content) - 256
        assert header.tensors == {
            "v": GgufTensor(gguf.GGMLQuantizationType.F16, (3, 2), start + 128, 12),
            "w": GgufTensor(gguf.GGMLQuantizationType.Q4_0, (1, 2, 32), start, 36),
        }


def test_strings_longer_than_the_buffer(tmp_path):
    words = ["x" * length for length in (0, 1, 700_000, 900_000, 3, 1_100_000)]
    pairs = [array("words", STRING, len(words), b"".join(map(text, words)))]
    path = tmp_path / "model.gguf"
    path.write_bytes(raw_file([*pairs, pair("last", U32, u32(7))]))
    header = read_header(path)
    with header.file:
        assert header.value("words") == words
        assert header.value("last") == 7


def test_value_that_is_not_utf8(tmp_path):
    path = tmp_path / "model.gguf"
    bad = [pair("one", STRING, text(b"\xff")), array("many", STRING, 2, text("a") + text(b"\xff"))]
    path.write_bytes(raw_file(bad))
    header = read_header(path)
    with header.file:
        for key in ("one", "many"):
            with pytest.raises(CheckpointError, match=f"the value of '{key}' is not UTF-8"):
                header.value(key)


def test_file_that_shrinks(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(raw_file([pair("a", STRING, text("b" * 100))]))
    header = read_header(path)
    with header.file:
        os.truncate(path, 50)
        with pytest.raises(CheckpointError, match="became shorter while it was read"):
            header.value("a")


def test_file_that_changes(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(raw_file([array("a", STRING, 2, text("b" * 100) * 2)]))
    header = read_header(path)
    with header.file:
        path.write_bytes(b"A" * 300)
        with pytest.raises(CheckpointError, match="the file changed while it was read"):
            header.value("a")


def test_same_as_the_gguf_package(tmp_path):
    path = tmp_path / "model.gguf"
    write_model(path)
    header = assert_same_as_the_gguf_package(path)
    assert set(metadata()) <= set(header.values)


def assert_same_as_the_gguf_package(path):
    reader = gguf.GGUFReader(path)
    header = read_header(path)
    with header.file:
        fields = {key: field for key, field in reader.fields.items() if key[:5] != "GGUF."}
        assert {key: header.value(key) for key in header.values} == {
            key: field.contents() for key, field in fields.items()
        }
        assert header.tensors == {
            tensor.name: GgufTensor(
                tensor.tensor_type,
                tuple(tensor.shape.tolist())[::-1],
                tensor.data_offset,
                tensor.n_bytes,
            )
            for tensor in reader.tensors
        }
    return header


VALID = raw_file(
    [ARCHITECTURE, array("tokens", STRING, 2, text("a") * 2), array("types", U8, 3, b"abc")],
    [info("v", [2, 3]), info("w", [32, 2], Q4_0, 32)],
    bytes(96),
)


@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 97), st.integers(0, 255)), max_size=6),
    st.integers(0, len(VALID)),
)
@example([], len(VALID))
def test_mutated_header_is_refused_or_read(tmp_path_factory, mutations, size):
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    content = bytearray(VALID)
    for position, value in mutations:
        content[position] = value
    # Half of the time the whole file: most truncations are noticed before any mutation.
    path.write_bytes(content[:size] if size % 2 else content)
    with contextlib.suppress(CheckpointError):
        header = read_header(path)
        with header.file:
            for tensor in header.tensors.values():
                raw = header.read_bytes(tensor.offset, tensor.num_bytes)
                assert len(raw) == tensor.num_bytes
            for key in header.values:
                header.value(key)
