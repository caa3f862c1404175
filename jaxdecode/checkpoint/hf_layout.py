"""Where each of our weights lies in a Hugging Face file, and how its axes are turned there.

D model width, F feed-forward width, V vocabulary, N query heads, K KV heads, H head_dim. Hugging
Face stores a projection output dimension first, with heads and head dimension merged: ours
[D, N, H] is theirs [N * H, D]. Of a fused weight each part (axis 1: k and v, gate and up) is a
tensor of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.params import param_shapes

Index = tuple[slice, ...]
_BLOCK_BYTES = 32 << 20


class Layout(NamedTuple):
    """How one of our weights, or a part of it, becomes a tensor of the file.

    Attributes:
      tensors: the file's names, one for each part; {layer} stands for "model.layers.3".
      axes: for each axis of the file, the axes of ours (a part's own) that are merged in it.
    """

    tensors: tuple[str, ...]
    axes: tuple[tuple[int, ...], ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Our axes in the order in which the file has them."""
        return tuple(axis for group in self.axes for axis in group)

    @property
    def row_axis(self) -> int:
        """The axis of the whole weight along which the file's rows run."""
        axis = self.order[0]
        return axis + 1 if len(self.tensors) > 1 and axis > 0 else axis

    @property
    def merged_axis(self) -> int:
        """The axis of the file in which most axes of ours are merged."""
        return max(range(len(self.axes)), key=lambda axis: len(self.axes[axis]))


_HEADS_FIRST = ((1, 2), (0,))
_TURNED = ((1,), (0,))
_LAYOUTS = {
    "embed": Layout(("model.embed_tokens.weight",), ((0,), (1,))),
    "attn_norm.scale": Layout(("{layer}.input_layernorm.weight",), ((0,),)),
    "attn.q": Layout(("{layer}.self_attn.q_proj.weight",), _HEADS_FIRST),
    "attn.kv": Layout(
        ("{layer}.self_attn.k_proj.weight", "{layer}.self_attn.v_proj.weight"), _HEADS_FIRST
    ),
    "attn.o": Layout(("{layer}.self_attn.o_proj.weight",), ((2,), (0, 1))),
    "mlp_norm.scale": Layout(("{layer}.post_attention_layernorm.weight",), ((0,),)),
    "mlp.gate_up": Layout(("{layer}.mlp.gate_proj.weight", "{layer}.mlp.up_proj.weight"), _TURNED),
    "mlp.down": Layout(("{layer}.mlp.down_proj.weight",), _TURNED),
    "final_norm.scale": Layout(("model.norm.weight",), ((0,),)),
    "head": Layout(("lm_head.weight",), _TURNED),
}


def layout_of(name: str) -> Layout:
    """The layout of a weight by its name in `param_shapes`."""
    if not name.startswith("layers."):
        return _LAYOUTS[name]
    _, layer, rest = name.split(".", 2)
    layout = _LAYOUTS[rest]
    tensors = tuple(tensor.format(layer=f"model.layers.{layer}") for tensor in layout.tensors)
    return Layout(tensors, layout.axes)


def part_shape(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one part of a weight of `shape`: without the fused axis, if it has one."""
    return shape if len(layout.tensors) == 1 else (shape[0], *shape[2:])


def file_shape(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in the file of each tensor of a weight of `shape`."""
    sizes = part_shape(layout, shape)
    return tuple(math.prod(sizes[axis] for axis in group) for group in layout.axes)


def file_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a Hugging Face file of this configuration."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in param_shapes(config).items():
        layout = layout_of(name)
        shapes |= dict.fromkeys(layout.tensors, file_shape(layout, shape))
    return shapes


def file_slices(layout: Layout, shape: tuple[int, ...], index: Index) -> list[Index]:
    """The slices of the file's tensor that hold the slice `index` of a part of `shape`.

    One, unless only some of each head's dimensions are wanted: then one for each head, which
    follow each other along `layout.merged_axis`.
    """
    merged = layout.axes[layout.merged_axis]
    if all(index[axis] == slice(0, shape[axis]) for axis in merged[1:]):
        return [_file_slice(layout, shape, index)]
    heads = index[merged[0]]
    return [
        _file_slice(layout, shape, (*index[: merged[0]], slice(n, n + 1), *index[merged[0] + 1 :]))
        for n in range(heads.start, heads.stop)
    ]


def _file_slice(layout: Layout, shape: tuple[int, ...], index: Index) -> Index:
    """Of merged axes, the others are wanted whole, or of the first a single index."""
    result = []
    for first, *inner in layout.axes:
        start, stop = index[first].start, index[first].stop
        for axis in inner:
            start, stop = (
                start * shape[axis] + index[axis].start,
                (stop - 1) * shape[axis] + index[axis].stop,
            )
        result.append(slice(start, stop))
    return tuple(result)


def from_file(layout: Layout, index: Index, parts: np.ndarray) -> np.ndarray:
    """The slice `index` of some parts, from the file's slices `file_slices(...)` of each.

    Args:
      layout, index: of one part.
      parts: what the slices of each part hold, joined, and stacked along a new first axis.

    Returns:
      A view [parts, ...] in our order of axes.
    """
    sizes = [index[axis].stop - index[axis].start for axis in layout.order]
    turned = parts.reshape(len(parts), *sizes)
    return turned.transpose(0, *(np.argsort(layout.order) + 1))


def to_file(layout: Layout, array: np.ndarray) -> np.ndarray:
    """A part of a weight as the file holds it, C-contiguous. Inverse of `from_file`."""
    sizes = tuple(math.prod(array.shape[axis] for axis in group) for group in layout.axes)
    return np.ascontiguousarray(array.transpose(layout.order)).reshape(sizes)


def file_blocks(name: str, index: Index, itemsize: int) -> Iterator[Index]:
    """Cut a piece of a weight into blocks of at most 32 MB, each a run of rows of the file."""
    axis = layout_of(name).row_axis
    sizes = [cut.stop - cut.start for cut in index]
    row_bytes = math.prod(sizes) // max(sizes[axis], 1) * itemsize
    step = max(1, _BLOCK_BYTES // max(row_bytes, 1))
    begin, end = index[axis].start, index[axis].stop
    for start in range(begin, end, step):
        rows = slice(start, min(start + step, end))
        yield (*index[:axis], rows, *index[axis + 1 :])


def rows_per_step(name: str, shape: tuple[int, ...], file_rows: int) -> int:
    """How many indices of a weight's row axis make about `file_rows` rows of the file; >= 1."""
    layout = layout_of(name)
    sizes = part_shape(layout, shape)
    return max(1, file_rows // math.prod(sizes[axis] for axis in layout.axes[0][1:]))


def bounded(index: Index, shape: tuple[int, ...]) -> Index:
    """`index` with every start and stop written out.

    Raises:
      ValueError: a slice has a step, or the number of slices is not that of the axes.
    """
    if len(index) != len(shape) or any(cut.step not in (None, 1) for cut in index):
        raise ValueError(f"index {index} must hold one slice of step 1 for each axis of {shape}")
    return tuple(slice(*cut.indices(size)[:2]) for cut, size in zip(index, shape, strict=True))
