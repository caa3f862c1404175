"""A Hugging Face model directory: config.json, safetensors, tokenizer files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxdecode.checkpoint.hf_config import CONFIG_NAME, read_config
from jaxdecode.checkpoint.hf_layout import (
    Index,
    Layout,
    bounded,
    file_shapes,
    file_slices,
    from_file,
    layout_of,
    part_shape,
)
from jaxdecode.checkpoint.safetensors_file import SafetensorsFile, open_safetensors
from jaxdecode.checkpoint.source import check_shapes, main_dtype
from jaxdecode.errors import CheckpointError
from jaxdecode.models.config import DTYPES, LlamaConfig
from jaxdecode.models.params import param_shapes

if TYPE_CHECKING:
    from jaxdecode.tokenizer import Tokenizer

_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that old checkpoints carry and every loader computes.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"
_NUM_COMPARED_ROWS = 64


def open_hf_directory(directory: Path) -> HfDirectory:
    """Open a Hugging Face model directory; headers only are read.

    Raises:
      CheckpointError: a file is missing or damaged, or the tensors do not fit config.json;
        ConfigError for config.json itself, PathError for files outside of the directory.
    """
    config = read_config(directory)
    files = open_safetensors(directory)
    try:
        return HfDirectory(directory, config, files)
    except BaseException:
        _close(files)
        raise


class HfDirectory:
    """An opened Hugging Face model directory: a WeightSource.

    Attributes:
      config: what config.json describes; dtype is the type in which most bytes are stored.
      quantised: False.
      path: the directory.
      tensors: the files' own tensor names, types and shapes.
    """

    def __init__(self, directory: Path, config: LlamaConfig, files: dict[str, SafetensorsFile]):
        self._files = files
        self.path = directory
        self.quantised = False
        self.tensors = {name: file.tensors[name] for name, file in files.items()}
        self._check(config)
        self.config = dataclasses.replace(config, dtype=main_dtype(self.tensors))
        self._shapes = param_shapes(config)

    def _check(self, config: LlamaConfig) -> None:
        expected = file_shapes(config)
        found = {
            name: info.shape
            for name, info in self.tensors.items()
            if not name.endswith(_IGNORED_SUFFIX)
        }
        if config.tie_embeddings and found.get(_HEAD) == expected[_EMBED] == found.get(_EMBED):
            self._check_tied_head()
            del found[_HEAD]
        hint = f"check {CONFIG_NAME} or download the model again"
        if _HEAD in expected and _HEAD not in found:
            hint = f"set tie_word_embeddings to true in {CONFIG_NAME} if the head is the embedding"
        elif _HEAD in found and _HEAD not in expected:
            hint = f"set tie_word_embeddings to false in {CONFIG_NAME} if the head is its own"
        check_shapes(self.path, expected, found, hint)
        for name in expected:
            if self.tensors[name].dtype_name not in DTYPES:
                raise CheckpointError(
                    f"{self._files[name].path}: {name} is stored as "
                    f"{self.tensors[name].dtype_name}, supported are {', '.join(DTYPES)}; "
                    "convert the model to one of them"
                )

    def _check_tied_head(self) -> None:
        """A tied model may ship its head a second time, but not another head: compare some rows."""
        rows, columns = self.tensors[_HEAD].shape
        for row in range(0, rows, max(1, rows // _NUM_COMPARED_ROWS)):
            index = (slice(row, row + 1), slice(0, columns))
            embed, head = (self._files[name].read(name, index) for name in (_EMBED, _HEAD))
            if not np.array_equal(embed.view(np.uint8), head.view(np.uint8)):
                raise CheckpointError(
                    f"{self.path}: {_HEAD} differs from {_EMBED}, but {CONFIG_NAME} says that they "
                    "are one; set tie_word_embeddings to false there"
                )

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A piece of a weight in its stored type; no other bytes are read (see WeightSource)."""
        shape = self._shapes[name]
        layout = layout_of(name)
        index = bounded(index, shape)
        sizes = part_shape(layout, shape)
        if len(layout.tensors) == 1:
            return from_file(layout, index, self._stored(layout, sizes, index, [0]))[0]
        rest = (index[0], *index[2:])
        parts = range(index[1].start, index[1].stop)
        stored = self._stored(layout, sizes, rest, parts)
        return np.moveaxis(from_file(layout, rest, stored), 0, 1)

    def _stored(
        self, layout: Layout, shape: tuple[int, ...], index: Index, parts: Sequence[int]
    ) -> np.ndarray:
        """What the files hold of the slice `index` of each of `parts`, stacked."""
        cuts = file_slices(layout, shape, index)
        pieces = [self._joined(layout.tensors[part], cuts, layout.merged_axis) for part in parts]
        if len({piece.dtype for piece in pieces}) > 1:
            pieces = [piece.astype(np.float32) for piece in pieces]  # holds what either type does
        return pieces[0][None] if len(pieces) == 1 else np.stack(pieces)

    def _joined(self, name: str, cuts: list[Index], axis: int) -> np.ndarray:
        """Slices of one of the files' tensors, one behind the other along `axis`."""
        pieces = [self._files[name].read(name, cut) for cut in cuts]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis)

    def tokenizer(self) -> Tokenizer | None:
        """The directory's tokenizer, None if it has none."""
        from jaxdecode.tokenizer import Tokenizer

        return Tokenizer.from_directory(self.path)

    def close(self) -> None:
        """Unmap the files."""
        _close(self._files)


def _close(files: dict[str, SafetensorsFile]) -> None:
    for file in files.values():
        file.close()
