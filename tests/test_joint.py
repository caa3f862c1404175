"""Two processes that save a model together: one whole directory, or none and an error in both."""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from unittest import mock

import jax
import orbax.checkpoint as ocp
import pytest
import tiny_hf
from test_processes import PATIENCE, STRICT, free_port
from tiny_hf import assert_same_params, hf_tensors, our_params

import jaxdecode as jd
from jaxdecode.checkpoint import export_safetensors

WORKER = (
    STRICT
    + """
import json, sys
from pathlib import Path
import test_joint
from jaxdecode.processes import find_member, join
coordinator, process_id, what, directory = sys.argv[1:]
join(find_member({}, coordinator, 2, int(process_id)), timeout=200, heartbeat_timeout=6)
print("FOUND", json.dumps(getattr(test_joint, what)(Path(directory))))
"""
)
# Copies of weights in both processes, which share the writing of them, and parts of them.
AXES = {"parts": ("seq", "data", "tensor"), "copies": ("data", "tensor", "seq")}


def load(directory, kind):
    """A model over a mesh whose first axis parts the two processes."""
    return jd.load(directory, mesh=jax.make_mesh((2, 2, 2), AXES[kind]))[0]


def only_in(process, act, method):
    """The method, before which `act` is called in one of the processes."""

    def call(*given, **named):
        if jax.process_index() == process:
            act()
        return method(*given, **named)

    return call


def raises(error):
    def act():
        raise error

    return act


def interrupt():
    _thread.interrupt_main()
    time.sleep(0.2)


def in_orbax(name, process, act):
    """Something that happens in one process where Orbax begins to write."""
    handler = ocp.PyTreeCheckpointHandler
    return mock.patch.object(handler, name, only_in(process, act, getattr(handler, name)))


def tokenizer(process=None, act=None):
    return types.SimpleNamespace(save=only_in(process, act, write_tokenizer))


def write_tokenizer(directory):
    (directory / "vocab.txt").write_text("{}")


def save_all(directory):
    """What each of two processes finds; what they wrote is compared by the test."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    found = {}

    def attempt(name, path, words=None, model=None):
        try:
            jd.save(model or spread, path, words)
            found[name] = "saved"
        except (ValueError, KeyboardInterrupt) as error:
            found[name] = f"{type(error).__name__}: {error}"

    spread = load(directory / "tiny", "parts")
    refused = directory / "refused"
    attempt("exists", directory / "tiny")
    attempt("no directory", directory / "tiny" / "config.json" / "x")
    attempt("other paths", refused / f"of{jax.process_index()}")
    attempt("alone", refused / "x", model=jd.load(directory / "tiny")[0])
    attempt("tokenizer", refused / "x", tokenizer(0, raises(OSError(28, os.strerror(28)))))
    full = raises(ValueError("RESOURCE_EXHAUSTED: No space left on device [a=1]"))
    for process in range(2):
        with in_orbax("save", process, full):
            attempt(f"full disk of {process}", refused / "x")
        with in_orbax("save", process, interrupt):
            attempt(f"interrupted {process}", refused / "x")
    with in_orbax("finalize", 0, full):
        attempt("full disk at last", refused / "x")
    try:
        export_safetensors(spread, refused / "x")
    except jd.DecodeError as error:
        found["export"] = str(error)

    attempt("parts", directory / "parts", tokenizer())
    attempt("copies", directory / "copies", model=load(directory / "parts", "copies"))
    return found


def die_while_saving(directory):
    with in_orbax("save", 1, lambda: os._exit(7)):
        jd.save(load(directory / "tiny", "parts"), directory / "x")


@pytest.fixture
def both(tmp_path):
    """both(what) starts two processes that do it in tmp_path, where they find a tiny model."""
    tiny_hf.write_model(tmp_path / "tiny")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as stack:

        def call(what):
            coordinator = f"127.0.0.1:{free_port()}"
            for i in range(2):
                command = [sys.executable, "-c", WORKER, coordinator, str(i), what, str(tmp_path)]
                child = stack.enter_context(subprocess.Popen(command, env=environment, **pipes))
                stack.callback(child.kill)
                yield child

        yield lambda what: list(call(what))


FULL = "x could not be written: No space left on device; free space or choose another place"
# What both processes say, or each.
SAID = {
    "exists": "CheckpointError: .*tiny exists already, and a model is never overwritten",
    "no directory": "CheckpointError: .*x could not be written: .*(directory|exists)",
    "other paths": "CheckpointError: .*process 0 made there is not to be seen in every process",
    "alone": "CheckpointError: .*x: this model lies in process [01] alone, one of 2; load it onto",
    "tokenizer": f"CheckpointError: /.*{FULL}",
    "full disk of 0": f"CheckpointError: /.*{FULL}",
    "full disk of 1": f"CheckpointError: (process 1: )?/.*{FULL}",
    "full disk at last": f"CheckpointError: /.*{FULL}",
    "parts": "saved",
    "copies": "saved",
}


def test_two_processes_save(both, tmp_path):
    (tmp_path / "refused").mkdir()
    found = []
    for process in both("save_all"):
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
        assert "Traceback" not in err
        found.append(json.loads(out.partition("FOUND ")[2]))
    for i in range(2):
        for name, words in SAID.items():
            assert re.match(words, found[i][name]), (i, name, found[i][name])
        assert found[i][f"interrupted {i}"] == "KeyboardInterrupt: "
        assert found[i][f"interrupted {1 - i}"].endswith("x was not saved: KeyboardInterrupt")
        assert "cannot export a model together" in found[i]["export"]
    for name in ("exists", "no directory", "tokenizer", "full disk of 0", "full disk at last"):
        assert found[0][name] == found[1][name]
    assert list((tmp_path / "refused").iterdir()) == []
    assert not list(tmp_path.glob(".*"))

    expected = our_params(hf_tensors())
    for saved in (tmp_path / "parts", tmp_path / "copies"):
        # Both have written: the one or the other would not have been enough.
        assert all(any((saved / "weights" / f"ocdbt.process_{i}").iterdir()) for i in range(2))
        assert_same_params(jd.load(saved)[0].params(), expected)
        for kind in AXES:
            assert_same_params(load(saved, kind).params(), expected)
    names = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert names == ["config.json", "generation_config.json", "vocab.txt", "weights"]


def test_one_process_dies_while_saving(both, tmp_path):
    """The other does not wait for it, and what is left goes with the next save."""
    waits, dies = both("die_while_saving")
    assert dies.wait(PATIENCE) == 7
    waits.communicate(timeout=PATIENCE)
    assert waits.returncode not in (0, None)
    assert not (tmp_path / "x").exists()
    jd.save(jd.load(tmp_path / "tiny")[0], tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "x"]
