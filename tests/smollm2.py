"""The default model, for the tests that need a real one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jaxdecode.checkpoint.default_model import fetch_default_model
from jaxdecode.errors import FetchError


def smollm2_gguf() -> Path:
    """SmolLM2's GGUF file in the user's cache, fetched once. Without network the test is skipped,
    and fails in CI; mark it `network`."""
    try:
        return fetch_default_model()
    except FetchError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))
