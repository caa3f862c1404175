"""Promises of the repository itself: sizes, commands that exist, results that match the code."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys

import pytest

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 150  # a kernel body is one long straight line by nature; files *_kernel.py

# Built from parts, so that this file does not contain what it looks for.
ONE_MACHINE = re.compile("|".join(["/" + name + "/" for name in ("root", "work", "home", "Users")]))


def python_files(project_files, project_root):
    return [
        project_root / path
        for path in project_files
        if path.suffix == ".py" and not (project_root / path).is_symlink()
    ]


def too_long(path):
    """Lines such as "name: function f has 70 lines, at most 60"; nested functions count too."""
    source = path.read_text()
    lines = source.count("\n")
    if lines > MAX_FILE_LINES:
        yield f"{path.name}: {lines} lines, at most {MAX_FILE_LINES}"
    most = MAX_KERNEL_LINES if path.stem.endswith("_kernel") else MAX_FUNCTION_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > most:
                yield f"{path.name}: function {node.name} has {length} lines, at most {most}"


def test_files_and_functions_are_short(project_files, project_root):
    files = python_files(project_files, project_root)
    assert project_root / "models" / "config.py" in files
    assert "\n".join(line for path in files for line in too_long(path)) == ""


def test_long_function_would_be_noticed(tmp_path):
    path = tmp_path / "long.py"
    path.write_text("def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES)
    assert list(too_long(path)) == ["long.py: function f has 61 lines, at most 60"]
    path.write_text("x = 1\n" * (MAX_FILE_LINES + 1))
    assert list(too_long(path)) == ["long.py: 401 lines, at most 400"]


def test_no_file_names_a_folder_of_one_machine(project_files, project_root):
    found = []
    for name in project_files:
        path = project_root / name
        content = b"" if path.is_symlink() else path.read_bytes()
        if b"\0" not in content:
            text = content.decode("utf-8")
            found += [f"{name}: {match.group()}" for match in ONE_MACHINE.finditer(text)]
    assert found == []


def test_links_are_relative_and_lead_to_the_rooms(project_files, project_root):
    links = {
        path.as_posix(): str((project_root / path).readlink())
        for path in project_files
        if (project_root / path).is_symlink()
    }
    if links:  # a tree from a zip has none
        assert links == {
            "jaxdecode/models": "../models",
            "jaxdecode/pallas_kernels": "../pallas_kernels",
        }


def makefile_targets(project_root):
    return set(re.findall(r"^([a-z-]+):", (project_root / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md", "SECURITY.md", ".ci/run"])
def test_documents_name_only_make_targets_that_exist(document, project_root):
    named = set(re.findall(r"\bmake ([a-z-]+)", (project_root / document).read_text()))
    assert named - makefile_targets(project_root) - {"sure"} == set()


def test_readme_says_both_commands_also_without_make(project_root):
    readme = (project_root / "README.md").read_text()
    makefile = (project_root / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    assert "make demo" in readme
    assert "make test" in readme
    commands = re.findall(r"^(\.venv/bin/\S+(?: \S+)*)$", readme, re.MULTILINE)
    for needed in ('pip install -e ".[test]"', "jaxdecode generate -p", "python -m pytest"):
        assert any(needed in command for command in commands), needed
    # The test command is the same one, so that both ways run the same tests.
    (tests,) = {command for command in commands if "-m pytest" in command}
    assert f"\t{tests}\n" in makefile


def test_make_refuses_an_old_python(project_root, tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")  # what the version check of an older Python returns
    old.chmod(0o755)
    command = ["make", "demo", f"PYTHON={old}", f"VENV={tmp_path}/venv"]
    result = subprocess.run(command, cwd=project_root, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "jaxdecode needs Python 3.11 or newer" in result.stderr
    assert "make demo PYTHON=" in result.stderr
    assert not (tmp_path / "venv").exists()


@pytest.fixture
def run_tests(project_root, tmp_path):
    """run_tests(ci, *options) -> (exit status, output) of tmp_path's tests with our conftest.py."""
    (tmp_path / "conftest.py").write_text((project_root / "tests" / "conftest.py").read_text())

    def run(ci, *options):
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *options]
        environment = {**os.environ, "CI": ci}
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        return result.returncode, result.stdout + result.stderr

    return run


