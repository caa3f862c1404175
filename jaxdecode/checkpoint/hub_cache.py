"""Models that Hugging Face's own tools have downloaded: found in their cache, never fetched."""

from __future__ import annotations

import os
import re
from pathlib import Path

from jaxdecode.checkpoint.files import shown
from jaxdecode.errors import CheckpointError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[\w-]{1,64}", re.ASCII)


def is_hub_name(name: str) -> bool:
    """Whether `name` has the form "org/name"."""
    return len(name) <= 200 and _NAME.fullmatch(name) is not None


def hub_cache() -> Path:
    """The cache's directory, by the variables that Hugging Face's tools read."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]).expanduser() / "hub"
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return caches / "huggingface" / "hub"


def find_in_hub_cache(name: str) -> Path:
    """The directory of the cached model "org/name": its main revision, or else the only one.

    Raises:
      CheckpointError: it is not in the cache; the message says how to download it.
    """
    repository = hub_cache() / f"models--{name.replace('/', '--')}"
    try:
        revision = (repository / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        revision = ""
    if revision and not _REVISION.fullmatch(revision):
        raise CheckpointError(
            f"{repository / 'refs' / 'main'} must name a revision; found {shown(revision)}"
        )
    snapshots = repository / "snapshots"
    if revision and (snapshots / revision).is_dir():
        return snapshots / revision
    found = sorted(snapshots.iterdir()) if snapshots.is_dir() else []
    if len(found) == 1 and found[0].is_dir():
        return found[0]
    if len(found) > 1:
        raise CheckpointError(
            f"{snapshots} holds {len(found)} revisions and none is marked as main; "
            "load one by its path"
        )
    raise CheckpointError(
        f"{name}: no such directory, and not in the Hugging Face cache ({hub_cache()}); "
        f"download it with `hf download {name}`, or give the path of a model"
    )
