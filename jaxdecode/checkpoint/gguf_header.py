"""The header of a GGUF file, read through a small buffer and checked before anything trusts it.

A GGUF file is: magic, version, counts, key-value metadata, tensor infos, padding, tensor data.
Every length in it comes from a stranger, so each is compared with a cap and with the file's size
before it is used; a header that passes describes bytes that exist. Long values (vocabularies,
merges, chat templates) are located, not decoded: `GgufHeader.value` decodes one when asked.
"""

from __future__ import annotations

import dataclasses
import math
import os
import stat
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)

from jaxdecode.errors import CheckpointError

# The largest vocabularies in use (260k tokens with 580k merges) need less than 20 MB of header.
MAX_HEADER_BYTES = 32 << 20
MAX_KEYS = 4096
MAX_TENSORS = 1 << 16
MAX_NAME_BYTES = 1024
MAX_STRING_BYTES = 1 << 20
MAX_ITEMS = 1 << 22
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 20
_T = GGMLQuantizationType
TENSOR_KINDS = (
    *(_T.F32, _T.F16, _T.BF16, _T.Q4_0, _T.Q4_1, _T.Q5_0, _T.Q5_1, _T.Q8_0),
    *(_T.Q2_K, _T.Q3_K, _T.Q4_K, _T.Q5_K, _T.Q6_K),
)

_BUFFER_BYTES = 1 << 20
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_SCALARS: dict[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}


class StoredValue(NamedTuple):
    """Where a string or an array lies in the file.

    Attributes:
      kind: type of the string or of the array's items.
      length: items of the array; None for a lone string.
      offset: first byte, counted from the beginning of the file.
      num_bytes: length in bytes; the items of a string array with their 8-byte lengths.
    """

    kind: GGUFValueType
    length: int | None
    offset: int
    num_bytes: int


