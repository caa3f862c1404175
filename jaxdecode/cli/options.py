"""Options that several verbs share."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from jaxdecode.errors import RequestError
from jaxdecode.models.config import PRESETS

DEFAULT_MODEL = "smollm2-135m"
# Headings of the help.
PROMPT, CHAT, MODEL = "Prompt", "Chat template", "Model"
SAMPLING, RUN, OUTPUT = "Sampling", "Device and memory", "Output"
PROCESSES = "Several processes (found out under Slurm and Open MPI)"


def _set_verbose(verbose: bool) -> bool:
    logging.getLogger("jaxdecode").setLevel(logging.DEBUG if verbose else logging.WARNING)
    return verbose


def _known_preset(name: str | None) -> str | None:
    if name is not None and name not in PRESETS:
        raise RequestError(f"--preset {name!r} is unknown; known: {', '.join(PRESETS)}")
    return name


Model = Annotated[
    str,
    typer.Option(
        "-m",
        "--model",
        metavar="PATH|NAME",
        rich_help_panel=MODEL,
        help="Hugging Face directory, .gguf file, Orbax directory, org/name in the local Hugging "
        f"Face cache, or {DEFAULT_MODEL}, which is fetched once.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=MODEL,
        callback=_known_preset,
        help="Instead of -m, the shapes of a well-known model, without its weights: "
        f"{', '.join(PRESETS)}.",
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=MODEL,
        help="Weights in float32, bfloat16 or float16; if not given, in the file's own type.",
    ),
]

MaxTokens = Annotated[
    int,
    typer.Option(
        "-n", "--max-tokens", rich_help_panel=SAMPLING, help="Tokens to generate at most."
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", "--temp", rich_help_panel=SAMPLING, help="0 takes the likeliest token."
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        rich_help_panel=SAMPLING, help="Keep the likeliest tokens that make up this probability."
    ),
]
TopK = Annotated[
    int, typer.Option(rich_help_panel=SAMPLING, help="Keep this many tokens; 0 keeps all.")
]
MinP = Annotated[
    float,
    typer.Option(
        rich_help_panel=SAMPLING, help="Drop tokens less likely than this share of the likeliest."
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        rich_help_panel=SAMPLING, help="Above 1 makes tokens that occurred before less likely."
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT", rich_help_panel=SAMPLING, help="End before this text; may be repeated."
    ),
]
IgnoreEos = Annotated[
    bool,
    typer.Option(
        "--ignore-eos", rich_help_panel=SAMPLING, help="Go on after the end-of-text token."
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=SAMPLING, help="Same seed, same text; if not given, random and printed."
    ),
]

System = Annotated[
    str | None, typer.Option(metavar="TEXT", rich_help_panel=CHAT, help="The system message.")
]
ChatTemplate = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        exists=True,
        dir_okay=False,
        rich_help_panel=CHAT,
        help="Jinja template to use instead of the model's own.",
    ),
]

Context = Annotated[
    int | None,
    typer.Option(
        "-c",
        "--context",
        metavar="TOKENS",
        rich_help_panel=RUN,
        help="Capacity of the KV cache, for prompt and answer together.",
    ),
]
Attn = Annotated[
    Literal["auto", "flash_decode", "xla", "cudnn"],
    typer.Option(
        metavar="NAME",
        rich_help_panel=RUN,
        help="Attention: auto, flash_decode, xla or cudnn; `jaxdecode doctor` says what runs here.",
    ),
]
Device = Annotated[
    Literal["auto", "gpu", "cpu"],
    typer.Option(metavar="NAME", rich_help_panel=RUN, help="Where it runs: auto, gpu or cpu."),
]
Mesh = Annotated[
    str | None,
    typer.Option(
        metavar="SIZES|auto",
        rich_help_panel=RUN,
        help="Devices to cut the model over, such as tensor=2,seq=2: data (batch), tensor (heads, "
        "feed-forward, vocabulary), seq (length of the KV cache); auto takes all devices.",
    ),
]
NoCompilationCache = Annotated[
    bool,
    typer.Option(
        "--no-compilation-cache",
        rich_help_panel=RUN,
        help="Neither use nor keep compiled programs in your private cache directory.",
    ),
]

Json = Annotated[
    bool,
    typer.Option("--json", rich_help_panel=OUTPUT, help="Print one JSON object instead of text."),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "-q", "--quiet", rich_help_panel=OUTPUT, help="Only warnings and errors on stderr."
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "-v",
        "--verbose",
        rich_help_panel=OUTPUT,
        callback=_set_verbose,
        is_eager=True,
        help="Show the traceback of an error.",
    ),
]

Coordinator = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        rich_help_panel=PROCESSES,
        help="Where process 0 listens for the others; anybody who reaches that port can interfere.",
    ),
]
NumProcesses = Annotated[
    int | None,
    typer.Option(metavar="N", rich_help_panel=PROCESSES, help="How many processes there are."),
]
ProcessId = Annotated[
    int | None,
    typer.Option(metavar="I", rich_help_panel=PROCESSES, help="Which one this is, from 0."),
]
JoinTimeout = Annotated[
    int,
    typer.Option(
        metavar="SECONDS", rich_help_panel=PROCESSES, help="How long to wait for the others."
    ),
]
HeartbeatTimeout = Annotated[
    int,
    typer.Option(
        metavar="SECONDS",
        rich_help_panel=PROCESSES,
        help="After how long a silent process counts as dead.",
    ),
]


def parse_mesh(text: str) -> dict[str, int] | Literal["auto"]:
    """The number of devices along each axis that --mesh names, in its order; or "auto".

    Raises:
      RequestError: it is no such list, or names an axis twice.
    """
    if text == "auto":
        return "auto"
    sizes: dict[str, int] = {}
    for item in text.split(","):
        found = re.fullmatch(r"\s*([a-z]+)\s*=\s*([1-9][0-9]{0,5})\s*", item)
        if found is None:
            raise RequestError(
                f"--mesh takes auto, or a list such as data=1,tensor=2,seq=2; found {text!r:.100}"
            )
        if found[1] in sizes:
            raise RequestError(f"--mesh names {found[1]} twice: {text!r:.100}")
        sizes[found[1]] = int(found[2])
    return sizes


def system_message(text: str | None) -> list[dict[str, str]]:
    """The messages that a conversation begins with."""
    return [] if text is None else [{"role": "system", "content": text}]


def decode_utf8(where: str, data: bytes) -> str:
    """The text of a file or a line, without the line break that ends it."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{where} is not UTF-8 text ({error}); convert it first") from None
    return text.removesuffix("\n").removesuffix("\r")
