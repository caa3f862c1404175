"""`jaxdecode inspect`: what is in a model file, of which only headers are read."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxdecode.cli import options
from jaxdecode.cli.output import one_line, write_json, write_text
from jaxdecode.units import readable_bytes

if TYPE_CHECKING:
    from jaxdecode.checkpoint import WeightSource

_KV_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}

ModelArgument = Annotated[
    str, typer.Argument(metavar="[PATH|NAME]", help="The model, as -m of generate takes it.")
]
Hash = Annotated[bool, typer.Option("--hash/--no-hash", help="Read every file for its SHA-256.")]


def inspect(
    context: typer.Context,
    model: ModelArgument = options.DEFAULT_MODEL,
    hashes: Hash = True,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show a model's configuration, size, tensors, and the SHA-256 of each of its files."""
    from jaxdecode.cli import runtime

    context.obj.quiet = quiet
    runtime.select_device("cpu")
    source = runtime.open_model(context.obj, model)
    try:
        answer = describe(source, hashes)
    finally:
        source.close()
    if as_json:
        write_json(answer)
    else:
        write_text("\n".join(map(one_line, readable(answer))) + "\n")


def describe(source: WeightSource, hashes: bool) -> dict[str, Any]:
    """The object that --json prints; tests hold its keys."""
    config, dtype = source.config, source.config.dtype
    return {
        "path": str(source.path),
        "config": dataclasses.asdict(config),
        "parameters": config.num_parameters,
        "bytes": sum(info.num_bytes for info in source.tensors.values()),
        "quantised": source.quantised,
        "kv_bytes_per_token": {
            name: config.kv_bytes_per_token(itemsize) for name, itemsize in _KV_ITEMSIZE.items()
        },
        "tensors": {
            name: {"shape": info.shape, "dtype": info.dtype_name, "bytes": info.num_bytes}
            for name, info in source.tensors.items()
        },
        "files": [_file(path, source.path, hashes) for path in files_of(source.path)],
        "dtype": dtype,
    }


def files_of(path: Path) -> list[Path]:
    """The regular files of a model, in order; directories behind links are not entered."""
    if not path.is_dir():
        return [path]
    found = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    return sorted(file for file in found if file.is_file())


def _file(path: Path, root: Path, hashes: bool) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hashes else None
    name = path.name if path == root else str(path.relative_to(root))
    return {"name": name, "bytes": path.stat().st_size, "sha256": digest}


def readable(answer: dict[str, Any]) -> list[str]:
    """The same for people: tensors summed up by type."""
    config = answer["config"]
    kv = ", ".join(f"{count} in {name}" for name, count in answer["kv_bytes_per_token"].items())
    stored = "quantised" if answer["quantised"] else answer["dtype"]
    lines = [
        f"model: {answer['path']}",
        f"parameters: {answer['parameters']:,}",
        f"weights: {readable_bytes(answer['bytes'])} on disk, {stored}",
        f"KV cache: bytes per token: {kv}",
        "config:",
    ]
    lines += [f"  {name}: {value}" for name, value in config.items()]
    lines.append(f"tensors: {len(answer['tensors'])}")
    lines += [f"  {line}" for line in _by_type(answer["tensors"])]
    lines.append("files:")
    for file in answer["files"]:
        lines.append(
            f"  {file['name']}  {file['bytes']} bytes  sha256 {file['sha256'] or 'not computed'}"
        )
    return lines


def _by_type(tensors: dict[str, Any]) -> list[str]:
    counts, num_bytes = Counter[str](), Counter[str]()
    for tensor in tensors.values():
        counts[tensor["dtype"]] += 1
        num_bytes[tensor["dtype"]] += tensor["bytes"]
    return [
        f"{dtype}: {counts[dtype]} tensors, {readable_bytes(num_bytes[dtype])}" for dtype in counts
    ]
