"""The program that renders one untrusted chat template, run as `python -I FILE`.

`jaxdecode.chat_template` starts it, by path, in a process of its own. It imports nothing of the
package, reads one JSON request from stdin, limits itself, and writes one JSON reply to stdout:
{"text": ...} or {"error": kind, "message": ..., "line": number or null}.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import Any

_MAX_MESSAGE_CHARS = 2000
# What Jinja imports only when it needs it, which is when no file can be opened any more.
_LATE_IMPORTS = (
    "encodings.unicode_escape",
    "jinja2.constants",
    "jinja2.debug",
    "pprint",
    "textwrap",
)


class TemplateRaised(Exception):
    """The template called raise_exception(message)."""


class OutputTooLarge(Exception):
    """The rendered text exceeds its limit."""


def raise_exception(message: Any) -> None:
    """What templates call to refuse messages."""
    raise TemplateRaised(str(message))


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """`value` as JSON; Jinja's own filter escapes <, > and &, which a prompt must not have."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def strftime_now(form: str) -> str:
    """The local time now, as `strftime` writes it."""
    return datetime.datetime.now().strftime(form)


def make_environment() -> Any:
    """The sandboxed Jinja environment, with what chat templates expect in it."""
    for name in _LATE_IMPORTS:
        importlib.import_module(name)
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Environment(ImmutableSandboxedEnvironment):
        """Raises at the first forbidden attribute, where Jinja waits until it is used."""

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise SecurityError(f"{attribute!r} of a {type(obj).__name__} is out of bounds")

    class GenerationBlock(Extension):
        """{% generation %} marks the assistant's text for training; here it is just text."""

        tags = {"generation"}  # noqa: RUF012  as Jinja declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationBlock]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    strftime_now("%c")  # reads the time zone's file
    environment.from_string("{{ messages | tojson }}").render(messages=[])
    return environment


def limit(cpu_seconds: int, memory_bytes: int) -> None:
    """Caps what this process may use from here on: `memory_bytes` comes on top of the present."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu_seconds += int(used.ru_utime + used.ru_stime)
    limits = [
        ("RLIMIT_CORE", 0, 0),
        ("RLIMIT_FSIZE", 0, 0),
        ("RLIMIT_CPU", cpu_seconds, cpu_seconds + 1),
    ]
    address_space = _address_space()
    if address_space is not None:
        total = address_space + memory_bytes
        limits.append(("RLIMIT_AS", total, total))
    limits += [("RLIMIT_NPROC", 0, 0), ("RLIMIT_NOFILE", 0, 0)]
    for name, soft, hard in limits:
        # Not on this system, or a stricter limit is in force: the others still hold.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, name), (soft, hard))


def _address_space() -> int | None:
    """Bytes of address space in use; None where the system does not say (macOS)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def render(environment: Any, template: str, variables: dict[str, Any], max_bytes: int) -> str:
    """The template's text. Raises OutputTooLarge, and whatever the template does."""
    pieces = []
    size = 0
    for piece in environment.from_string(template).generate(**variables):
        size += len(piece.encode("utf-8", errors="surrogatepass"))
        if size > max_bytes:
            raise OutputTooLarge
        pieces.append(piece)
    return "".join(pieces)


def describe(error: Exception) -> dict[str, Any]:
    """The reply for a template that failed."""
    import jinja2

    kinds = (
        (TemplateRaised, "raised"),
        (OutputTooLarge, "output"),
        (MemoryError, "memory"),
        (RecursionError, "recursion"),
        (jinja2.TemplateSyntaxError, "syntax"),
        (jinja2.exceptions.SecurityError, "security"),
    )
    kind = next((name for cls, name in kinds if isinstance(error, cls)), "runtime")
    message = str(error)[:_MAX_MESSAGE_CHARS].rstrip(".")
    if kind == "runtime":
        message = f"{type(error).__name__}: {message}"
    line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else None
    if kind in ("raised", "security", "runtime"):
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in reversed(frames) if f.filename == "<template>"), None)
    return {"error": kind, "message": message, "line": line}


def answer(environment: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request."""
    try:
        text = render(
            environment, request["template"], request["variables"], request["output_bytes"]
        )
    except Exception as error:  # noqa: BLE001  whatever the template does is answered
        return describe(error)
    return {"text": text}


def main() -> None:
    """One request from stdin, one reply to stdout."""
    sys.path.extend(sys.argv[1:])  # where the parent finds jinja2, if -I hides it (user site)
    request = json.load(sys.stdin.buffer)
    try:
        environment = make_environment()
    except ImportError as error:
        reply = {"error": "import", "message": str(error), "line": None}
    else:
        limit(request["cpu_seconds"], request["memory_bytes"])
        reply = answer(environment, request)
    sys.stdout.buffer.write(json.dumps(reply).encode("ascii"))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
