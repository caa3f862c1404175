"""Chat templates: a model's own Jinja program that writes a conversation as one prompt.

The program comes with the model, so it is untrusted. Jinja's sandbox keeps it from Python's
internals but not from eating all memory and time; therefore it runs in a child process with limits
(`chat_template_child.py`). Linux, macOS and WSL2; macOS has no limit on memory, the others hold.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from jaxdecode.errors import ChatTemplateError, RequestError

MAX_TEMPLATE_BYTES = 256 << 10
MAX_MESSAGES = 10_000
MAX_MESSAGE_BYTES = 32 << 20  # all messages together
MAX_OUTPUT_BYTES = 4 << 20  # besides twice the messages' own text
CPU_SECONDS = 2
MEMORY_BYTES = 256 << 20  # besides what holds the messages
# The template can only compute, so the CPU limit comes first; this is for a machine that stalls.
WALL_SECONDS = 20.0

_HINT = ". Pass the prompt as plain text (--no-chat)"
_CHILD = Path(__file__).with_name("chat_template_child.py")
# Some clusters' Python finds its own shared library only through these.
_LOADER_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


def render_chat_template(
    template: str | None,
    messages: Sequence[Mapping[str, str]],
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The conversation as the model's template writes it.

    Args:
      template: Jinja source; None raises.
      messages: [{"role": ..., "content": ...}, ...], both strings.
      bos_token, eos_token: text of the special tokens, for templates that write them.
      add_generation_prompt: end with the opening of the assistant's answer.

    Raises ChatTemplateError if there is no template or it fails, refuses the messages or exceeds
    its limits (2 s of CPU, 256 MB, 4 MB of output), and RequestError for malformed messages.
    """
    checked, size = _check_messages(messages)
    _check_template(template)
    variables = {
        "messages": checked,
        "add_generation_prompt": add_generation_prompt,
        "tools": None,
        "documents": None,
    }
    # Left out rather than None: templates test `is defined`, and an undefined name prints nothing.
    if bos_token is not None:
        variables["bos_token"] = bos_token
    if eos_token is not None:
        variables["eos_token"] = eos_token
    output_bytes = MAX_OUTPUT_BYTES + 2 * size
    request = {
        "template": template,
        "variables": variables,
        "cpu_seconds": CPU_SECONDS,
        "memory_bytes": MEMORY_BYTES + 32 * size,
        "output_bytes": output_bytes,
    }
    # A character of one byte can take six in JSON.
    reply, status = _run_child(json.dumps(request).encode("ascii"), 6 * output_bytes + (64 << 10))
    return _read_reply(reply, status, output_bytes)


def _check_messages(messages: Any) -> tuple[list[dict[str, str]], int]:
    """The messages as plain dicts, and the size of their text in bytes."""
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise RequestError(
            "messages must be a list of {'role': ..., 'content': ...}, found "
            f"{type(messages).__name__}"
        )
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise RequestError(f"messages has {len(messages)} entries; 1 to {MAX_MESSAGES} are allowed")
    checked = [_check_message(index, message) for index, message in enumerate(messages)]
    size = sum(len(text.encode("utf-8")) for message in checked for text in message.values())
    if size > MAX_MESSAGE_BYTES:
        raise RequestError(
            f"the messages hold {size} bytes of text; at most {MAX_MESSAGE_BYTES} are allowed"
        )
    return checked, size


