"""A GPU without JAX's plugin for it: what the commands say, and when they say nothing."""

from __future__ import annotations

import types

import pytest

from jaxdecode.cli import cuda_plugin, runtime

SMI = "/usr/bin/nvidia-smi"
MISSING = (
    "an NVIDIA GPU seems to be here ({}), but JAX has no CUDA plugin: "
    "pip install 'jax[cuda13]', or 'jax[cuda12]' for an older driver"
)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(driver=False, command=False, plugins=()): what seems to be installed. Gives the path
    of the driver's file."""
    file = tmp_path / "driver"
    monkeypatch.setattr(cuda_plugin, "_DRIVER_FILES", (str(tmp_path / "none"), str(file)))

    def make(driver=False, command=False, plugins=()):
        if driver:
            file.touch()
        monkeypatch.setattr(cuda_plugin.shutil, "which", lambda _: SMI if command else None)
        monkeypatch.setattr(cuda_plugin, "is_installed", lambda name: name in plugins)
        return str(file)

    return make


def test_a_driver_without_a_plugin_is_noticed(machine):
    machine()
    assert cuda_plugin.missing_plugin() is None
    machine(command=True)
    assert cuda_plugin.missing_plugin() == MISSING.format(SMI)
    file = machine(driver=True, command=True)
    assert cuda_plugin.missing_plugin() == MISSING.format(file)
    for plugin in ("jax-cuda12-plugin", "jax-cuda13-plugin"):
        machine(driver=True, command=True, plugins=(plugin,))
        assert cuda_plugin.missing_plugin() is None


def test_what_is_installed_is_seen():
    assert cuda_plugin.is_installed("jax")
    assert not cuda_plugin.is_installed("jax-cuda99-plugin")


# The platform of the device that JAX chose, and JAX_PLATFORMS.
@pytest.mark.parametrize(
    ("platform", "platforms", "is_said"),
    [("cpu", None, True), ("cpu", "cpu", False), ("gpu", None, False), ("tpu", None, False)],
)
def test_who_left_the_choice_to_jax_is_warned(
    machine, monkeypatch, capsys, platform, platforms, is_said
):
    machine(command=True)
    device = types.SimpleNamespace(platform=platform)
    monkeypatch.setattr(runtime, "select_device", lambda name: device)
    config = types.SimpleNamespace(values={"jax_platforms": platforms})
    monkeypatch.setattr(runtime.jax, "config", config)
    assert runtime.announced_device("auto") is device
    assert capsys.readouterr().err == (f"warning: {MISSING.format(SMI)}\n" if is_said else "")


@pytest.mark.parametrize("verb", ["generate", "bench"])
def test_the_verbs_that_compute_warn(ask, cli, model, machine, monkeypatch, verb):
    machine(command=True)
    warned = []
    announced = runtime.announced_device
    monkeypatch.setattr(
        runtime, "announced_device", lambda name: warned.append(name) or announced(name)
    )
    if verb == "generate":
        assert ask("-p", "hi")[0] == 0
    else:
        assert cli("bench", "-m", model, "--attn", "no such")[0] == 2
    assert warned == ["auto"]


def test_doctor_says_it(cli, machine):
    machine()
    assert "plugin: " not in cli("doctor")[1].replace("-plugin: ", "")
    machine(command=True)
    assert f"\nplugin: {MISSING.format(SMI)}\n" in cli("doctor")[1]
