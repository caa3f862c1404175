"""An NVIDIA GPU that JAX does not see, because its plugin for CUDA is not installed."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

INSTALL = "pip install 'jax[cuda13]', or 'jax[cuda12]' for an older driver"
PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
# What the driver makes, on Linux and, the last, on WSL2.
_DRIVER_FILES = ("/proc/driver/nvidia/version", "/dev/nvidia0", "/usr/lib/wsl/lib/libcuda.so.1")
_DRIVER_COMMAND = "nvidia-smi"


def missing_plugin() -> str | None:
    """What to install, if a driver says that there is a GPU and no plugin is installed."""
    signs = [name for name in _DRIVER_FILES if Path(name).exists()]
    signs += filter(None, [shutil.which(_DRIVER_COMMAND)])
    if not signs or any(map(is_installed, PLUGINS)):
        return None
    return f"an NVIDIA GPU seems to be here ({signs[0]}), but JAX has no CUDA plugin: {INSTALL}"


def is_installed(distribution: str) -> bool:
    """Whether this Python has it."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
