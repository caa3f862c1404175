"""The split-KV kernels under compute-sanitizer: no access out of bounds, no race."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.alone]

SCRIPT = pathlib.Path(__file__).with_name("sanitized_kernels.py")
ERRORS_FOUND = 9


def sanitized(tool: str, kernels: str, project_root) -> subprocess.CompletedProcess:
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin", "/opt/cuda/bin"]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    if program is None:
        pytest.fail(
            "compute-sanitizer is neither on PATH nor under /usr/local/cuda/bin; it comes with the "
            "CUDA toolkit"
        )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(project_root), os.environ.get("PYTHONPATH", "")]),
        # Each array is an allocation of its own, so that its end is known to the tool.
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    }
    command = [program, "--tool", tool, "--error-exitcode", str(ERRORS_FOUND)]
    if tool == "racecheck":
        command += ["--racecheck-report", "all"]  # its analysis alone overlooks the planted one
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]  # JAX asks for what may not exist
    return subprocess.run(
        [*command, sys.executable, str(SCRIPT), kernels],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_flash_decode_is_clean(tool, project_root):
    found = sanitized(tool, "flash_decode", project_root)
    assert found.returncode == 0, found.stdout[-4000:]
    assert "done" in found.stdout


@pytest.mark.parametrize(("tool", "fault"), [("memcheck", "out_of_bounds"), ("racecheck", "race")])
def test_a_planted_fault_is_noticed(tool, fault, project_root):
    found = sanitized(tool, fault, project_root)
    assert found.returncode == ERRORS_FOUND, found.stdout[-4000:]
