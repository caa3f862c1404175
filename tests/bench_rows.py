"""Rows as a measurement makes them, for what is written and drawn from them."""

from __future__ import annotations

import dataclasses

from jaxdecode.bench import Row

ROW = Row(
    model="tiny", mesh="", dtype="float32", test="tg4 @ d512", batch=1, depth=512, capacity=640,
    implementation="xla", tokens=4, repetitions=2, tok_s=30.14, tok_s_std=0.25, seconds=0.133,
    compile_s=1.5, gb_s=12.3, bytes_per_step=408_000_000, bound_tok_s=40.0,
    fraction_of_bound=0.7535,
)  # fmt: skip


def row(**changes) -> dict:
    """A decoding row; `depth` also names its test."""
    depth = changes.get("depth", 512)
    return dataclasses.asdict(ROW) | {"test": f"tg4 @ d{depth}"} | changes


def prompt_row(**changes) -> dict:
    """A prompt's row, which has no bound."""
    unknown = dict.fromkeys(("gb_s", "bytes_per_step", "bound_tok_s", "fraction_of_bound"))
    return row(depth=0) | unknown | {"test": "pp16", "tok_s": 120.0, "seconds": 0.1334} | changes
