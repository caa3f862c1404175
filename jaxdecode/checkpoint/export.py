"""Writing a model as Hugging Face safetensors, block by block, so that no file is held in memory.

The `safetensors` library writes a file from tensors that are all in memory. A file is a header and
the tensors' bytes one after another, so here it is written as a stream instead, and that library
has to accept the result before the model gets its name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import jax
import numpy as np

from jaxdecode.checkpoint.atomic import new_directory, whole_path
from jaxdecode.checkpoint.hf_config import write_config
from jaxdecode.checkpoint.hf_layout import (
    Index,
    file_blocks,
    file_shape,
    layout_of,
    to_file,
)
from jaxdecode.checkpoint.safetensors_file import INDEX_NAME, SINGLE_NAME, open_safetensors
from jaxdecode.checkpoint.source import (
    WeightSource,
    cast_weight,
    checked_dtype,
    common_dtype,
    numpy_dtype,
)
from jaxdecode.errors import CheckpointError
from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.llama import Llama
from jaxdecode.models.params import param_shapes

if TYPE_CHECKING:
    from jaxdecode.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]
Reader = Callable[[Index], np.ndarray]
_FORMAT_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class _Tensor(NamedTuple):
    """A tensor of the file to be: its name and shape there, and which part of our weight it is."""

    name: str
    shape: tuple[int, ...]
    weight: str
    part: int
    num_bytes: int


def export_safetensors(
    source_or_model: WeightSource | Llama,
    path: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    dtype: Any = None,
    *,
    max_shard_bytes: int = 5_000_000_000,
    on_progress: Progress | None = None,
) -> None:
    """Write a model as a Hugging Face directory that transformers and `load` read.

    The directory holds safetensors (with an index if there are several), config.json,
    generation_config.json and the tokenizer's files. It appears under its name only once complete.

    Args:
      source_or_model: an opened model file, read as it is written, or a model in memory.
      path: directory to make; must not exist yet, or be empty.
      tokenizer: saved beside the weights; None: the source's own, if it has one.
      dtype: of the written weights; None: the stored one, bfloat16 if the weights were quantised.
      max_shard_bytes: a file grows no larger than this, unless one tensor alone does.
      on_progress: called with ("writing", bytes written, bytes in all).

    Raises:
      CheckpointError: `path` exists, the disk is full or not writable, a weight is too large for
        float16, or this is one process of several.
      RequestError: dtype is not float32, bfloat16 or float16.
    """
    path = whole_path(path)
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        raise CheckpointError(
            f"{path}: several processes cannot export a model together; `save` it with them, load "
            "that in one process, and export it there"
        )
    config, open_weight, tokenizer = _inputs(source_or_model, tokenizer)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=checked_dtype(dtype))
    tensors = _tensors(config)
    total = sum(tensor.num_bytes for tensor in tensors)
    with new_directory(path, total) as directory:
        done = 0
        names: dict[str, str] = {}
        for name, shard in _shards(tensors, max_shard_bytes):
            with (directory / name).open("wb") as file:
                file.write(_header(shard, config.dtype))
                for tensor in shard:
                    _write_tensor(file, tensor, open_weight(tensor.weight), config)
                    done += tensor.num_bytes
                    if on_progress is not None:
                        on_progress("writing", done, total)
            names |= dict.fromkeys((tensor.name for tensor in shard), name)
        if len(set(names.values())) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": names}
            (directory / INDEX_NAME).write_text(
                json.dumps(index, indent=2) + "\n", encoding="utf-8"
            )
        write_config(directory, config)
        if tokenizer is not None:
            tokenizer.save(directory)
        for written in open_safetensors(directory).values():
            written.close()


def _inputs(
    source_or_model: WeightSource | Llama, tokenizer: Tokenizer | None
) -> tuple[LlamaConfig, Callable[[str], Reader], Tokenizer | None]:
    """(configuration with the dtype to write, how to read a weight by name, tokenizer)."""
    if isinstance(source_or_model, Llama):
        params = source_or_model.params()
        config = dataclasses.replace(source_or_model.config, dtype=common_dtype(params))
        return config, lambda name: _host_copy(params[name]).__getitem__, tokenizer
    source = source_or_model
    config = source.config
    if source.quantised:
        config = dataclasses.replace(config, dtype="bfloat16")
    if tokenizer is None:
        tokenizer = source.tokenizer()
    return config, lambda name: lambda index: source.read(name, index), tokenizer


def _host_copy(array: jax.Array) -> np.ndarray:
    # An Array keeps the host copy made of it; this second one over its buffers is soon gone.
    buffers = [shard.data for shard in array.addressable_shards]
    return np.asarray(
        jax.make_array_from_single_device_arrays(array.shape, array.sharding, buffers)
    )


def _tensors(config: LlamaConfig) -> list[_Tensor]:
    itemsize = numpy_dtype(config.dtype).itemsize
    tensors = []
    for weight, shape in param_shapes(config).items():
        layout = layout_of(weight)
        stored = file_shape(layout, shape)
        for part, name in enumerate(layout.tensors):
            tensors.append(_Tensor(name, stored, weight, part, math.prod(stored) * itemsize))
    return tensors


def _shards(tensors: list[_Tensor], max_bytes: int) -> list[tuple[str, list[_Tensor]]]:
    """Name and tensors of each file, in order, none over max_bytes unless one tensor alone is."""
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    if len(shards) == 1:
        return [(SINGLE_NAME, shards[0])]
    return [
        (f"model-{i:05d}-of-{len(shards):05d}.safetensors", shard)
        for i, shard in enumerate(shards, start=1)
    ]


def _header(tensors: list[_Tensor], dtype: str) -> bytes:
    """The beginning of a file: length of the JSON, then where each tensor lies."""
    # transformers refuses a file that does not name its framework's format.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _FORMAT_NAMES[dtype],
            "shape": tensor.shape,
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(file: BinaryIO, tensor: _Tensor, read: Reader, config: LlamaConfig) -> None:
    dtype = numpy_dtype(config.dtype)
    layout = layout_of(tensor.weight)
    index = [slice(0, size) for size in param_shapes(config)[tensor.weight]]
    fused = len(layout.tensors) > 1
    if fused:
        index[1] = slice(tensor.part, tensor.part + 1)
    for block in file_blocks(tensor.weight, tuple(index), 4):
        piece = read(block)
        array = to_file(layout, cast_weight(piece[:, 0] if fused else piece, dtype, tensor.weight))
        file.write(array.view(np.uint8).data)