class GgufTensor(NamedTuple):
    """Where a tensor lies in the file.

    Attributes:
      kind: how its numbers are packed.
      shape: sizes, slowest axis first (the file stores them the other way round).
      offset: first byte, counted from the beginning of the file.
      num_bytes: length in bytes.
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """A checked header.

    Attributes:
      path: the file's name, for messages.
      file: the open file, which whoever called `read_header` closes.
      values: metadata by key; a string or an array as its StoredValue.
      tensors: tensors by name, in the file's order.
    """

    path: Path
    file: BinaryIO
    values: dict[str, int | float | bool | StoredValue]
    tensors: dict[str, GgufTensor]

    def value(self, key: str) -> Any:
        """A metadata value: int, float, bool, str or a list of one of them; None if absent.

        Raises:
          CheckpointError: a string in it is not UTF-8, or the file has changed.
        """
        stored = self.values.get(key)
        if not isinstance(stored, StoredValue):
            return stored
        raw = self.read_bytes(stored.offset, stored.num_bytes)
        if stored.kind is not GGUFValueType.STRING:
            return np.frombuffer(raw, _SCALARS[stored.kind]).tolist()
        try:
            return raw.decode() if stored.length is None else _split_strings(raw, stored.length)
        except UnicodeDecodeError:
            raise CheckpointError(
                f"{self.path}: the value of {quoted(key)} is not UTF-8; fetch the file again"
            ) from None
        except struct.error:
            raise CheckpointError(f"{self.path}: the file changed while it was read") from None

    def read_bytes(self, offset: int, num_bytes: int) -> bytes:
        """A range of the file. Raises CheckpointError if the file has become shorter."""
        parts = []
        # One read returns at most 2 GiB.
        while num_bytes and (part := os.pread(self.file.fileno(), num_bytes, offset)):
            parts.append(part)
            offset += len(part)
            num_bytes -= len(part)
        if num_bytes:
            raise CheckpointError(
                f"{self.path}: the file became shorter while it was read; fetch it again"
            )
        return b"".join(parts)


def quoted(found: object) -> str:
    """A value from a file, short enough and safe to print in a message."""
    text = ascii(found[:80] if isinstance(found, (str, bytes, list)) else found)
    return text if len(text) <= 100 else text[:97] + "..."


def _split_strings(raw: bytes, count: int) -> list[str]:
    strings, index = [], 0
    for _ in range(count):
        begin = index + 8
        index = begin + _U64.unpack_from(raw, index)[0]
        strings.append(raw[begin:index].decode())
    return strings


class _Cursor:
    """Reads the header front to back through one buffer; knows where it is and how to complain."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path = path
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self._buffer = b""
        self._start = 0
        self._index = 0

    @property
    def position(self) -> int:
        return self._start + self._index

    def fail(self, problem: str) -> NoReturn:
        raise CheckpointError(
            f"{self.path}: {problem}; the file is damaged or no GGUF model, fetch it again"
        )

    def _check_end(self, end: int) -> None:
        if end > self.size:
            self.fail(f"the header is cut off: it needs {end} bytes, the file has {self.size}")
        if end > MAX_HEADER_BYTES:
            self.fail(f"the header is longer than {MAX_HEADER_BYTES} bytes")

    def _fill(self, num_bytes: int) -> None:
        begin = self.position
        self._check_end(begin + num_bytes)
        self._buffer = os.pread(self.file.fileno(), max(_BUFFER_BYTES, num_bytes), begin)
        self._start, self._index = begin, 0
        if len(self._buffer) < num_bytes:
            self.fail("the file became shorter while it was read")

    def take(self, num_bytes: int) -> bytes:
        if self._index + num_bytes > len(self._buffer):
            self._fill(num_bytes)
        begin = self._index
        self._index = begin + num_bytes
        return self._buffer[begin : self._index]

    def skip(self, num_bytes: int) -> None:
        self._check_end(self.position + num_bytes)
        self._index += num_bytes

    def u32(self) -> int:
        return _U32.unpack(self.take(4))[0]

    def u64(self) -> int:
        return _U64.unpack(self.take(8))[0]

    def name(self, what: str) -> str:
        length = self.u64()
        if not 0 < length <= MAX_NAME_BYTES:
            self.fail(f"{what} has {length} bytes, allowed are 1 to {MAX_NAME_BYTES}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def skip_strings(self, count: int) -> None:
        # Half a million times for a large vocabulary, hence without a method call per string.
        buffer, index, unpack_from = self._buffer, self._index, _U64.unpack_from
        for _ in range(count):
            if index + 8 > len(buffer):
                self._index = index
                self._fill(8)
                buffer, index = self._buffer, 0
            index += 8 + unpack_from(buffer, index)[0]
        self._index = index
        self.skip(0)


def read_header(path: Path) -> GgufHeader:
    """Open a GGUF file, read its header and check it; no tensor data is touched.

    Returns:
      The header, which owns the open file: close `header.file` when done.

    Raises:
      CheckpointError: not a readable regular little-endian GGUF file of version 2 or 3, truncated,
        or with lengths, types, names or offsets that are out of range, doubled or contradictory.
    """
    try:
        # Before opening: to open a pipe would wait for its writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: not a regular file; give the path of a .gguf file")
        file = path.open("rb", buffering=0)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{path}: cannot be opened ({reason}); give the path of a readable .gguf file"
        ) from None
    try:
        return _parse(path, file)
    except BaseException:
        file.close()
        raise


def _parse(path: Path, file: BinaryIO) -> GgufHeader:
    cursor = _Cursor(path, file)
    num_tensors, num_keys = _read_start(cursor)
    values: dict[str, int | float | bool | StoredValue] = {}
    for index in range(num_keys):
        key = cursor.name(f"key {index}")
        if key in values:
            cursor.fail(f"key {quoted(key)} appears twice")
        values[key] = _read_value(cursor, key)
    alignment = _alignment(cursor, values)
    infos: dict[str, GgufTensor] = {}
    for index in range(num_tensors):
        name = cursor.name(f"the name of tensor {index}")
        if name in infos:
            cursor.fail(f"tensor {quoted(name)} appears twice")
        infos[name] = _read_tensor_info(cursor, name, alignment)
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {name: info._replace(offset=data_start + info.offset) for name, info in infos.items()}
    _check_layout(cursor, tensors)
    return GgufHeader(path, file, values, tensors)


def _read_start(cursor: _Cursor) -> tuple[int, int]:
    start = os.pread(cursor.file.fileno(), 64, 0)
    if start[:4] != b"GGUF":
        if start.startswith(b"version https://git-lfs"):
            raise CheckpointError(
                f"{cursor.path}: a Git LFS pointer, not the model; run `git lfs pull` beside it"
            )
        if start.lstrip()[:1] == b"<":
            raise CheckpointError(f"{cursor.path}: a web page, no model; fetch the file itself")
        cursor.fail(f"a GGUF file begins with 'GGUF', found {quoted(start[:4])}")
    cursor.skip(4)
    version = cursor.u32()
    if version not in (2, 3):
        kind = "big-endian files" if version and version % 65536 == 0 else f"version {version}"
        raise CheckpointError(
            f"{cursor.path}: GGUF {kind} cannot be read, only little-endian versions "
            "2 and 3; convert the model again with a current llama.cpp"
        )
    num_tensors, num_keys = cursor.u64(), cursor.u64()
    if num_tensors > MAX_TENSORS:
        cursor.fail(f"it announces {num_tensors} tensors, at most {MAX_TENSORS} are allowed")
    if num_keys > MAX_KEYS:
        cursor.fail(f"it announces {num_keys} metadata keys, at most {MAX_KEYS} are allowed")
    return num_tensors, num_keys


