"""Imports go one way, cost little, and never make a second copy of a class."""

from __future__ import annotations

import json
import pathlib
import statistics
import subprocess
import sys
import sysconfig

import grimp
import pytest
import ruff

HEAVY = {
    "flax",
    "gguf",
    "jinja2",
    "matplotlib",
    "optax",
    "orbax",
    "platformdirs",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "typer",
}


def run_python(code, cwd):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )


def modules_after(statement, cwd):
    """Top-level modules in a new interpreter after `statement`."""
    code = f"{statement}; import sys, json; print(json.dumps(sorted(sys.modules)))"
    result = run_python(code, cwd)
    assert result.returncode == 0, result.stderr
    return {name.partition(".")[0] for name in json.loads(result.stdout)}


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph(
        "jaxdecode",
        include_external_packages=True,
        exclude_type_checking_imports=True,
        cache_dir=None,
    )


def lint_imports(root):
    command = [pathlib.Path(sysconfig.get_path("scripts")) / "lint-imports", "--no-cache"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_import_contracts_hold(project_root):
    result = lint_imports(project_root)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_import_contracts_notice_an_upward_import(copy_tree, tmp_path):
    tree = copy_tree(tmp_path / "tree")
    with (tree / "pallas_kernels" / "combine.py").open("a") as file:
        file.write("\nimport flax\nimport jaxdecode.errors\n")
    result = lint_imports(tree)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "2 broken" in result.stdout


def test_rooms_do_not_import_the_package_above_them(graph):
    # import-linter's layers are modules inside jaxdecode, so they do not cover jaxdecode itself.
    importers = graph.find_modules_that_directly_import("jaxdecode")
    assert not [name for name in importers if in_rooms(name, "models", "pallas_kernels")]


def test_kernels_import_only_jax_and_numpy(graph):
    found = set()
    for name in graph.modules:
        if in_rooms(name, "pallas_kernels"):
            imported = graph.find_modules_directly_imported_by(name)
            found |= {other.partition(".")[0] for other in imported}
    outside = found - set(sys.stdlib_module_names) - {"jaxdecode"}
    assert outside <= {"jax", "numpy"}
    assert "jax" in outside  # the graph did see the room behind its link


def in_rooms(name, *rooms):
    return any(
        name == f"jaxdecode.{room}" or name.startswith(f"jaxdecode.{room}.") for room in rooms
    )


@pytest.mark.parametrize(
    "statement",
    [
        "import jaxdecode",
        "import jaxdecode.pallas_kernels",
        "import jaxdecode.models.config",
        "import jaxdecode.errors",
        "import jaxdecode; jaxdecode.decode_attention; jaxdecode.LlamaConfig",
    ],
)
def test_import_brings_no_heavy_library(statement, project_root):
    assert not modules_after(statement, project_root) & HEAVY


def test_heavy_library_would_be_noticed(project_root):
    assert "rich" in modules_after("import jaxdecode, rich", project_root)


def test_import_costs_little_more_than_jax(project_root):
    # jax first, in the same process, so only the difference is timed.
    code = (
        "import time, jax; start = time.perf_counter(); import jaxdecode; "
        "print(time.perf_counter() - start)"
    )
    seconds = [float(run_python(code, project_root).stdout) for _ in range(5)]
    assert statistics.median(seconds) < 0.3


@pytest.mark.parametrize("name", ["models", "pallas_kernels"])
def test_room_refuses_its_bare_name(name, project_root):
    result = run_python(f"import {name}", project_root)
    assert result.returncode == 1
    assert f"import it as 'jaxdecode.{name}'" in result.stderr


def test_every_public_name_resolves(project_root):
    code = "import jaxdecode; [getattr(jaxdecode, name) for name in jaxdecode.__all__]"
    result = run_python(code, project_root)
    assert result.returncode == 0, result.stderr


def test_ruff_forbids_bare_rooms(project_root):
    command = [ruff.find_ruff_bin(), "check", "--select", "TID251", "--stdin-filename", "x.py", "-"]
    code = "import models.config\nfrom pallas_kernels import xla\nimport jaxdecode.models\n"
    result = subprocess.run(
        command, input=code, cwd=project_root, capture_output=True, text=True, check=False
    )
    assert result.stdout.count("TID251") == 2, result.stdout + result.stderr
