"""What the command line writes: JSON, the footer, and text made safe for a terminal."""

from __future__ import annotations

import json
import sys

from jaxdecode.cli.output import Report, one_line, readable_bytes, write_json, write_text
from jaxdecode.stats import Stats


def test_json_never_holds_nan(capsys):
    write_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": -float("inf")}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": None}}


def test_footer_without_measured_time():
    report = Report(stats=Stats(3, 0, 0.0, 0.0, 0.0))
    assert "prompt: 3 tokens, n/a tok/s | generation: 0 tokens, n/a tok/s" in report.footer()


def test_footer_while_running_counts_tokens():
    assert (
        "prompt: 3 tokens | generation: 2 tokens |"
        in Report(prompt_tokens=3, generated_tokens=2).last_words()
    )
    assert Report(quiet=True).last_words() == ""


def test_terminal_never_gets_control_characters(capsys, monkeypatch):
    write_text("a\x1b[2Jb\n")
    assert capsys.readouterr().out == "a\x1b[2Jb\n"  # a pipe gets what the model wrote
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    write_text("a\x1b[2J\tb\x9b\n")
    assert capsys.readouterr().out == "a\N{REPLACEMENT CHARACTER}[2J\tb\N{REPLACEMENT CHARACTER}\n"
    assert one_line("a\n\x1b[31mb\r\nc") == "a \N{REPLACEMENT CHARACTER}[31mb c"


def test_readable_bytes():
    assert [readable_bytes(x) for x in (0, 999, 1000, 98_362_432, 3.2e12)] == [
        "0 B", "999 B", "1.0 kB", "98.4 MB", "3.2 TB",
    ]  # fmt: skip
