"""`jaxdecode generate`: a prompt in, text out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxdecode.cli import options
from jaxdecode.cli.output import Report, peak_memory, write_json, write_text
from jaxdecode.errors import ChatTemplateError, RequestError

if TYPE_CHECKING:
    from jaxdecode.cli.runtime import Loaded
    from jaxdecode.results import Result, TokenLogprobs
    from jaxdecode.sampling import SamplingParams
    from jaxdecode.tokenizer import Tokenizer

Prompt = Annotated[
    str | None,
    typer.Option(
        "-p",
        "--prompt",
        metavar="TEXT|-",
        rich_help_panel=options.PROMPT,
        help="The prompt; - reads stdin.",
    ),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "-f",
        "--prompt-file",
        metavar="FILE",
        exists=True,
        dir_okay=False,
        rich_help_panel=options.PROMPT,
        help="Read the prompt from a file; as from stdin, without its last line break.",
    ),
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        rich_help_panel=options.CHAT,
        help="Ask through the chat template, or continue the text; if not given, ask if there is a "
        "template.",
    ),
]
PrefillStepSize = Annotated[
    int,
    typer.Option(
        metavar="TOKENS",
        rich_help_panel=options.RUN,
        help="Prompt tokens per step of prefill, a power of two from 16.",
    ),
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream/--no-stream", rich_help_panel=options.OUTPUT, help="Print the text as it comes."
    ),
]
Logprobs = Annotated[
    int | None,
    typer.Option(
        metavar="K",
        rich_help_panel=options.OUTPUT,
        help="Also give each token's log-probability and the K likeliest tokens: on stderr, or in "
        "the JSON.",
    ),
]


def generate(
    context: typer.Context,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    model: options.Model = options.DEFAULT_MODEL,
    dtype: options.Dtype = None,
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = False,
    seed: options.Seed = None,
    chat: Chat = None,
    system: options.System = None,
    chat_template: options.ChatTemplate = None,
    context_size: options.Context = None,
    prefill_step_size: PrefillStepSize = 512,
    attn: options.Attn = "auto",
    device: options.Device = "auto",
    mesh: options.Mesh = None,
    coordinator: options.Coordinator = None,
    num_processes: options.NumProcesses = None,
    process_id: options.ProcessId = None,
    join_timeout: options.JoinTimeout = 300,
    heartbeat_timeout: options.HeartbeatTimeout = 100,
    no_compilation_cache: options.NoCompilationCache = False,
    stream: Stream = True,
    logprobs: Logprobs = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write the text that follows a prompt."""
    from jaxdecode.cli import runtime, together
    from jaxdecode.sampling import SamplingParams

    report: Report = context.obj
    report.quiet = quiet
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        repetition_penalty=repetition_penalty, stop=tuple(stop or ()), ignore_eos=ignore_eos,
        seed=seed, logprobs=logprobs,
    )  # fmt: skip
    text = read_prompt(prompt, prompt_file)
    together.join_processes(
        report, coordinator, num_processes, process_id, join_timeout, heartbeat_timeout
    )
    loaded = runtime.load_model(
        report, model, dtype=dtype, attn=attn, device=device, mesh=mesh, context=context_size,
        compilation_cache=not no_compilation_cache, chat_template=chat_template,
    )  # fmt: skip
    request = what_to_encode(loaded.tokenizer, text, system, chat)
    answer(
        report, loaded, request, params, context_size, prefill_step_size,
        live=stream and not as_json, name=model if as_json else None,
    )  # fmt: skip