def test_skips_fail_under_ci(run_tests, tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_skip(): pytest.skip('no reason')\n"
        "@pytest.mark.xfail\n"
        "def test_xfail(): raise ValueError\n"
    )
    for ci, expected, outcome in (
        ("true", 1, "1 failed, 1 xfailed"),
        ("", 0, "1 skipped, 1 xfailed"),
    ):
        status, output = run_tests(ci)
        assert status == expected, output
        assert outcome in output


@pytest.mark.contract
@pytest.mark.parametrize(
    ("ci", "version", "tests"),
    [("true", (0, 11, 1), 1), ("", (0, 11, 1), 1), ("true", (0, 11, 2), 2)],
)
def test_kernels_go_untested_only_where_no_jax_has_them(run_tests, tmp_path, ci, version, tests):
    """Python 3.11 gets none; under CI a newer one may not get an old jax unnoticed."""
    (tmp_path / "pretend_jax.py").write_text(f"import jax\njax.__version_info__ = {version}\n")
    for name in ("test_it.py", "test_norm.py"):
        (tmp_path / name).write_text("def test(): pass\n")
    status, output = run_tests(ci, "-p", "pretend_jax")
    if ci and tests == 1 and sys.version_info >= (3, 12):
        assert status == pytest.ExitCode.USAGE_ERROR, output
        assert "CI=true does not allow Python >= 3.12 to leave out the GPU kernels' tests" in output
    else:
        assert status == 0, output
        assert f"{tests} passed" in output


@pytest.mark.parametrize(
    ("expression", "selects"),
    [("not gpu", False), ("contract and not gpu", False), ("", False), ("gpu", True)],
)
def test_gpu_is_used_only_when_asked_for(expression, selects):
    from conftest import selects_gpu

    assert selects_gpu(expression) is selects


@pytest.fixture
def benchmarks(project_root, monkeypatch):
    monkeypatch.syspath_prepend(project_root / "benchmarks")
    import results_check
    import source_hash

    return source_hash, results_check


def test_source_hash_follows_names_and_contents(benchmarks, copy_tree, tmp_path):
    source_hash, _ = benchmarks
    tree = copy_tree(tmp_path / "tree")
    before = source_hash.source_hash(tree)
    assert source_hash.source_hash() == before
    # Without links nothing changes: each file counts once, under its own folder.
    assert source_hash.source_hash(copy_tree(tmp_path / "zip", links=False)) == before
    names = [path.as_posix() for path in source_hash.source_files(tree)]
    assert "models/config.py" in names
    assert "jaxdecode/models/config.py" not in names

    (tree / "README.md").write_text("changed")
    assert source_hash.source_hash(tree) == before
    (tree / "models" / "config.py").rename(tree / "models" / "config2.py")
    renamed = source_hash.source_hash(tree)
    with (tree / "models" / "config2.py").open("a") as file:
        file.write("#")
    assert len({before, renamed, source_hash.source_hash(tree)}) == 3


def test_results_check_names_files_of_other_code(benchmarks, tmp_path, capsys):
    source_hash, results_check = benchmarks
    current = {"source": source_hash.source_hash(), "date": "2026-01-02", "rows": []}
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "new.json").write_text(json.dumps(current))
    assert results_check.main([str(tmp_path)]) == 0

    (tmp_path / "h200" / "old.json").write_text(json.dumps(current | {"source": "0"}))
    (tmp_path / "h200" / "bare.json").write_text("[]")
    (tmp_path / "h200" / "cut.json").write_text('{"source"')
    capsys.readouterr()
    assert results_check.main([str(tmp_path)]) == 1
    bare, cut, old = capsys.readouterr().out.splitlines()
    assert bare.startswith('h200/bare.json: has no "source"')
    assert cut.startswith("h200/cut.json: not a JSON file")
    assert old == "h200/old.json: measured other code (of 2026-01-02); run it again"
