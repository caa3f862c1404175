"""Devices: the known ones, and what this machine's own have free."""

from __future__ import annotations

import dataclasses
import os

import jax
import pytest

from jaxdecode import device_model
from jaxdecode.device_model import DEVICES, of_device


@dataclasses.dataclass
class Device:
    device_kind: str
    stats: dict | None
    platform: str = "gpu"

    def memory_stats(self):
        return self.stats


def test_of_a_known_gpu():
    found = of_device(Device("NVIDIA H200", {"bytes_limit": 1000, "bytes_in_use": 300}))
    assert found == dataclasses.replace(DEVICES["h200"], memory=700)
    held = of_device(Device("NVIDIA H200", {"bytes_limit": 1000, "bytes_in_use": 300}), held=250)
    assert held.memory == 950


def test_of_an_unknown_gpu_and_of_one_that_keeps_no_account():
    found = of_device(Device("Some GPU", {"bytes_limit": 1000}))
    assert (found.name, found.memory, found.speeds) == ("Some GPU", 1000, None)
    assert of_device(Device("NVIDIA H200", None)) is None
    assert of_device(Device("NVIDIA H200", {})) is None


def test_of_this_cpu():
    found = of_device(jax.devices("cpu")[0])
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert (found.name, found.platform, found.speeds) == ("cpu", "cpu", None)
    assert 2**20 < found.memory < 4 * installed


def test_free_host_memory_counts_swap(tmp_path):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal: 900 kB\nMemAvailable:  500 kB\nSwapFree: 20 kB\n")
    assert device_model._free_host_memory(file) == 520 * 1024


@pytest.mark.parametrize("content", [None, "MemTotal: 900 kB\n"])
def test_free_host_memory_where_the_system_does_not_say(tmp_path, content):
    file = tmp_path / "meminfo"
    if content is not None:
        file.write_text(content)
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert device_model._free_host_memory(file) == installed


@pytest.mark.parametrize("name", DEVICES)
def test_known_devices_are_plausible(name):
    """Order of magnitude, so that no unit is mixed up."""
    device = DEVICES[name]
    assert 10e9 < device.memory < 1e12
    assert 1 < device.speeds.read_tb_s < 10
    assert 100 < device.speeds.tflop_s < 5000
    assert 100 < device.speeds.link_gb_s < 1000
    assert 10 < device.speeds.host_link_gb_s < device.speeds.link_gb_s
    assert device.speeds.read_source in ("assumed", "datasheet")
