"""The wheel holds jaxdecode only, from any kind of tree, and installs beside a user's code."""

from __future__ import annotations

import email
import pathlib
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest

import jaxdecode

INFO = f"jaxdecode-{jaxdecode.__version__}.dist-info"

BUILD = """
import os, sys
from setuptools import build_meta
tree, kind, target = sys.argv[1:]
os.chdir(tree)
print(getattr(build_meta, "build_" + kind)(target))
"""


def run(*command, cwd, status=0):
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout


def build(kind, tree, target):
    """Builds a "wheel", "editable" or "sdist" of `tree`, without network or isolation."""
    target.mkdir()
    # -P: the tree's own models/ must not be importable while it is built.
    output = run(sys.executable, "-P", "-c", BUILD, tree, kind, target, cwd=target)
    return target / output.splitlines()[-1]


def wheel_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def wheel(copy_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    return build("wheel", copy_tree(folder / "tree"), folder / "dist")


def expected_files(project_files):
    """What should be installed: the three folders, two of them moved into the first."""
    expected = set()
    for path in project_files:
        room = path.parts[0]
        if room == "jaxdecode" and str(path) not in (
            "jaxdecode/models",
            "jaxdecode/pallas_kernels",
        ):
            expected.add(path.as_posix())
        elif room in ("models", "pallas_kernels"):
            expected.add(f"jaxdecode/{path.as_posix()}")
    return expected


def test_wheel_holds_exactly_the_package(wheel, project_files):
    files = wheel_files(wheel)
    packaged = {name for name in files if ".dist-info/" not in name}
    assert packaged == expected_files(project_files)
    assert "jaxdecode/py.typed" in packaged
    assert "jaxdecode/models/config.py" in packaged
    assert {name.partition("/")[0] for name in files - packaged} == {INFO}


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"{INFO}/METADATA"))
        assert archive.read(f"{INFO}/licenses/LICENSE").lstrip().startswith(b"Apache License")
        assert b"jaxdecode = jaxdecode.cli:main" in archive.read(f"{INFO}/entry_points.txt")
        assert archive.read(f"{INFO}/top_level.txt").split() == [b"jaxdecode"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {"cuda12", "cuda13", "dev", "plot", "test"}
    needs = " ".join(metadata.get_all("Requires-Dist"))
    assert "torch" not in needs
    assert "transformers" not in needs


def test_zip_of_the_tree_builds_the_same_wheel(wheel, copy_tree, tmp_path):
    # A zip download holds a link as a small text file with the link's target.
    tree = copy_tree(tmp_path / "tree", links=False)
    assert (tree / "jaxdecode" / "models").read_text() == "../models"
    zipped = build("wheel", tree, tmp_path / "dist")
    assert wheel_files(zipped) == wheel_files(wheel)


def test_sdist_builds_the_same_wheel(wheel, copy_tree, tmp_path):
    sdist = build("sdist", copy_tree(tmp_path / "tree"), tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (tree,) = (tmp_path / "unpacked").iterdir()
    assert (tree / "tests" / "conftest.py").is_file()
    assert wheel_files(build("wheel", tree, tmp_path / "dist")) == wheel_files(wheel)


def fresh_environment(folder, wheel):
    """Makes a venv in `folder`, installs `wheel` into it, returns its Python.

    The dependencies come from this environment, through a .pth file: installing them again would
    take minutes and the network, and show nothing about the wheel. A path added by a .pth file is
    not searched for .pth files itself, so an editable jaxdecode installed here stays out.
    """
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(paths)))
    return python


@pytest.fixture(scope="module")
def installed_python(wheel, tmp_path_factory):
    return fresh_environment(tmp_path_factory.mktemp("fresh") / "venv", wheel)


def test_installed_package_lives_beside_a_users_modules(installed_python, tmp_path):
    (tmp_path / "models.py").write_text("mine = True\n")
    (tmp_path / "pallas_kernels.py").write_text("mine = True\n")
    script = tmp_path / "train.py"
    script.write_text(
        "import models, pallas_kernels, jaxdecode\n"
        "from jaxdecode.models.config import LlamaConfig\n"
        "assert models.mine and pallas_kernels.mine\n"
        "assert jaxdecode.LlamaConfig is LlamaConfig\n"
        "print(jaxdecode.decode_attention.__module__, jaxdecode.__file__)\n"
    )
    module, file = run(installed_python, script, cwd=tmp_path).split()
    assert module.startswith("jaxdecode.pallas_kernels")
    assert pathlib.Path(file).is_relative_to(installed_python.parent.parent)


@pytest.mark.parametrize("module", [True, False], ids=["python-m", "script"])
def test_installed_command_runs(module, installed_python, tmp_path):
    script = installed_python.parent / "jaxdecode"
    command = [installed_python, "-m", "jaxdecode"] if module else [script]
    assert jaxdecode.__version__ in run(*command, "--version", cwd=tmp_path)


def test_editable_install_of_a_zip_works_inside_and_outside_of_it(copy_tree, tmp_path):
    tree = copy_tree(tmp_path / "tree", links=False)
    editable = build("editable", tree, tmp_path / "dist")
    python = fresh_environment(tmp_path / "venv", editable)
    code = "import jaxdecode.models.config as config; print(config.__file__)"
    for folder in (tree, tmp_path):  # python -c puts its folder first on the path
        found = run(python, "-c", code, cwd=folder).strip()
        assert found == str(tree / "models" / "config.py")