def answer(
    report: Report, loaded: Loaded, request: str | list[dict[str, str]], params: SamplingParams,
    context_size: int | None, prefill_step_size: int, *, live: bool, name: str | None,
) -> None:  # fmt: skip
    """Generates and writes: text as it comes (live) or at the end, or JSON that names the model."""
    from jaxdecode.cli import runtime

    params = runtime.with_seed(report, loaded, params)
    tokens = runtime.encode(loaded, request)
    cache = runtime.make_cache(report, loaded, context_size, len(tokens), params, prefill_step_size)
    result = runtime.generate_text(
        report, loaded, tokens, params, cache,
        on_text=write_text if live else None, prefill_step_size=prefill_step_size,
    )  # fmt: skip
    if name is not None:
        write_json(json_answer(report, loaded, name, result))
    else:
        write_rest(result, live)
        say_logprobs(report, loaded.tokenizer, result)
    report.say(report.footer())


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt's text, from wherever it is.

    Raises:
      RequestError: there is none, or two, or it is empty, or it is not UTF-8.
    """
    if (prompt is None) == (prompt_file is None):
        raise RequestError("give one prompt: -p TEXT, -p - to read stdin, or -f FILE")
    if prompt_file is not None:
        where = str(prompt_file)
        text = options.decode_utf8(where, prompt_file.read_bytes())
    elif prompt == "-":
        where = "stdin"
        text = options.decode_utf8(where, sys.stdin.buffer.read())
    else:
        where, text = "the prompt", prompt or ""
    if not text:
        raise RequestError(f"{where} is empty; give at least one character")
    return text


def what_to_encode(
    tokenizer: Tokenizer, text: str, system: str | None, chat: bool | None
) -> str | list[dict[str, str]]:
    """The text itself, or the messages for the chat template.

    Raises:
      ChatTemplateError: `chat` is asked for and there is no template.
      RequestError: there is a system message, and the text is only continued.
    """
    has_template = tokenizer.chat_template is not None
    if chat and not has_template:
        raise ChatTemplateError(
            "--chat: this model has no chat template; use --no-chat to continue the text, "
            "or give one with --chat-template FILE"
        )
    if has_template and chat is not False:
        return [*options.system_message(system), {"role": "user", "content": text}]
    if system is not None:
        raise RequestError("--system goes with a chat template; here the text is only continued")
    return text


def write_rest(result: Result, live: bool) -> None:
    """Writes what streaming has not written yet; a text ends its last line."""
    rest = "" if live else result.text
    write_text(rest if result.text.endswith("\n") else rest + "\n")


def json_answer(report: Report, loaded: Loaded, model: str, result: Result) -> dict[str, Any]:
    """The object that --json prints; tests hold its keys."""
    stats = result.stats
    return {
        "text": result.text,
        "tokens": result.tokens,
        "finish_reason": result.finish_reason,
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": stats.generated_tokens,
        "prompt_tps": stats.prompt_tps,
        "generation_tps": stats.generation_tps,
        "compile_seconds": stats.compile_seconds,
        "peak_memory_bytes": peak_memory(report.device),
        "seed": result.seed,
        "model": model,
        "dtype": loaded.model.dtype.name,
        "device": loaded.device_name,
        "num_devices": loaded.model.sharding.num_devices,
        "mesh": str(loaded.model.sharding),
        "attention": loaded.attention,
        "logprobs": _json_logprobs(loaded.tokenizer, result.logprobs),
    }


def _json_logprobs(
    tokenizer: Tokenizer, logprobs: list[TokenLogprobs] | None
) -> list[dict[str, Any]] | None:
    if logprobs is None:
        return None
    return [
        {
            "logprob": token.logprob,
            "top": [
                {"token": other, "text": _text_of(tokenizer, other), "logprob": logprob}
                for other, logprob in token.top
            ],
        }
        for token in logprobs
    ]


def say_logprobs(report: Report, tokenizer: Tokenizer, result: Result) -> None:
    """One line per token on stderr, if they were asked for."""
    for token, logprobs in zip(result.tokens, result.logprobs or (), strict=False):
        top = "  ".join(f"{_text_of(tokenizer, i)!r} {value:.3f}" for i, value in logprobs.top)
        report.say(f"logprob {_text_of(tokenizer, token)!r} {logprobs.logprob:.3f}  top: {top}")


def _text_of(tokenizer: Tokenizer, token: int) -> str:
    """A token's text. A model may have more rows than its tokenizer has tokens."""
    return tokenizer.decode([token]) if token < tokenizer.vocab_size else ""
