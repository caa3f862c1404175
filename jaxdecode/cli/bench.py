"""`jaxdecode bench`: decoding speed on this device, beside what its memory allows."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from jaxdecode.cli import options
from jaxdecode.cli.output import (
    Report,
    peak_memory,
    readable_bytes,
    say_warning,
    write_text,
)
from jaxdecode.errors import RequestError

if TYPE_CHECKING:
    from jaxdecode.bench import Bench, Row
    from jaxdecode.read_bandwidth import ReadCeiling

MEASURE = "What to measure"

Random = Annotated[
    bool,
    typer.Option(
        "--random", rich_help_panel=options.MODEL, help="Random weights for --preset, made here."
    ),
]
Depth = Annotated[
    str,
    typer.Option(
        "-d",
        "--depth",
        metavar="LIST",
        rich_help_panel=MEASURE,
        help="Tokens in the cache when the clock starts, such as 512,4096; 512+4096 is one batch "
        "of two sequences of these lengths, whatever -b says.",
    ),
]
Batch = Annotated[
    str,
    typer.Option(
        "-b", "--batch", metavar="LIST", rich_help_panel=MEASURE, help="Batch sizes, such as 1,8."
    ),
]
Tokens = Annotated[
    int,
    typer.Option(
        "-n", "--tokens", rich_help_panel=MEASURE, help="Tokens to generate; 0 for prompts only."
    ),
]
PromptTokens = Annotated[
    str | None,
    typer.Option(
        "-p",
        "--prompt-tokens",
        metavar="LIST",
        rich_help_panel=MEASURE,
        help="Also time prompts of so many tokens, such as 512,2048, up to their first token.",
    ),
]
Repetitions = Annotated[
    int,
    typer.Option(
        "-r",
        "--repetitions",
        rich_help_panel=MEASURE,
        help="Measurements per row, after one that compiles.",
    ),
]
Attn = Annotated[
    str,
    typer.Option(
        metavar="LIST",
        rich_help_panel=MEASURE,
        help="Attention, such as flash_decode,xla; flash_decode_nosplit does not split the keys; "
        "`jaxdecode doctor` says what runs here.",
    ),
]
Capacity = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        rich_help_panel=MEASURE,
        help="Capacity of the KV cache at every depth; if not given, just enough.",
    ),
]
Format = Annotated[
    Literal["md", "csv", "json"],
    typer.Option("--format", rich_help_panel=options.OUTPUT, help="Of the table: md, csv or json."),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        rich_help_panel=options.OUTPUT,
        help="Write the table there instead of stdout.",
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=options.OUTPUT,
        help="Draw tokens per second against depth into a .png, .svg or .pdf; needs matplotlib.",
    ),
]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure, parsed and checked.

    Attributes:
      batches: for each decoding row, the tokens in the cache of each sequence.
      prompts: (tokens, batch size) of each prompt row.
      attention: names, in the order given.
      tokens: per decoding row.
      capacity: of the cache; None for just enough.
    """

    batches: list[list[int]]
    prompts: list[tuple[int, int]]
    attention: list[str]
    tokens: int
    capacity: int | None


