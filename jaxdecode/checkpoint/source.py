"""What every kind of model file looks like once it is opened: a source of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np

from jaxdecode.checkpoint.files import shown
from jaxdecode.errors import CheckpointError, RequestError
from jaxdecode.models.config import DTYPES, LlamaConfig

if TYPE_CHECKING:
    import jax

    from jaxdecode.tokenizer import Tokenizer

_MAX_LISTED = 10
_NUMPY_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of a model file, by the file's own account.

    Attributes:
      shape: as stored.
      dtype_name: "float32", "bfloat16", "Q4_1", ...
      num_bytes: of its data in the file.
    """

    shape: tuple[int, ...]
    dtype_name: str
    num_bytes: int


class WeightSource(Protocol):
    """An opened model of which only headers have been read so far.

    Attributes:
      config: the model's shape and constants; config.dtype is the type the weights are stored in.
      quantised: the weights are packed in blocks, and `read` unpacks them to float32.
      path: the file or directory.
      tensors: the file's own tensor names and what is stored under them.
    """

    config: LlamaConfig
    quantised: bool
    path: Path
    tensors: dict[str, TensorInfo]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A piece of a weight.

        Args:
          name: a key of `param_shapes(config)`.
          index: one slice of step 1 for each axis of that weight's shape.

        Returns:
          The piece in its stored type, or in float32 if it was quantised.
        """

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that lies beside the weights, None if there is none."""

    def close(self) -> None:
        """Let go of the files; nothing can be read afterwards."""


def numpy_dtype(name: str) -> np.dtype:
    """NumPy's dtype of one of the names in models.config.DTYPES."""
    return _NUMPY_DTYPES[name]


def checked_dtype(dtype: Any) -> str:
    """The name of a dtype that a caller asked for.

    Raises:
      RequestError: it is not one that weights can have.
    """
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = ""
    if dtype is None or name not in DTYPES:
        raise RequestError(f"dtype must be one of {', '.join(DTYPES)} or None; found {dtype!r}")
    return name


def main_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """The type in which most bytes are stored, among those that weights can have."""
    num_bytes = dict.fromkeys(DTYPES, 0)
    for info in tensors.values():
        if info.dtype_name in num_bytes:
            num_bytes[info.dtype_name] += info.num_bytes
    return max(num_bytes, key=lambda name: num_bytes[name])


def common_dtype(params: Mapping[str, jax.Array]) -> str:
    """The dtype that all weights of a model in memory have.

    Raises:
      CheckpointError: they have several, or one that no model file can have.
    """
    dtypes = sorted({param.dtype.name for param in params.values()})
    if len(dtypes) != 1 or dtypes[0] not in DTYPES:
        raise CheckpointError(
            f"the model's weights are {', '.join(dtypes)}; they must all be the same one of "
            f"{', '.join(DTYPES)}"
        )
    return dtypes[0]


def cast_weight(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`array` in `dtype`, in the memory order that it has.

    Raises:
      CheckpointError: a finite weight is too large for float16.
    """
    if array.dtype == dtype:
        return array
    if dtype != np.float16:
        return array.astype(dtype)
    with np.errstate(over="ignore"):
        narrowed = array.astype(dtype)
    if not np.isfinite(narrowed).all() and np.isfinite(array).all():
        raise CheckpointError(
            f"weight {name} has values beyond 65504, which float16 cannot hold; "
            "use dtype='bfloat16' or 'float32'"
        )
    return narrowed


def check_shapes(
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    hint: str,
) -> None:
    """Compare the tensors of a model file with those that its configuration asks for.

    Args:
      path: of the file or directory, for the message.
      expected, found: shapes by tensor name.
      hint: how the message ends: what to do.

    Raises:
      CheckpointError: they differ; lists the first ten missing, unexpected and mismatched ones.
    """
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in found]
    unexpected = [shown(f"{name} {shape}") for name, shape in found.items() if name not in expected]
    mismatched = [
        shown(f"{name} {found[name]}, expected {shape}")
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if missing or unexpected or mismatched:
        parts = [
            _listed("missing", missing),
            _listed("unexpected", unexpected),
            _listed("of another shape", mismatched),
        ]
        problem = "; ".join(part for part in parts if part)
        raise CheckpointError(
            f"{path}: the tensors do not fit the configuration: {problem}; {hint}"
        )


def _listed(what: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return f"{len(items)} {what}: {', '.join(items[:_MAX_LISTED])}{more}"
