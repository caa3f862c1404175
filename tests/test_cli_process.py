"""The command as a process: Ctrl-C, pipes, terminals, what reaches stdout, and its start-up."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import time

import pytest
from cli_runs import start

from jaxdecode.cli.interrupts import EXIT_INTERRUPTED

# A loaded machine is slow to start a process; Ctrl-C has its own, tighter limit.
PATIENCE = 120
BOUND = 2.0
READY = b"READY"

# Native code that no signal interrupts, like a long compilation: it ends long after the test.
STUCK = """
import hashlib, sys
def stuck(*_, **__):
    sys.stderr.write("READY\\n")
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
"""
IN_LOAD = """
import sys, time
from jaxdecode.checkpoint import loading
read = loading.load_params
def slowly(*arguments, **options):
    sys.stderr.write("READY\\n")
    time.sleep(60)
loading.load_params = slowly
"""
IN_PREFILL = """
import sys, time
from jaxdecode import generation
step = generation.prefill
def slowly(*arguments, **options):
    state = step(*arguments, **options)
    sys.stderr.write("READY\\n")
    time.sleep(0.2)
    return state
generation.prefill = slowly
"""
IN_COMPILE = STUCK + "from jaxdecode import generation\ngeneration.prefill = stuck\n"
IN_OPEN = STUCK + "from jaxdecode.checkpoint import loading\nloading.open_source = stuck\n"


@pytest.fixture
def process(tmp_path):
    """process(*arguments, ...) starts the command; whatever is left of it ends with the test."""
    started = []

    def call(*arguments, **options):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        started.append(start([*map(str, arguments)], tmp_path / "cache", **pipes))
        return started[-1]

    yield call
    for left in started:
        left.kill()
        left.communicate()


def read_until(stream, pattern: bytes) -> bytes:
    """Reads what comes until `pattern` is at the end of it or in it."""
    read, deadline = b"", time.monotonic() + PATIENCE
    while not re.search(pattern, read, re.DOTALL):
        left = max(0.0, deadline - time.monotonic())
        assert select.select([stream], [], [], left)[0], f"no {pattern!r} in {read!r}"
        piece = os.read(stream.fileno(), 4096)
        assert piece, f"the process ended without {pattern!r}: {read!r}"
        read += piece
    return read


def interrupt(child) -> tuple[float, bytes, bytes]:
    """Ctrl-C; returns (seconds until the end, rest of stdout, rest of stderr)."""
    child.send_signal(signal.SIGINT)
    begin = time.monotonic()
    child.wait(PATIENCE)
    return time.monotonic() - begin, *child.communicate()


@pytest.mark.parametrize(
    ("prelude", "prompt_tokens"),
    [(IN_LOAD, 0), (IN_OPEN, 0), (IN_COMPILE, 401), (IN_PREFILL, 401)],
    ids=["load", "load-native", "compile", "prefill"],
)
def test_ctrl_c_before_the_first_token(process, model, prelude, prompt_tokens):
    child = process(
        "generate", "-m", model, "--no-chat", "-p", "x" * 401, "--prefill-step-size", 16,
        prelude=prelude,
    )  # fmt: skip
    read_until(child.stderr, READY)
    time.sleep(0.3)  # for the way from the word to the work
    seconds, out, err = interrupt(child)
    assert (child.returncode, out) == (EXIT_INTERRUPTED, b""), err
    assert seconds < BOUND
    words = f"prompt: {prompt_tokens} tokens | generation: 0 tokens | peak memory: "
    assert words in err.decode()
    assert err.endswith(b"\ninterrupted\n")
    assert b"Traceback" not in err


def test_ctrl_c_while_decoding_keeps_what_was_written(process, model):
    child = process(
        "generate", "-m", model, "--no-chat", "-p", "x", "-c", 16_384, "-n", 16_000, "--ignore-eos"
    )
    begun = read_until(child.stdout, b"[a-z]")
    seconds, out, err = interrupt(child)
    assert child.returncode == EXIT_INTERRUPTED, err
    assert seconds < BOUND
    (count,) = re.findall(r"generation: (\d+) tokens, [\d.]+ tok/s \| peak", err.decode())
    assert len((begun + out).decode()) == int(count) > 0  # a letter per token, all of them flushed
    assert err.endswith(b"\ninterrupted\n")
    assert b"Traceback" not in err


def test_second_ctrl_c_ends_at_once(process, model):
    child = process("generate", "-m", model, "--no-chat", "-p", "x", prelude=IN_COMPILE)
    read_until(child.stderr, READY)
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert child.poll() is None  # still has the rest of its 1.5 seconds
    seconds, _, _ = interrupt(child)
    assert child.returncode == EXIT_INTERRUPTED
    assert seconds < 0.5


def test_reader_that_goes_away_ends_the_run_quietly(process, model):
    child = process(
        "generate", "-m", model, "--no-chat", "-p", "x", "-c", 16_384, "-n", 16_000, "--ignore-eos"
    )
    assert len(os.read(child.stdout.fileno(), 1)) == 1
    child.stdout.close()
    child.wait(PATIENCE)
    err = child.stderr.read().decode()
    assert child.returncode == 0, err
    assert re.fullmatch(r"device: .*\nwarning: --context .*\n", err), err


def test_stdout_holds_only_json_and_compiled_programs_are_kept(process, model, tmp_path):
    """Whatever JAX, abseil and warnings have to say goes to stderr."""
    arguments = ("generate", "-m", model, "-p", "x", "-n", 4, "--ignore-eos", "--json")
    child = process(*arguments, prelude="import warnings; warnings.warn('a warning')")
    out, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 0, err
    assert b"a warning" in err
    kept = tmp_path / "cache" / "jaxdecode" / "compiled"
    assert any(kept.iterdir())
    assert kept.stat().st_mode & 0o777 == 0o700
    again = process(*arguments)
    again.stderr.close()  # and nobody has to read it
    again.stderr = None
    same, _ = again.communicate(timeout=PATIENCE)
    first, second = json.loads(out), json.loads(same)
    assert out.count(b"\n") == same.count(b"\n") == 1
    assert again.returncode == 0
    assert first["text"] == second["text"]
    assert second["compile_seconds"] < first["compile_seconds"]
    for file in kept.iterdir():  # cut short, as by a full disk
        file.write_bytes(file.read_bytes()[:100])
    damaged = process(*arguments)
    out, err = damaged.communicate(timeout=PATIENCE)
    assert damaged.returncode == 0, err
    assert b"Error reading persistent compilation cache entry" in err
    assert json.loads(out)["text"] == first["text"]


@pytest.mark.parametrize("arguments", [(), ("--json",)], ids=str)
def test_a_terminal_that_lacks_a_letter_gets_the_rest(process, model, arguments):
    prelude = "import os\nos.environ['PYTHONIOENCODING'] = 'ascii'\n"
    prelude += "import sys\nsys.stdout.reconfigure(encoding='ascii')\n"
    prelude += "from jaxdecode import tokenizer\n"
    prelude += "tokenizer.Tokenizer.decode = lambda self, ids: 'a\\u00e9' * len(ids)"
    child = process(
        "generate", "-m", model, "-p", "x", "-n", 3, "--ignore-eos", *arguments, prelude=prelude
    )
    out, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 0, err
    if arguments:
        assert json.loads(out)["text"] == 3 * "a\u00e9"
    else:
        assert out == 3 * b"a?" + b"\n"


def test_cuda_without_its_plugin(process, model):
    child = process("generate", "-m", model, "-p", "x", platforms="cuda")
    out, err = child.communicate(timeout=PATIENCE)
    assert (child.returncode, out) == (2, b"")
    assert err.startswith(b"error: JAX_PLATFORMS=cuda: ")
    assert err.count(b"\n") == 1


def test_help_is_quick_and_imports_no_jax(process):
    prelude = (
        "import atexit, sys, time\n"
        "@atexit.register\n"
        "def tell():\n"
        "    heavy = {'jax', 'flax', 'numpy', 'tokenizers'} & set(sys.modules)\n"
        "    sys.stderr.write(f'{time.process_time():.2f} {heavy}')\n"
    )
    child = process("generate", "--help", prelude=prelude)
    out, err = child.communicate(timeout=PATIENCE)
    seconds, heavy = err.split(maxsplit=1)
    assert b"--max-tokens" in out
    assert (child.returncode, heavy) == (0, b"set()")
    # 0.25 s on an idle machine; processor time, for other processes lengthen it less.
    assert float(seconds) < 1.0


def test_chat_at_a_terminal(process, model):
    terminal, end = pty.openpty()
    child = process(
        "chat", "-m", model, "-n", 8, "-c", 128, "--ignore-eos", stdin=end, stdout=end, stderr=end
    )
    os.close(end)
    with os.fdopen(terminal, "rb+", buffering=0) as screen:
        shown = read_until(screen, b"> $")
        screen.write(b"/nonsense\n")
        shown += read_until(screen, b"/nonsense is no command.*> $")
        screen.write(b"hello\n")
        shown += read_until(screen, b"[a-zA-Z]{8}\r\n.*peak memory.*> $")
        seconds, _, _ = interrupt(child)
        assert (child.returncode, seconds < BOUND) == (EXIT_INTERRUPTED, True)
    assert b"loading" in shown  # a progress bar
    assert b"Traceback" not in shown