def bench(
    context: typer.Context,
    model: options.Model = options.DEFAULT_MODEL,
    preset: options.Preset = None,
    random: Random = False,
    dtype: options.Dtype = None,
    depth: Depth = "512",
    batch: Batch = "1",
    tokens: Tokens = 128,
    prompt_tokens: PromptTokens = None,
    repetitions: Repetitions = 5,
    attn: Attn = "auto",
    capacity: Capacity = None,
    form: Format = "md",
    output: Output = None,
    plot: Plot = None,
    device: options.Device = "auto",
    mesh: options.Mesh = None,
    no_compilation_cache: options.NoCompilationCache = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure how fast a model decodes, and which share of the memory's speed that is."""
    from jaxdecode.bench import Bench
    from jaxdecode.bench_output import draw_chart
    from jaxdecode.cli import runtime
    from jaxdecode.cli.bench_model import make_model
    from jaxdecode.cli.together import refuse_launcher
    from jaxdecode.read_bandwidth import measure_read_ceiling

    refuse_launcher("bench")
    report: Report = context.obj
    report.quiet = quiet
    plan = make_plan(depth, batch, tokens, prompt_tokens, repetitions, attn, capacity)
    check_model_options(model, preset, random)
    check_files(plan, output, plot)
    sizes = None if mesh is None else options.parse_mesh(mesh)
    report.device = runtime.announced_device(device)
    if not no_compilation_cache:
        runtime.enable_compilation_cache()
    decoder, names = make_model(report, plan, model, preset, dtype, sizes)
    ceiling = measure_read_ceiling()
    report.say(f"memory: read at {ceiling}")
    name = preset or Path(model).name or model
    timer = Bench(decoder, name, ceiling.bytes_per_second, tokens or 1, repetitions)
    rows: list[dict[str, Any]] = []
    try:
        measure(report, timer, plan, names, rows)
    finally:
        # What was measured before an error or an interruption is worth keeping.
        if rows:
            write_table(ceiling, rows, form, output)
    if plot is not None:
        draw_chart(rows, plot)
    report.say(f"peak memory: {readable_bytes(peak_memory(report.device))}")


def make_plan(
    depth: str, batch: str, tokens: int, prompt_tokens: str | None, repetitions: int, attn: str,
    capacity: int | None,
) -> Plan:  # fmt: skip
    """Reads the lists of the options.

    Raises:
      RequestError: one of them is no such list, or nothing is to be measured.
    """
    from jaxdecode import bench

    bench.check_range("-n", tokens, 0, bench.MAX_TOKENS)
    bench.check_range("-r", repetitions, 1, bench.MAX_REPETITIONS)
    sizes = [integer("-b", item, 1, bench.MAX_BATCH) for item in items("-b", batch)]
    batches = []
    for item in items("-d", depth) if tokens else ():
        lengths = [integer("-d", part, 0, bench.MAX_DEPTH) for part in item.split("+")]
        batches += [lengths] if len(lengths) > 1 else [lengths * size for size in sizes]
    for lengths in batches:
        bench.slots_for(lengths, tokens, capacity)
    prompts = [
        (integer("-p", item, 1, bench.MAX_DEPTH), size)
        for item in ([] if prompt_tokens is None else items("-p", prompt_tokens))
        for size in sizes
    ]
    if not batches and not prompts:
        raise RequestError("-n 0 measures prompts only; give their lengths with -p")
    return Plan(batches, prompts, items("--attn", attn), tokens, capacity)


def items(flag: str, text: str) -> list[str]:
    """The parts of a list with commas, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise RequestError(f"{flag} takes a list such as 1,8, found {text!r:.100}")
    return list(dict.fromkeys(parts))


def integer(flag: str, text: str, low: int, high: int) -> int:
    """A decimal number in [low, high]."""
    if not (text.isascii() and text.isdigit() and low <= int(text[:20]) <= high):
        raise RequestError(f"{flag} takes integers from {low} to {high}, found {text!r:.100}")
    return int(text[:20])


def check_model_options(model: str, preset: str | None, random: bool) -> None:
    """Raises RequestError unless they name one model with weights."""
    if preset is None and random:
        raise RequestError("--random makes weights for a --preset; name one")
    if preset is None:
        return
    if model != options.DEFAULT_MODEL:
        raise RequestError(f"give -m or --preset, found both {model} and {preset}")
    if not random:
        raise RequestError(f"--preset {preset} is a shape without weights; add --random")


def check_files(plan: Plan, output: Path | None, plot: Path | None) -> None:
    """Raises RequestError now if the results could not be written after an hour of measuring."""
    from jaxdecode.bench_output import check_chart

    if plot is not None:
        check_chart(plot)
        if not any(lengths[0] > 0 and len(set(lengths)) == 1 for lengths in plan.batches):
            raise RequestError("--plot draws decoding at depths above 0; give one with -d, and -n")
    for flag, path in (("-o", output), ("--plot", plot)):
        if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            raise RequestError(f"{flag} {path} cannot be written; choose another file")


def measure(
    report: Report, timer: Bench, plan: Plan, names: list[str], rows: list[dict[str, Any]]
) -> None:
    """Adds a row for each case and each implementation of attention, and says it."""
    from jaxdecode.bench import NO_SPLIT
    from jaxdecode.bench_output import speed

    trained = timer.model.config.max_positions
    if any(max(lengths) + plan.tokens > trained for lengths in plan.batches):
        say_warning(
            f"beyond the {trained} positions the model was trained for, its speed is measured "
            "right, but its text would not be"
        )

    def add(row: Row) -> None:
        rows.append(dataclasses.asdict(row))
        share = row.fraction_of_bound
        of_bound = "" if share is None else f", {share:.1%} of the bound"
        report.say(
            f"{row.test}, batch {row.batch}, {row.implementation}: {speed(rows[-1])} tok/s"
            f"{of_bound} (after compiling for {row.compile_s:.1f} s)"
        )

    for prompt_tokens, size in plan.prompts:
        for name in names:
            if name != NO_SPLIT:
                add(timer.prefill(prompt_tokens, size, name))
    for lengths in plan.batches:
        for name in names:
            add(timer.decode(lengths, name, capacity=plan.capacity))


def write_table(
    ceiling: ReadCeiling, rows: list[dict[str, Any]], form: str, output: Path | None
) -> None:
    """Writes the rows to a file or to stdout."""
    from jaxdecode import bench_output

    if form == "json":
        text = json.dumps(bench_output.results(ceiling, rows), indent=1, allow_nan=False) + "\n"
    elif form == "csv":
        text = bench_output.csv_text(rows)
    else:
        text = bench_output.markdown(rows)
    if output is None:
        write_text(text)
    else:
        write_whole(output, text)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is never there in part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