def _value_type(cursor: _Cursor, key: str) -> GGUFValueType:
    number = cursor.u32()
    try:
        return GGUFValueType(number)
    except ValueError:
        cursor.fail(f"key {quoted(key)} has the unknown value type {number}")


def _read_value(cursor: _Cursor, key: str) -> int | float | bool | StoredValue:
    kind = _value_type(cursor, key)
    if kind is GGUFValueType.STRING:
        length = cursor.u64()
        if length > MAX_STRING_BYTES:
            cursor.fail(
                f"the string {quoted(key)} has {length} bytes, not up to {MAX_STRING_BYTES}"
            )
        stored = StoredValue(kind, None, cursor.position, length)
        cursor.skip(length)
        return stored
    if kind is not GGUFValueType.ARRAY:
        dtype = _SCALARS[kind]
        return np.frombuffer(cursor.take(dtype.itemsize), dtype)[0].item()
    kind = _value_type(cursor, key)
    count = cursor.u64()
    if kind is GGUFValueType.ARRAY:
        cursor.fail(f"key {quoted(key)} is an array of arrays, which models do not use")
    if count > MAX_ITEMS:
        cursor.fail(f"the array {quoted(key)} has {count} items, at most {MAX_ITEMS} are allowed")
    begin = cursor.position
    if kind is GGUFValueType.STRING:
        cursor.skip_strings(count)
    else:
        cursor.skip(count * _SCALARS[kind].itemsize)
    return StoredValue(kind, count, begin, cursor.position - begin)


def _alignment(cursor: _Cursor, values: dict[str, int | float | bool | StoredValue]) -> int:
    found = values.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(found) is not int or not 0 < found <= MAX_ALIGNMENT or found & (found - 1):
        cursor.fail(
            f"general.alignment must be a power of two up to {MAX_ALIGNMENT}, found {quoted(found)}"
        )
    return found


def _read_tensor_info(cursor: _Cursor, name: str, alignment: int) -> GgufTensor:
    """One tensor info; its offset still counts from the beginning of the data."""
    num_dims = cursor.u32()
    if not 1 <= num_dims <= MAX_DIMS:
        cursor.fail(f"tensor {quoted(name)} has {num_dims} dimensions, allowed are 1 to {MAX_DIMS}")
    shape = tuple(cursor.u64() for _ in range(num_dims))[::-1]
    number = cursor.u32()
    offset = cursor.u64()
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        cursor.fail(f"tensor {quoted(name)} has the unknown type {number}")
    if kind not in TENSOR_KINDS:
        raise CheckpointError(
            f"{cursor.path}: tensor {quoted(name)} is stored as {kind.name}, which cannot be read; "
            f"quantise the model as one of {', '.join(kind.name for kind in TENSOR_KINDS)}"
        )
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    # Python's integers do not overflow, so the product is exact before it meets the file's size.
    num_bytes = math.prod(shape) // block_size * block_bytes
    if num_bytes == 0 or num_bytes > cursor.size:
        cursor.fail(
            f"tensor {quoted(name)} of shape {shape} does not fit in a file of {cursor.size} bytes"
        )
    if shape[-1] % block_size:
        cursor.fail(
            f"tensor {quoted(name)} has rows of {shape[-1]}, but {kind.name} packs {block_size}"
        )
    if offset % alignment:
        cursor.fail(
            f"tensor {quoted(name)} begins at {offset}, no multiple of the alignment {alignment}"
        )
    return GgufTensor(kind, shape, offset, num_bytes)


def _check_layout(cursor: _Cursor, tensors: dict[str, GgufTensor]) -> None:
    end, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            cursor.fail(f"tensors {quoted(before)} and {quoted(name)} overlap")
        end, before = tensor.offset + tensor.num_bytes, name
        if end > cursor.size:
            cursor.fail(
                f"the data is cut off: {quoted(name)} ends at {end}, the file at {cursor.size}"
            )
