"""Finding a model by path or name, and loading it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh

from jaxdecode.checkpoint.arrays import Progress, load_params
from jaxdecode.checkpoint.files import shown
from jaxdecode.checkpoint.hub_cache import find_in_hub_cache, is_hub_name
from jaxdecode.checkpoint.source import WeightSource, checked_dtype
from jaxdecode.errors import CheckpointError, RequestError
from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.llama import Llama
from jaxdecode.models.params import param_letters
from jaxdecode.models.sharding import Sharding, describe, fit_mesh
from jaxdecode.plan import explain_exhaustion
from jaxdecode.processes import check_same

if TYPE_CHECKING:
    from jaxdecode.tokenizer import Tokenizer

DEFAULT_MODEL = "smollm2-135m"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".h5", ".msgpack")
_EXPECTED = (
    "expected a Hugging Face directory (config.json and safetensors), a .gguf file, or a directory "
    "made by jaxdecode.save"
)


def load(
    path_or_name: str | os.PathLike[str], *, mesh: Mesh | None = None, dtype: Any = None,
    on_progress: Progress | None = None,
) -> tuple[Llama, Tokenizer | None]:  # fmt: skip
    """Load a model and its tokenizer.

    Weights go one by one straight to their dtype and device, so the host needs little more memory
    than the result takes; over a mesh, each process reads only what its devices hold. No random
    weights are made.

    Args:
      path_or_name: a Hugging Face model directory (safetensors), a .gguf file, a directory made by
        `save`, "smollm2-135m" (the default model, fetched once), or "org/name" in the local Hugging
        Face cache.
      mesh: devices to cut the model over, with any of the axes data (batch), tensor (heads,
        feed-forward, vocabulary) and seq (length of the cache). None: the default device.
      dtype: "float32", "bfloat16" or "float16". None: the stored one; for quantised weights
        bfloat16 on a GPU or TPU and float32 on a CPU.
      on_progress: called with ("loading", bytes done, bytes in all), and likewise while the default
        model is fetched.

    Returns:
      (model, tokenizer); tokenizer is None if none lies beside the weights.

    Raises:
      CheckpointError: there is no such model, or its files are damaged or do not fit together.
      RequestError: dtype is none of the above, or the mesh does not divide the model.
    """
    wanted = None if dtype is None else checked_dtype(dtype)
    source = open_source(path_or_name, on_progress=on_progress)
    try:
        sharding = Sharding() if mesh is None else checked_sharding(source.config, mesh)
        if sharding.whole:
            _say(describe(source.config, sharding))
        tokenizer = source.tokenizer()
        with explain_exhaustion(lambda: None):
            return load_model(source, wanted, sharding, on_progress=on_progress), tokenizer
    finally:
        source.close()


def load_model(
    source: WeightSource, dtype: str | None, sharding: Sharding, *,
    on_progress: Progress | None = None,
) -> Llama:  # fmt: skip
    """The model of an opened source, over the devices of `sharding`; dtype None: as `load`."""
    dtype = dtype or default_dtype(source)
    devices = () if sharding.mesh is None else [d.id for d in sharding.mesh.devices.flat]
    check_same(sharding, (source.config, dtype, sharding, devices), "model, dtype and mesh")
    letters = param_letters(source.config)
    places = None
    if sharding.mesh is not None:
        places = {name: sharding.named(dims) for name, dims in letters.items()}
    params = load_params(source, dtype, shardings=places, on_progress=on_progress)
    return Llama.from_params(source.config, params, sharding)


def checked_sharding(config: LlamaConfig, mesh: Mesh) -> Sharding:
    """`fit_mesh` with the errors of this family."""
    if not isinstance(mesh, Mesh):
        raise RequestError(
            f"mesh must be a jax.sharding.Mesh or None, found {mesh!r:.100}; "
            "jax.make_mesh((2, 2), ('tensor', 'seq')) makes one"
        )
    if jax.process_index() not in {device.process_index for device in mesh.devices.flat}:
        raise RequestError(
            f"the mesh has no device of process {jax.process_index()}; each of the "
            f"{jax.process_count()} processes must have a part of the model"
        )
    try:
        return fit_mesh(config, mesh)
    except ValueError as error:
        raise RequestError(str(error)) from error


def default_dtype(source: WeightSource, platform: str | None = None) -> str:
    """The dtype in which a model is loaded unless its user asks for another.

    `platform` is where it will run; None: where JAX runs.
    """
    if not source.quantised:
        return source.config.dtype
    return "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"


def open_source(
    path_or_name: str | os.PathLike[str], *, on_progress: Progress | None = None
) -> WeightSource:
    """Open a model, reading headers only; arguments and errors are those of `load`.

    Before the default model is fetched, a line on stderr says what comes from where.
    """
    if path_or_name == DEFAULT_MODEL:
        from jaxdecode.checkpoint.default_model import fetch_default_model

        return _open_file(fetch_default_model(_say, on_progress))
    if not os.fspath(path_or_name):
        raise CheckpointError(f"the path of the model is empty; {_EXPECTED}")
    path = Path(os.path.expanduser(path_or_name))  # noqa: PTH111  # Path's raises without a home
    try:
        return _open_path(path, path_or_name)
    except OSError as error:
        raise CheckpointError(f"{shown(str(path))}: {error.strerror}; {_EXPECTED}") from None


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _open_path(path: Path, path_or_name: str | os.PathLike[str]) -> WeightSource:
    if path.is_dir():
        return _open_directory(path)
    if path.is_file():
        return _open_file(path)
    if os.path.lexists(path):
        raise CheckpointError(f"{path} is neither a file nor a directory; {_EXPECTED}")
    if isinstance(path_or_name, str) and is_hub_name(path_or_name):
        return _open_directory(find_in_hub_cache(path_or_name))
    raise CheckpointError(f"{shown(str(path))}: no such file or directory; {_EXPECTED}")


def _open_file(path: Path) -> WeightSource:
    if path.suffix.lower() in _PICKLES:
        raise _pickled(path, path.name)
    if path.suffix.lower() == ".safetensors":
        raise CheckpointError(
            f"{path} is one file of a model; load its directory, {path.parent}, with config.json"
        )
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF" and path.suffix.lower() != ".gguf":
        raise CheckpointError(f"{path} is not a model file known here; {_EXPECTED}")
    from jaxdecode.checkpoint.gguf_file import open_gguf

    return open_gguf(path)


def _open_directory(directory: Path) -> WeightSource:
    names = sorted(path.name for path in directory.iterdir())
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        from jaxdecode.checkpoint.hf_directory import open_hf_directory

        return open_hf_directory(directory)
    if (directory / "weights").is_dir():
        from jaxdecode.checkpoint.orbax_directory import open_orbax_directory

        return open_orbax_directory(directory)
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if ggufs:
        raise CheckpointError(
            f"{directory} holds {len(ggufs)} GGUF files: {shown(', '.join(ggufs))}; "
            "load one by its path"
        )
    pickles = [name for name in names if name.lower().endswith(_PICKLES)]
    if pickles:
        raise _pickled(directory, ", ".join(pickles))
    raise CheckpointError(f"{directory} holds no model; {_EXPECTED}")


def _pickled(path: Path, names: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {shown(names)} may run any code when read, so it is never opened; "
        "convert the model to safetensors, or download it in that format"
    )
