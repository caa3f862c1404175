"""From an opened model to arrays on devices, one weight after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import numpy as np

from jaxdecode.checkpoint.hf_layout import Index, bounded, file_blocks, layout_of, rows_per_step
from jaxdecode.checkpoint.source import WeightSource, cast_weight, numpy_dtype
from jaxdecode.models.params import param_shapes

# Start and stop along each axis of a weight: a slice that can be a key.
Span = tuple[tuple[int, int], ...]
Progress = Callable[[str, int, int], None]

# JAX's CPU backend adopts a NumPy buffer that is aligned to this, instead of copying it.
_ALIGNMENT = 64
# Rows copied at a time while axes are turned: so many of them stay in a core's cache.
_ROWS_AT_A_TIME = 64


def load_params(
    source: WeightSource,
    dtype: str,
    *,
    shardings: Mapping[str, jax.sharding.Sharding | None] | None = None,
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
        shardings = dict.fromkeys(shapes, _default_place())
    params: dict[str, jax.Array] = {}
    done = 0
    for name, shape in shapes.items():
        params[name] = _read(source, name, shape, target, shardings[name])
        done += num_bytes[name]
        if on_progress is not None:
            on_progress("loading", done, sum(num_bytes.values()))
    return params


def _default_place() -> jax.sharding.Sharding | None:
    """Weights stay on a default device that somebody chose. Elsewhere they are not bound to theirs,
    like any array of JAX's, so that they can be used inside `jax.set_mesh` too."""
    if jax.config.jax_default_device is None:  # type: ignore[attr-defined]
        return None
    return jax.device_put(np.zeros((), np.float32)).sharding


def _read(
    source: WeightSource,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    def span(index: Index | None) -> Span:
        # None is jax's word for all of a scalar.
        cuts = bounded(() if index is None else index, shape)
        return tuple((cut.start, cut.stop) for cut in cuts)

    if sharding is None:
        whole = span((slice(None),) * len(shape))
        return jax.device_put(read_pieces(source, name, shape, {whole}, dtype)[whole])
    places = sharding.addressable_devices_indices_map(shape).values()
    pieces = read_pieces(source, name, shape, {span(index) for index in places}, dtype)
    return jax.make_array_from_callback(shape, sharding, lambda index: pieces[span(index)])


def read_pieces(
    source: WeightSource, name: str, shape: tuple[int, ...], spans: set[Span], dtype: np.dtype
) -> dict[Span, np.ndarray]:
    """Slices of a weight of `shape`, in `dtype`, C-contiguous and aligned.

    The block that holds them all is read once, some rows of the file at a time: devices may hold
    copies, or stripes of the same rows, which would have to be found and unpacked for each again.
    """
    pieces = {
        span: _aligned_empty(tuple(stop - start for start, stop in span), dtype) for span in spans
    }
    box = tuple(
        slice(min(start for start, _ in cuts), max(stop for _, stop in cuts))
        for cuts in zip(*spans, strict=True)
    )
    axis = layout_of(name).row_axis
    step = rows_per_step(name, shape, _ROWS_AT_A_TIME)
    for block in file_blocks(name, box, 4):
        wanted = [
            span
            for span in spans
            if block[axis].start < span[axis][1] and span[axis][0] < block[axis].stop
        ]
        if not wanted:
            continue
        values = cast_weight(source.read(name, block), dtype, name)
        for span in wanted:
            common = tuple(
                slice(max(cut.start, start), min(cut.stop, stop))
                for cut, (start, stop) in zip(block, span, strict=True)
            )
            begin = [cut.start for cut in block]
            target = pieces[span][_moved(common, [start for start, _ in span])]
            _copy(values[_moved(common, begin)], target, axis, step)
    return pieces


def _moved(index: Index, origin: list[int]) -> Index:
    """The same slice, counted from `origin`."""
    return tuple(
        slice(cut.start - start, cut.stop - start) for cut, start in zip(index, origin, strict=True)
    )


def _copy(values: np.ndarray, target: np.ndarray, axis: int, step: int) -> None:
    """Copies `step` indices of the axis at a time, so that what is turned stays in the cache."""
    for row in range(0, values.shape[axis], step):
        rows = (*(slice(None),) * axis, slice(row, row + step))
        target[rows] = values[rows]


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    num_bytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    offset = -buffer.ctypes.data % _ALIGNMENT
    return buffer[offset : offset + num_bytes].view(dtype).reshape(shape)
