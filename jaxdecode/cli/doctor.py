"""`jaxdecode doctor`: what this machine offers, for its user and for reports of faults."""

from __future__ import annotations

import importlib.metadata
import platform
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import jaxdecode
from jaxdecode.cli import cuda_plugin, options
from jaxdecode.cli.output import write_text
from jaxdecode.errors import DeviceError
from jaxdecode.units import readable_bytes

if TYPE_CHECKING:
    import jax

    from jaxdecode.models.config import LlamaConfig

_PACKAGES = (
    "jax", "jaxlib", "flax", "numpy", "orbax-checkpoint", "safetensors", "tokenizers",
    "gguf", "jinja2", "typer", "rich", *cuda_plugin.PLUGINS,
)  # fmt: skip


def doctor(device: options.Device = "auto", verbose: options.Verbose = False) -> None:
    """Show versions, devices, cache directories and which attention would run here, and why."""
    from jaxdecode.cli import runtime

    lines = [f"jaxdecode: {jaxdecode.__version__}"]
    lines.append(f"python: {platform.python_version()} on {platform.platform()}")
    lines += [f"{package}: {_version(package)}" for package in _PACKAGES]
    lines.append(f"cache: {_directory(runtime.cache_directory())}")
    lines.append(f"compiled programs: {_directory(runtime.compilation_cache_directory())}")
    if (missing := cuda_plugin.missing_plugin()) is not None:
        lines.append(f"plugin: {missing}")
    try:
        lines += _device_lines(runtime.select_device(device))
    except DeviceError as error:
        lines.append(f"devices: none ({error})")
    write_text("\n".join(lines) + "\n")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _directory(path: Path) -> str:
    """Where it is, who may enter it, how much it holds, and what is wrong with it."""
    from jaxdecode.cli.runtime import privacy_fault

    if not path.exists():
        return f"{path} (not made yet)"
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    mode = stat.S_IMODE(path.stat().st_mode)
    fault = privacy_fault(path)
    return (
        f"{path} (mode {mode:04o}, {readable_bytes(size)}{'; not used: ' + fault if fault else ''})"
    )


def _device_lines(chosen: jax.Device) -> list[str]:
    """The devices, and how a decode step of an 8B model would run on the chosen one."""
    import jax

    from jaxdecode.bench import choose_attention
    from jaxdecode.cli.runtime import brief_of_steps
    from jaxdecode.models.config import PRESETS
    from jaxdecode.models.sharding import Sharding

    devices = jax.devices(chosen.platform)
    lines = [f"device: {_device(device)}" for device in devices]
    config = PRESETS["llama-3.1-8b"]
    heads = f"{config.num_q_heads} query and {config.num_kv_heads} KV heads of {config.head_dim}"
    for dtype in ("bfloat16", "float32"):
        choice = choose_attention(config, dtype, "auto")
        words = brief_of_steps(choice, config, dtype, Sharding())
        lines.append(f"attention: {words} (a decode step in {dtype}, {heads})")
    lines.append(f"layers: {_layers()}")
    lines.append(f"{_auto_mesh(config, len(devices))} (--mesh auto, for the same model)")
    lines.append(f"collectives: {_collectives(devices)}")
    return lines


def _layers() -> str:
    """Whether one kernel can do what is between two attentions, and if not, why."""
    from jaxdecode.pallas_kernels import fused_layer

    if (obstacle := fused_layer.why_not_here()) is not None:
        return f"not fused: {obstacle}"
    return (
        "fused: a step of one token on one GPU goes from one attention to the next in one kernel, "
        f"with weights in {' or '.join(fused_layer.DTYPES)} whose sizes fit it"
    )


def _auto_mesh(config: LlamaConfig, num_devices: int) -> str:
    """What --mesh auto would choose for this model, or why it could not."""
    from jaxdecode.models.sharding import auto_sizes, describe, fit

    try:
        sharding = fit(config, auto_sizes(config, num_devices))
    except ValueError as error:
        return f"mesh: none: {error}"
    return describe(config, sharding)


def _collectives(devices: list[jax.Device]) -> str:
    """What the devices exchange in each layer of a decode step goes through, and why."""
    import numpy as np
    from jax.sharding import Mesh

    from jaxdecode.models.sharding import choose_collectives

    return ": ".join(choose_collectives(Mesh(np.array(devices), ("tensor",))))


def _device(device: jax.Device) -> str:
    memory = (device.memory_stats() or {}).get("bytes_limit")
    limit = f", {readable_bytes(memory)} for JAX" if memory else ""
    return f"{device.platform} {device.id}: {device.device_kind}{limit}"
