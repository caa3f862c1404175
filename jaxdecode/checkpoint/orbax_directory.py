"""This library's own model directory: weights in Orbax's format, config.json, tokenizer files.

All use of Orbax is here. Weights are kept under the flat dotted names of `param_shapes`, in a
format fixed here (zarr arrays in an OCDBT database). They are read piece by piece through
TensorStore, which is what Orbax itself reads with: its own restore holds a weight whole and twice,
and of a damaged file its threads print tracebacks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
import os
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from jaxdecode.checkpoint.atomic import whole_path, write_error
from jaxdecode.checkpoint.files import shown
from jaxdecode.checkpoint.hf_config import read_config, write_config
from jaxdecode.checkpoint.hf_layout import Index, bounded
from jaxdecode.checkpoint.joint import JointSave
from jaxdecode.checkpoint.source import TensorInfo, check_shapes, common_dtype, main_dtype
from jaxdecode.errors import CheckpointError, PathError
from jaxdecode.models.config import DTYPES, LlamaConfig
from jaxdecode.models.params import param_shapes

if TYPE_CHECKING:
    from jaxdecode.models.llama import Llama
    from jaxdecode.models.sharding import Sharding
    from jaxdecode.tokenizer import Tokenizer

WEIGHTS_NAME = "weights"
# Orbax's notes on its arrays. Its other processes would wait minutes for the first to make it.
_NOTES_NAME = "array_metadatas"
_ARRAY_SUFFIX = b"/.zarray"
# Arrays are cut into pieces of this size, so that a device that needs a part reads little else.
_CHUNK_BYTES = 32 << 20
# Pieces kept for the next read, which may run across them: all of one layer's largest weight.
_CACHED_BYTES = 512 << 20
# How long writes under way may take to end after one of them failed.
_SETTLING_SECONDS = 0.5


def save(model: Llama, path: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
    """Write a model that `load` reads back, bit for bit, onto any number of devices.

    The directory holds `weights/` (Orbax), config.json, generation_config.json and, if a tokenizer
    is given, its files. It appears under its name only once it is complete.

    Where the model's mesh spans several processes, all of them call this together, with the same
    path on a file system that they share. Each writes its own parts of the weights, and all return,
    or all raise, once the directory is complete or will not be.

    Args:
      model: its weights keep their dtype.
      path: directory to make; must not exist yet, or be empty.
      tokenizer: saved beside the weights; of several processes, that of the first counts.

    Raises:
      CheckpointError: `path` exists, the disk is full or not writable, any of this happened in
        another process, the processes share no directory of that name, or the model lies in this
        process alone of several. Nothing is left behind.
    """
    params = model.params()
    path = whole_path(path)
    if any(letter in str(path.parent) for letter in "*?["):
        raise CheckpointError(
            f"{path}: Orbax cannot write below a directory with *, ? or [ in its name; "
            "choose another place"
        )
    _check_shared(path, model.sharding)
    config = dataclasses.replace(model.config, dtype=common_dtype(params))
    joint = JointSave(path, model.sharding)
    with joint.new_directory(sum(param.nbytes for param in params.values())) as directory:
        with joint.step():
            if joint.leads:
                write_config(directory, config)
                if tokenizer is not None:
                    tokenizer.save(directory)
                (directory / WEIGHTS_NAME / _NOTES_NAME).mkdir(parents=True)
        _save_weights(path, directory / WEIGHTS_NAME, params, joint)
        if joint.leads:
            written = open_orbax_directory(directory)
            written.check_whole()
            written.close()


def _check_shared(path: Path, sharding: Sharding) -> None:
    several = sharding.mesh is not None and sharding.mesh.is_multi_process
    if jax.process_count() > 1 and not several:
        raise CheckpointError(
            f"{path}: this model lies in process {jax.process_index()} alone, one of "
            f"{jax.process_count()}; load it onto a mesh over the devices of all, or save it where "
            "one process runs by itself"
        )


def _save_weights(
    path: Path, directory: Path, params: dict[str, jax.Array], joint: JointSave
) -> None:
    """Write the weights with Orbax: each process its parts, then the leader what binds them.

    Orbax's Checkpointer would do both at once, but where one process fails, the others would wait
    for it forever.

    Args:
      path: for messages.
      directory: to fill.
      params: the weights.
      joint: who else writes.
    """
    # Weights hardly shrink when compressed, and saving would take several times as long.
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False,
        use_ocdbt=True,
        use_zarr3=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=joint.leader),
    )
    chunked = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in params}
    args = ocp.args.PyTreeSave(params, save_args=chunked)
    target = epath.Path(directory)  # the only kind that Orbax's handlers take
    with contextlib.closing(handler):
        with joint.step():
            _run_orbax(path, directory, lambda: handler.save(target, args=args))
        if joint.leads:
            _run_orbax(path, directory, lambda: handler.finalize(target))


def _run_orbax(path: Path, directory: Path, write: Callable[[], None]) -> None:
    """Write below `directory` in a thread of its own, so that Ctrl-C does not break Orbax."""
    failures: list[CheckpointError] = []
    begin, done = threading.Event(), threading.Event()

    def run() -> None:
        begin.wait()  # so that an interruption while the thread starts finds nothing written
        try:
            write()
        except Exception as error:  # noqa: BLE001  # a full disk is TensorStore's ValueError
            failures.append(write_error(path, error))
        finally:
            done.set()

    with _orbax_muted():
        threading.Thread(target=run, daemon=True).start()
        try:
            begin.set()
            done.wait()  # not join, which does not survive an interruption before Python 3.13
        except BaseException:
            begin.set()
            _stop_writing(directory / f"ocdbt.process_{jax.process_index()}", done)
            gc.collect()
            raise
        if failures:
            time.sleep(_SETTLING_SECONDS)
            gc.collect()
            raise failures[0]


def _stop_writing(part: Path, done: threading.Event) -> None:
    """End this process's writing of its `part` the only way there is: move it, so that it fails."""
    with contextlib.suppress(FileNotFoundError):  # not begun yet
        part.rename(part.with_name(f"{part.name}-stopped"))
    while True:
        try:
            part.touch(exist_ok=False)  # or TensorStore would make the directory again
            break
        except FileExistsError:  # it already has
            shutil.rmtree(part, ignore_errors=True)
    done.wait()
    time.sleep(_SETTLING_SECONDS)


