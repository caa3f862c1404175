"""From an opened model to arrays on devices, one weight after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import numpy as np

from jaxdecode.checkpoint.hf_layout import Index, bounded, file_blocks, layout_of, rows_per_step
from jaxdecode.checkpoint.source import WeightSource, cast_weight, numpy_dtype
from jaxdecode.models.llama import param_shapes

Progress = Callable[[str, int, int], None]

# JAX's CPU backend adopts a NumPy buffer that is aligned to this, instead of copying it.
_ALIGNMENT = 64
# Rows copied at a time while axes are turned: so many of them stay in a core's cache.
_ROWS_AT_A_TIME = 64


def load_params(
    source: WeightSource,
    dtype: str,
    *,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    on_progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """The weights of an opened model, by the names and shapes of `param_shapes(source.config)`.

    Args:
      source: an opened model.
      dtype: name of the dtype of the result.
      shardings: where each weight goes; only the parts that this process's devices hold are read.
        None: all on the default device.
      on_progress: called with ("loading", bytes done, bytes in all).

    Raises:
      CheckpointError: the files are damaged, or a weight is too large for float16.
    """
    shapes = param_shapes(source.config)
    target = numpy_dtype(dtype)
    num_bytes = {name: math.prod(shape) * target.itemsize for name, shape in shapes.items()}
    if shardings is None:
        shardings = dict.fromkeys(shapes, jax.device_put(np.zeros((), np.float32)).sharding)
    params: dict[str, jax.Array] = {}
    done = 0
    for name, shape in shapes.items():
        params[name] = _read(source, name, shape, target, shardings[name])
        done += num_bytes[name]
        if on_progress is not None:
            on_progress("loading", done, sum(num_bytes.values()))
    return params


def _read(
    source: WeightSource,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    pieces: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def piece(index: Index | None) -> np.ndarray:
        # Devices that hold copies ask for the same piece; None is jax's word for all of a scalar.
        index = bounded(() if index is None else index, shape)
        key = tuple((cut.start, cut.stop) for cut in index)
        if key not in pieces:
            pieces[key] = _read_piece(source, name, shape, index, dtype)
        return pieces[key]

    return jax.make_array_from_callback(shape, sharding, piece)


def _read_piece(
    source: WeightSource, name: str, shape: tuple[int, ...], index: Index, dtype: np.dtype
) -> np.ndarray:
    """The slice `index` of a weight of `shape`, in `dtype`, C-contiguous and aligned."""
    result = _aligned_empty(tuple(cut.stop - cut.start for cut in index), dtype)
    axis = layout_of(name).row_axis
    step = rows_per_step(name, shape, _ROWS_AT_A_TIME)
    for block in file_blocks(name, index, 4):
        values = cast_weight(source.read(name, block), dtype, name)
        begin = block[axis].start - index[axis].start
        for row in range(0, values.shape[axis], step):
            rows = (slice(None),) * axis
            count = min(step, values.shape[axis] - row)
            to = (*rows, slice(begin + row, begin + row + count))
            result[to] = values[*rows, row : row + count]
    return result


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    num_bytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    offset = -buffer.ctypes.data % _ALIGNMENT
    return buffer[offset : offset + num_bytes].view(dtype).reshape(shape)
