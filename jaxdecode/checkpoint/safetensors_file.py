"""One safetensors file, and the set of them that makes a model: checked, then read in slices.

Every header passes through the `safetensors` library, which refuses holes, overlaps, negative
offsets and repeated names, before a byte of data is believed.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxdecode.checkpoint.files import check_plain, parse_json, read_json, resolve_inside, shown
from jaxdecode.checkpoint.source import TensorInfo
from jaxdecode.errors import CheckpointError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# The largest published LLaMA (405B) needs 150 kB.
_MAX_HEADER_BYTES = 2 << 20
_MAX_INDEX_BYTES = 16 << 20
# Pages of a mapped file count as this process's memory until the mapping goes, so renew it in time.
_REMAP_BYTES = 128 << 20
_DTYPE_NAMES = {
    "F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64", "BOOL": "bool",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
}  # fmt: skip
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
# First bytes, in lower case, of what passes for a safetensors file, and what to do about it.
_IMPOSTORS = (
    (b"version https://git-lfs", "a Git LFS pointer; run `git lfs pull` to fetch the file itself"),
    (b"<!doctype", "a web page; the download failed, so fetch the file again"),
    (b"<html", "a web page; the download failed, so fetch the file again"),
    (b"<?xml", "an XML document; the download failed, so fetch the file again"),
    (b"gguf", "a GGUF file; rename it to end in .gguf"),
    (b"pk\x03\x04", "a zip or PyTorch file; convert it to safetensors"),
    (b"\x80", "a Python pickle; convert it to safetensors"),
)


class SafetensorsFile:
    """An opened safetensors file whose header has been checked.

    Attributes:
      path: the file.
      tensors: what it holds, by name.

    Raises:
      CheckpointError: the file is missing, damaged, or something else under this name.
    """

    def __init__(self, path: Path):
        self.path = path
        _check_header(path)
        self._open()
        try:
            self.tensors = {name: self._info(name) for name in self._file.keys()}  # noqa: SIM118
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        try:
            self._file: Any = safe_open(self.path, framework="numpy")
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} is damaged: {shown(str(error))}; download the file again"
            ) from None
        self._num_bytes_read = 0

    def _info(self, name: str) -> TensorInfo:
        tensor = self._file.get_slice(name)
        shape = tuple(tensor.get_shape())
        dtype = tensor.get_dtype()
        bits = int(re.sub(r"\D", "", dtype.partition("_")[0]) or 8)
        return TensorInfo(shape, _DTYPE_NAMES.get(dtype, dtype), math.prod(shape) * bits // 8)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The slice `index` (one slice of step 1 per axis) of a tensor; only its bytes are read."""
        if self._num_bytes_read > _REMAP_BYTES:
            self._open()
        try:
            piece = self._file.get_slice(name)[index]
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: tensor {shown(name)} cannot be read: {shown(str(error))}"
            ) from None
        self._num_bytes_read += piece.nbytes
        return piece

    def close(self) -> None:
        """Unmap the file."""
        self._file = None


def _check_header(path: Path) -> None:
    """Refuse what is no safetensors file, saying what it is, and JSON that could be read two ways.

    The `safetensors` library takes the last of repeated keys, where other readers take the first.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            beginning = file.read(512)
            file.seek(8)
            header = file.read(_MAX_HEADER_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    for magic, description in _IMPOSTORS:
        # A length may happen to begin with these bytes; only in a true file does JSON follow it.
        if beginning.lstrip().lower().startswith(magic) and beginning[8:9] != b"{":
            raise CheckpointError(f"{path} is {description}")
    if size < 8:
        raise CheckpointError(f"{path} has {size} bytes, too few; download the file again")
    (header_bytes,) = struct.unpack("<Q", beginning[:8])
    if header_bytes > size - 8:
        raise CheckpointError(
            f"{path} is cut off or no safetensors file: its header claims {header_bytes} bytes, "
            f"but the file has {size}; download it again"
        )
    if header_bytes > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: the header claims {header_bytes} bytes, the most allowed are "
            f"{_MAX_HEADER_BYTES}; this is no LLaMA model"
        )
    parse_json(header[:header_bytes], path)


def open_safetensors(directory: Path) -> dict[str, SafetensorsFile]:
    """Open and check every safetensors file of a model: tensor name -> the file that holds it.

    Raises:
      CheckpointError: a file is missing, left over or damaged, or the index is not true of the
        files; PathError: the index, or a link, points out of the directory.
    """
    weight_map = _weight_map(directory)
    names = sorted(set(weight_map.values())) if weight_map else [_single_file(directory)]
    for name in names:
        check_plain(directory, name)
    if weight_map:
        _check_file_set(directory, names)
    paths = [resolve_inside(directory, name) for name in names]
    opened: dict[str, SafetensorsFile] = {}
    try:
        for name, path in zip(names, paths, strict=True):
            opened[name] = SafetensorsFile(path)
        if weight_map:
            _check_index(directory / INDEX_NAME, weight_map, opened)
    except BaseException:
        for file in opened.values():
            file.close()
        raise
    return {tensor: file for file in opened.values() for tensor in file.tensors}


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name -> file name, of the index; empty if there is no index."""
    path = directory / INDEX_NAME
    if not path.exists() and not path.is_symlink():
        return {}
    weight_map = read_json(resolve_inside(directory, INDEX_NAME), _MAX_INDEX_BYTES).get(
        "weight_map"
    )
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; download the file again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"{path}: {shown(tensor)} must be mapped to a file name, found {shown(repr(name))}"
            )
    return weight_map


def _single_file(directory: Path) -> str:
    """The name of the only safetensors file of a directory without an index."""
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if SINGLE_NAME in names and not any(_SHARD.fullmatch(name) for name in names):
        return SINGLE_NAME
    if len(names) == 1:
        return names[0]
    raise CheckpointError(
        f"{directory}: {len(names)} safetensors files but no {INDEX_NAME} to say which make the "
        f"model: {shown(', '.join(names))}; download the index"
    )


def _check_file_set(directory: Path, names: list[str]) -> None:
    """All the files that the index names, and no other that could pass for a part of the model."""
    for name in names:
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{directory / INDEX_NAME}: {shown(repr(name))} is not a safetensors file; "
                "convert the model to safetensors"
            )
    missing = [name for name in names if not (directory / name).exists()]
    extra = [
        path.name
        for path in sorted(directory.glob("*.safetensors"))
        if (path.name == SINGLE_NAME or _SHARD.fullmatch(path.name)) and path.name not in names
    ]
    problems = [
        f"{len(files)} {what}: {shown(', '.join(files))}"
        for what, files in (("missing", missing), ("not in the index", extra))
        if files
    ]
    if problems:
        raise CheckpointError(
            f"{directory}: the files are not those of {INDEX_NAME}: {'; '.join(problems)}; "
            "download what is missing and delete what is left over"
        )


def _check_index(
    path: Path, weight_map: dict[str, str], opened: dict[str, SafetensorsFile]
) -> None:
    """Every tensor lies in the file that the index says, and in no other."""
    problems = [
        f"{shown(tensor)} is not in {name}"
        for tensor, name in weight_map.items()
        if tensor not in opened[name].tensors
    ]
    for name, file in opened.items():
        for tensor in file.tensors:
            if tensor not in weight_map:
                problems.append(f"{shown(tensor)} is in {name}, but not in the index")
            elif weight_map[tensor] != name:
                problems.append(f"{shown(tensor)} is in {name}, but not meant to be")
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(
            f"{path} is not true of its files: {', '.join(problems[:10])}{more}; "
            "download the model again"
        )