def open_orbax_directory(directory: Path) -> OrbaxDirectory:
    """Open a directory that `save` made; only the weights' shapes and types are read.

    Raises:
      CheckpointError: it is damaged, or its tensors do not fit config.json; ConfigError for
        config.json itself, PathError for files outside of the directory.
    """
    config = read_config(directory)
    _check_links(directory / WEIGHTS_NAME)
    return OrbaxDirectory(directory, config)


class OrbaxDirectory:
    """An opened directory that `save` made: a WeightSource.

    Attributes:
      config: what config.json describes; dtype is that of the stored weights.
      quantised: False.
      path: the directory.
      tensors: the stored weights.
    """

    def __init__(self, directory: Path, config: LlamaConfig):
        self.path = directory
        self.quantised = False
        with self._read_errors():
            self._stores = _open_stores(directory.resolve() / WEIGHTS_NAME)
        self.tensors = {name: _info(store) for name, store in self._stores.items()}
        found = {name: info.shape for name, info in self.tensors.items()}
        check_shapes(directory, param_shapes(config), found, "save the model again")
        self._check_storage()
        self.config = dataclasses.replace(config, dtype=main_dtype(self.tensors))

    def _check_storage(self) -> None:
        for name, store in self._stores.items():
            if store.dtype.name not in DTYPES:
                raise CheckpointError(
                    f"{self.path}: {name} is stored as {store.dtype.name}, supported are "
                    f"{', '.join(DTYPES)}; save the model again"
                )
            chunk = _chunk_shape(store)
            # A piece is unpacked whole, so one that claims more than its weight would eat memory.
            if math.prod(chunk) > math.prod(store.shape):
                raise CheckpointError(
                    f"{self.path}: {name} {store.shape} is stored in pieces of {chunk}; "
                    "save the model again"
                )

    def check_whole(self) -> None:
        """Raise CheckpointError unless each piece of each weight is there; none is read.

        What another process wrote could be missing where a file system shows it late.
        """
        for name, store in self._stores.items():
            cuts = zip(store.shape, _chunk_shape(store), strict=True)
            expected = math.prod(math.ceil(size / piece) for size, piece in cuts)
            with self._read_errors():
                keys = store.kvstore.list().result() if store.kvstore else []
            found = sum(not key.endswith(b".zarray") for key in keys)
            if found != expected:
                raise CheckpointError(
                    f"{self.path}: {found} of {expected} pieces of {name} are there; save the "
                    "model again"
                )

    def read(self, name: str, index: Index) -> np.ndarray:
        """A piece of a weight in its stored type (see WeightSource)."""
        store = self._stores[name]
        with self._read_errors():
            return store[bounded(index, store.shape)].read().result()

    @contextlib.contextmanager
    def _read_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  # TensorStore raises a dozen kinds
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(
                f"{self.path}: the weights are damaged: {shown(lines[0])}; save the model again"
            ) from None

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that was saved beside the weights, None if none was."""
        from jaxdecode.tokenizer import Tokenizer

        return Tokenizer.from_directory(self.path)

    def close(self) -> None:
        """Let go of the files and of what was read ahead."""
        self._stores = {}


def _info(store: tensorstore.TensorStore) -> TensorInfo:
    num_bytes = math.prod(store.shape) * np.dtype(store.dtype.numpy_dtype).itemsize
    return TensorInfo(store.shape, store.dtype.name, num_bytes)


def _chunk_shape(store: tensorstore.TensorStore) -> list[int]:
    return [size or 0 for size in store.chunk_layout.read_chunk.shape or ()]


def _open_stores(weights: Path) -> dict[str, tensorstore.TensorStore]:
    """Every array in the directory that Orbax wrote, by name."""
    database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{weights}/"}}
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHED_BYTES}})
    keys = tensorstore.KvStore.open(database, context=context).result().list().result()
    names = [
        key.removesuffix(_ARRAY_SUFFIX).decode() for key in keys if key.endswith(_ARRAY_SUFFIX)
    ]
    opened = {
        name: tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": database | {"path": f"{name}/"},
                "fill_missing_data_reads": False,  # a lost piece is an error, not zeros
            },
            open=True,
            read=True,
            context=context,
        )
        for name in names
    }
    return {name: store.result() for name, store in opened.items()}


@contextlib.contextmanager
def _orbax_muted() -> Iterator[None]:
    """Keep off stderr what Orbax says of a failure besides raising it.

    It logs the failure with its traceback; asyncio logs those of the writes that nobody waited for,
    when they are collected; threads that still write when their event loop is gone leave one each.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    hook = sys.unraisablehook

    def without_closed_loops(unraisable: sys.UnraisableHookArgs) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = without_closed_loops
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_links(directory: Path) -> None:
    """Refuse links, which could lead anywhere."""
    inside = [
        Path(folder) / name
        for folder, folders, names in os.walk(directory)
        for name in (*folders, *names)
    ]
    for path in (directory, *inside):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise PathError(
                f"{path} is a link or a device, which a saved model never holds; save it again"
            )