def _check_message(index: int, message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        found = (
            sorted(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
        )
        raise RequestError(
            f"messages[{index}] must be a dict with the keys 'role' and 'content', found {found}"
        )
    for key in ("role", "content"):
        value = message[key]
        if not isinstance(value, str):
            raise RequestError(
                f"messages[{index}]['{key}'] must be a str, found {type(value).__name__}; only "
                "text can be given"
            )
        if not _is_valid_unicode(value):
            raise RequestError(
                f"messages[{index}]['{key}'] holds half of a surrogate pair, which is no valid "
                "Unicode; decode the input as UTF-8 first"
            )
    return {"role": message["role"], "content": message["content"]}


def _is_valid_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_template(template: str | None) -> None:
    if template is None:
        raise ChatTemplateError(
            f"this model has no chat template, so it cannot take messages{_HINT}"
        )
    size = len(template.encode("utf-8", errors="surrogatepass"))
    if size > MAX_TEMPLATE_BYTES:
        raise ChatTemplateError(
            f"the model's chat template has {size} bytes; at most {MAX_TEMPLATE_BYTES} are "
            f"allowed{_HINT}"
        )


def _run_child(request: bytes, max_reply_bytes: int) -> tuple[bytes, int]:
    """The child's reply, and its exit status (negative: the signal that ended it)."""
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", str(_CHILD), *_jinja_directories()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _LOADER_VARIABLES if name in os.environ},
            cwd="/",
            close_fds=True,
            start_new_session=True,
        )
    except OSError as error:
        raise ChatTemplateError(
            f"cannot start {sys.executable!r} to render the chat template: {error.strerror}"
        ) from None
    stdin, stdout = cast(IO[bytes], child.stdin), cast(IO[bytes], child.stdout)
    watchdog = threading.Timer(WALL_SECONDS, child.kill)
    watchdog.start()
    try:
        reply = _exchange(stdin, stdout, request, max_reply_bytes)
        if len(reply) <= max_reply_bytes:
            child.wait()
    finally:  # also on Ctrl-C
        watchdog.cancel()
        child.kill()
        status = child.wait()
        stdout.close()
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
    return reply, status


def _exchange(stdin: IO[bytes], stdout: IO[bytes], request: bytes, max_reply_bytes: int) -> bytes:
    # If the child died early, its status says why.
    with contextlib.suppress(BrokenPipeError), stdin:
        stdin.write(request)
    return stdout.read(max_reply_bytes + 1)


def _jinja_directories() -> list[str]:
    """Where this process finds jinja2 and markupsafe; the child, isolated, might not see them."""
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    origins = [spec.origin for spec in specs if spec is not None and spec.origin is not None]
    return list(dict.fromkeys(str(Path(origin).parent.parent) for origin in origins))


def _read_reply(data: bytes, status: int, output_bytes: int) -> str:
    try:
        reply = json.loads(data)
    except (ValueError, RecursionError):
        reply = None
    if not isinstance(reply, dict):
        raise ChatTemplateError(_describe_death(status))
    text = reply.get("text")
    if isinstance(text, str):
        if not _is_valid_unicode(text):
            raise ChatTemplateError(
                "the model's chat template wrote half of a surrogate pair, which is no valid "
                f"Unicode{_HINT}"
            )
        return text
    line = f" (line {reply['line']})" if reply.get("line") else ""
    # The template's author wrote it, and it may end up on a terminal.
    message = "".join(c if c.isprintable() else " " for c in str(reply.get("message")))
    texts = {
        "raised": f"the model's chat template refuses these messages: {message}",
        "syntax": f"the model's chat template is not valid Jinja{line}: {message}",
        "security": f"the model's chat template tried something forbidden{line}: {message}",
        "recursion": "the model's chat template recurses without end",
        "memory": f"the model's chat template needs more than {MEMORY_BYTES >> 20} MB of memory",
        "output": f"the model's chat template writes more than {output_bytes} bytes of text",
        "import": f"chat templates need the jinja2 package: {message}",
    }
    kind = str(reply.get("error"))
    text = texts.get(kind, f"the model's chat template failed{line}: {message}")
    hint = "" if kind in ("raised", "import") else _HINT
    raise ChatTemplateError(text + hint)


def _describe_death(status: int) -> str:
    """Why a child without a reply ended, by its exit status."""
    if status == -signal.SIGXCPU:
        return f"the model's chat template runs for more than {CPU_SECONDS} s{_HINT}"
    if status == -signal.SIGKILL:
        return (
            f"the model's chat template did not finish: killed after {WALL_SECONDS:g} s, or for "
            f"want of memory{_HINT}"
        )
    if status < 0:
        return f"the model's chat template crashed its process (signal {-status}){_HINT}"
    return f"the chat template's process ended without an answer (exit status {status}){_HINT}"
