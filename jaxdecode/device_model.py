"""What a device offers a decoder: its memory, and the speeds that bound a step.

Figures called datasheet are NVIDIA's: the A100, H100 and H200 Tensor Core GPU datasheets (SXM
modules, matrix rates without sparsity, NVLink counted in one direction), and the DGX A100, H100 and
H200 datasheets for the network between hosts (one 200 or 400 Gbit/s port for each GPU). The others
say where they come from. Nothing here imports jax, so that help can name the devices.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

# What a step waits for a sum of a few kilobytes over the GPUs of a host, and for a gather likewise:
# one through NCCL takes 15 to 19 us on two H200s. For other GPUs an assumption.
_COLLECTIVE_US = 16.0
# What reaching another host adds: all-reduce of 8 to 64 bytes between two A100 hosts over HDR
# InfiniBand, one GPU of each, as reported in github.com/NVIDIA/nccl-tests issue 150. More hosts
# take longer. For other networks an assumption.
_HOST_COLLECTIVE_US = 19.0
# How fast a step is beside its bound: the share of the reading rate that it reaches, and what each
# layer takes beyond that, in slow starts, gaps and small kernels. A layer is one kernel where one
# device decodes one sequence. They fit the steps of benchmarks/results/h200 within 8 %, and most
# within 3 %. For other GPUs an assumption.
_READ_SHARE = 0.95
_LAYER_US, _LONE_LAYER_US = 26.0, 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speeds:
    """How fast a GPU reads, computes and talks.

    Attributes:
      read_tb_s: bytes read from its memory, in 1e12 a second.
      read_source: "datasheet", or "assumed" where another figure is more likely.
      tflop_s: dense bfloat16 matrix products, in 1e12 operations a second.
      link_gb_s: to the GPUs of the same host, in 1e9 bytes a second each way.
      host_link_gb_s: to other hosts, for each GPU, likewise.
      collective_us: a collective of a few kilobytes inside a host, in microseconds.
      host_collective_us: what it takes longer when it leaves the host.
      read_share: of read_tb_s, what a step reaches.
      layer_us: what a layer takes beyond reading its bytes at that rate.
      lone_layer_us: likewise, of one sequence on one device.
    """

    read_tb_s: float
    read_source: str
    tflop_s: float
    link_gb_s: float
    host_link_gb_s: float
    collective_us: float = _COLLECTIVE_US
    host_collective_us: float = _HOST_COLLECTIVE_US
    read_share: float = _READ_SHARE
    layer_us: float = _LAYER_US
    lone_layer_us: float = _LONE_LAYER_US


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceModel:
    """One device and its like.

    Attributes:
      name: as JAX calls it (`jax.Device.device_kind`).
      platform: "cpu", or that of the accelerator. The devices of a CPU share one memory.
      memory: bytes that arrays may take on one device.
      speeds: None where they are not known.
    """

    name: str
    platform: str = "gpu"
    memory: int
    speeds: Speeds | None = None


_HOPPER = {"tflop_s": 989.0, "link_gb_s": 450.0, "host_link_gb_s": 50.0}
_AMPERE = {"tflop_s": 312.0, "link_gb_s": 300.0, "host_link_gb_s": 25.0}

DEVICES: dict[str, DeviceModel] = {
    "a100-40gb": DeviceModel(
        name="NVIDIA A100-SXM4-40GB", memory=40 * 10**9,
        speeds=Speeds(read_tb_s=1.555, read_source="datasheet", **_AMPERE),
    ),
    "a100-80gb": DeviceModel(
        name="NVIDIA A100-SXM4-80GB", memory=80 * 10**9,
        speeds=Speeds(read_tb_s=2.039, read_source="datasheet", **_AMPERE),
    ),
    "h100-80gb": DeviceModel(
        name="NVIDIA H100 80GB HBM3", memory=80 * 10**9,
        speeds=Speeds(read_tb_s=3.35, read_source="datasheet", **_HOPPER),
    ),
    # The datasheet says 4.8 TB/s; what could be read was 4.54 to 4.66 in the runs whose results are
    # in benchmarks/results/h200.
    "h200": DeviceModel(
        name="NVIDIA H200", memory=141 * 10**9,
        speeds=Speeds(read_tb_s=4.6, read_source="assumed", **_HOPPER),
    ),
}  # fmt: skip


def of_device(device: jax.Device, held: int = 0) -> DeviceModel | None:
    """The model of a device of this machine, with the memory that is free on it now.

    Args:
      held: bytes in use on it that count as free, such as weights that a plan counts itself.

    Returns:
      None if the device keeps no account of its memory (some of JAX's allocators do not).
    """
    memory = _free_host_memory() if device.platform == "cpu" else _free_memory(device)
    if memory is None:
        return None
    known = (model for model in DEVICES.values() if model.name == device.device_kind)
    speeds = next((model.speeds for model in known), None)
    return DeviceModel(
        name=device.device_kind, platform=device.platform, memory=memory + held, speeds=speeds
    )


def _free_memory(device: jax.Device) -> int | None:
    """What JAX may still take of its share of the device's memory."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def _free_host_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """What processes may still take, swap counted; all memory where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available, swap = (int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
        return (available + swap) * 1024
    except (OSError, KeyError):  # no Linux, or one without the estimate
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
