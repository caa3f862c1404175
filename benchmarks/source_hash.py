"""Which code a benchmark measured: one hash over the Python files of the package."""

from __future__ import annotations

import hashlib
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
ROOMS = ("jaxdecode", "models", "pallas_kernels")


def source_files(root: pathlib.Path = ROOT) -> list[pathlib.Path]:
    """Returns the package's .py files as sorted paths relative to `root`.

    The links jaxdecode/models and jaxdecode/pallas_kernels are not followed, so a file is counted
    once, and a tree without links (from a zip) gives the same list.
    """
    found = (path for room in ROOMS for path in (root / room).rglob("*.py"))
    names = {path.relative_to(root) for path in found if not _is_behind_link(path, root)}
    return sorted(names, key=lambda path: path.as_posix())


def source_hash(root: pathlib.Path = ROOT) -> str:
    """Returns the SHA-256, in hexadecimal, of the names and contents of the package's .py files."""
    digest = hashlib.sha256()
    for name in source_files(root):
        content = (root / name).read_bytes()
        # The lengths keep "a" + "bc" apart from "ab" + "c".
        digest.update(f"{name.as_posix()}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _is_behind_link(path: pathlib.Path, root: pathlib.Path) -> bool:
    return any(parent.is_symlink() for parent in path.parents if parent.is_relative_to(root))
