"""The child process of a chat template: what it sees, what it may use, and how it ends."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from template_cases import no_process_left, render

from jaxdecode import chat_template
from jaxdecode.errors import ChatTemplateError

TEMPLATE = "{{ messages[0].content }}"


@pytest.fixture
def child(monkeypatch, tmp_path):
    """child(source) puts a program of our own in the place of the one that renders."""

    def replace(source):
        program = tmp_path / "chat_template_child.py"
        program.write_text(f"import json, os, signal, sys, time\n{source}\n")
        monkeypatch.setattr(chat_template, "_CHILD", program)

    return replace


def test_child_sees_nothing_of_this_process(child, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child(
        "sys.stdin.buffer.read()\n"
        "fds = [fd for fd in range(3, 200) if os.path.exists(f'/dev/fd/{fd}')]\n"
        "seen = [sorted(os.environ), fds, sys.stdin.read(), os.getcwd()]\n"
        "seen += [os.getsid(0) == os.getpid(), sys.path]\n"
        "print(json.dumps({'text': json.dumps(seen)}))\n"
    )
    with (tmp_path / "open").open("w") as file:
        inherited = file.fileno()
        os.set_inheritable(inherited, True)
        variables, fds, rest, directory, own_session, path = json.loads(render(TEMPLATE))
    # Python's own start may set a locale; listing descriptors may open one.
    assert set(variables) <= {"LC_CTYPE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"}
    assert inherited not in fds
    assert (rest, directory, own_session) == ("", "/", True)
    assert str(tmp_path) not in path
    assert not {"", str(Path.cwd())} & set(path)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("sys.exit(3)", r"ended without an answer \(exit status 3\)"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", rf"crashed.*signal {int(signal.SIGSEGV)}"),
        ("os.kill(os.getpid(), signal.SIGXCPU)", "more than 2 s"),
        ("print('no json')", "without an answer"),
        ("print('[1]')", "without an answer"),
        ("print('[' * 100000)", "without an answer"),
        ("print(json.dumps({'text': 1}))", "failed: None"),
        ("print(json.dumps({'error': 'import', 'message': 'none'}))", "need the jinja2 package"),
        ("while True: os.write(1, b'x' * 65536)", "did not finish: killed"),
    ],
)
def test_whatever_the_child_does_is_an_error_of_ours(source, match, child):
    child(source)
    with no_process_left(), pytest.raises(ChatTemplateError, match=match):
        render(TEMPLATE)


def test_a_child_that_dies_before_it_reads_the_request(child):
    child("sys.exit(4)")
    with no_process_left(), pytest.raises(ChatTemplateError, match=r"exit status 4"):
        render(TEMPLATE, [{"role": "user", "content": "x" * 1_000_000}])


@pytest.mark.parametrize("source", ["time.sleep(60)", "os.close(1); time.sleep(60)"])
def test_a_child_that_hangs_is_killed(source, child, monkeypatch):
    monkeypatch.setattr(chat_template, "WALL_SECONDS", 0.5)
    child(source)
    start = time.monotonic()
    with (
        no_process_left(),
        pytest.raises(ChatTemplateError, match=r"did not finish: killed after 0.5 s"),
    ):
        render(TEMPLATE, [{"role": "user", "content": "x" * 1_000_000}])
    assert time.monotonic() - start < 30


def test_a_process_that_is_left_would_be_noticed():
    source = "import time; print('started', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", source, "chat_template"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        # Popen returns in the middle of exec, where ps may find no arguments yet.
        assert process.stdout.readline() == b"started\n"
        with pytest.raises(AssertionError, match="chat_template"), no_process_left():
            pass
        process.kill()


def test_ctrl_c_leaves_no_process_behind(child, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    child("time.sleep(60)")
    monkeypatch.setattr(chat_template, "_exchange", interrupted)
    with no_process_left(), pytest.raises(KeyboardInterrupt):
        render(TEMPLATE)


def test_no_interpreter_to_start(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/does/not/exist")
    with pytest.raises(ChatTemplateError, match=r"cannot start '/does/not/exist'.*No such file"):
        render(TEMPLATE)


def test_child_finds_jinja2_where_this_process_does(monkeypatch, tmp_path):
    # As with `pip install --user`, which an isolated interpreter does not look at.
    found = chat_template._jinja_directories()
    assert all(
        (Path(path) / "jinja2").is_dir() or (Path(path) / "markupsafe").is_dir() for path in found
    )
    hidden = tmp_path / "interpreter"
    hidden.write_text(f'#!/bin/sh\nshift\nexec "{sys.executable}" -I -S "$@"\n')
    hidden.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hidden))
    assert render(TEMPLATE) == "Hi"
    monkeypatch.setattr(chat_template, "_jinja_directories", list)
    with pytest.raises(
        ChatTemplateError, match="need the jinja2 package: No module named 'jinja2'"
    ):
        render(TEMPLATE)


def test_child_imports_only_the_standard_library_and_jinja2():
    tree = ast.parse(chat_template._CHILD.read_text())
    names = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert names - set(sys.stdlib_module_names) == {"jinja2"}


LIMITED = """
import importlib.util, os, resource, sys
spec = importlib.util.spec_from_file_location("child", sys.argv[1])
child = importlib.util.module_from_spec(spec)
spec.loader.exec_module(child)
has_memory_limit = child._address_space() is not None
child.limit(1, 64 << 20)
for what in (lambda: open(sys.argv[1]), lambda: os.pipe()):
    try:
        what()
        print("opened a file")
    except OSError as error:
        print(error.errno)
try:
    bytearray(100 << 20)
    print("refused" if not has_memory_limit else "allocated")
except MemoryError:
    print("refused")
print(*map(resource.getrlimit, (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE)), flush=True)
while True:
    pass
"""


def test_the_limits_hold():
    done = subprocess.run(
        [sys.executable, "-I", "-c", LIMITED, str(chat_template._CHILD)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["24", "24", "refused", "(0, 0) (0, 0)"]
    assert done.returncode == -signal.SIGXCPU


def test_a_limit_that_the_system_refuses_is_passed_over(monkeypatch):
    spec = importlib.util.spec_from_file_location("child", chat_template._CHILD)
    child = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(child)
    tried = []

    def refuse(kind, _):
        tried.append(kind)
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(child.resource, "setrlimit", refuse)
    monkeypatch.setattr(child, "_address_space", lambda: None)
    child.limit(1, 1)
    assert resource.RLIMIT_CPU in tried
    assert resource.RLIMIT_NOFILE in tried
    assert resource.RLIMIT_AS not in tried
