"""Rendering for tests, and a look at the processes that it may leave behind."""

from __future__ import annotations

import contextlib
import os
import subprocess

from jaxdecode.chat_template import render_chat_template

USER = [{"role": "user", "content": "Hi"}]


def render(template, messages=USER, **keywords):
    keywords = {"bos_token": "<s>", "eos_token": "</s>"} | keywords
    return render_chat_template(template, messages, **keywords)


@contextlib.contextmanager
def no_process_left():
    """Nothing that is started inside may be running, or wait to be collected, afterwards."""
    yield
    command = ["ps", "-A", "-ww", "-o", "ppid=,args="]  # -ww: lines in full
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ours = [line for line in listed.splitlines() if line.split()[:1] == [str(os.getpid())]]
    left = [line for line in ours if "chat_template" in line or "defunct" in line]
    assert not left, left
