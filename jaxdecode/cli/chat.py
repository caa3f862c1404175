"""`jaxdecode chat`: a conversation whose history stays in the KV cache."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from jaxdecode.cli import options
from jaxdecode.cli.output import Report, say_error, write_text
from jaxdecode.errors import ChatTemplateError, DecodeError, RequestError

if TYPE_CHECKING:
    from jaxdecode.cli.runtime import Loaded
    from jaxdecode.models.kv_cache import KVCache
    from jaxdecode.sampling import SamplingParams

_DEFAULT_CONTEXT = 4096
_HELP = "commands: /reset begins anew, /exit ends (so does Ctrl-D)"


@dataclasses.dataclass
class Conversation:
    """What was said, and what of it the cache holds.

    Attributes:
      messages: for the chat template.
      cache: None before the first answer.
      cached: the token ids in the cache.
    """

    messages: list[dict[str, str]]
    cache: KVCache | None = None
    cached: list[int] = dataclasses.field(default_factory=list)


def chat(
    context: typer.Context,
    model: options.Model = options.DEFAULT_MODEL,
    dtype: options.Dtype = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = False,
    seed: options.Seed = None,
    system: options.System = None,
    chat_template: options.ChatTemplate = None,
    context_size: options.Context = None,
    attn: options.Attn = "auto",
    device: options.Device = "auto",
    mesh: options.Mesh = None,
    no_compilation_cache: options.NoCompilationCache = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Talk with a model; each answer continues from the last one's cache."""
    from jaxdecode.cli import runtime
    from jaxdecode.cli.together import refuse_launcher
    from jaxdecode.sampling import SamplingParams

    refuse_launcher("chat")
    report: Report = context.obj
    report.quiet = quiet
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
        repetition_penalty=repetition_penalty, stop=tuple(stop or ()), ignore_eos=ignore_eos,
        seed=seed,
    )  # fmt: skip
    loaded = runtime.load_model(
        report, model, dtype=dtype, attn=attn, device=device, mesh=mesh,
        context=context_size or _DEFAULT_CONTEXT,
        compilation_cache=not no_compilation_cache, chat_template=chat_template,
    )  # fmt: skip
    if loaded.tokenizer.chat_template is None:
        raise ChatTemplateError(
            f"{model} has no chat template; give one with --chat-template FILE, or continue text "
            "with `jaxdecode generate --no-chat`"
        )
    params = runtime.with_seed(report, loaded, params)
    capacity = context_size
    if capacity is None:
        capacity = min(loaded.model.config.max_positions, _DEFAULT_CONTEXT)
    report.say(f"{_HELP}; up to {capacity} tokens")
    converse(report, loaded, params, capacity, options.system_message(system))


def converse(
    report: Report,
    loaded: Loaded,
    params: SamplingParams,
    capacity: int,
    opening: list[dict[str, str]],
) -> None:
    """Answers line after line until the input ends."""
    conversation = Conversation(list(opening))
    for line in lines():
        if line == "/exit":
            return
        if line == "/reset":
            conversation = Conversation(list(opening))
            report.say("begun anew")
        elif line.startswith("/"):
            report.say(f"{line.split()[0]} is no command; {_HELP}; begin with a space to say it")
        elif line.strip():
            try:
                answer(report, loaded, params, capacity, conversation, line)
            except DecodeError as error:
                if not sys.stdin.isatty():
                    raise
                say_error(str(error))


def lines() -> Iterator[str]:
    """The lines of stdin; at a terminal with a prompt, editing and history."""
    if not sys.stdin.isatty():
        for line in sys.stdin.buffer:
            yield options.decode_utf8("stdin", line)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() edits lines once this is there
    while True:
        try:
            # At a terminal, stdout and stderr show up in the same place.
            yield input("> ")
        except EOFError:
            return


def answer(
    report: Report, loaded: Loaded, params: SamplingParams, capacity: int,
    conversation: Conversation, line: str,
) -> None:  # fmt: skip
    """Answers one line and keeps both in the conversation; an error leaves it as it was."""
    from jaxdecode.cli import runtime

    messages = [*conversation.messages, {"role": "user", "content": line}]
    tokens = runtime.encode(loaded, messages)
    room = capacity - len(tokens)
    if room < 1:
        raise RequestError(
            f"the conversation has {len(tokens)} tokens and --context is {capacity}; "
            "/reset begins anew"
        )
    params = dataclasses.replace(params, max_tokens=min(params.max_tokens, room))
    cache, rest = continued(report, loaded, conversation, tokens, capacity)
    conversation.cache, conversation.cached = None, []
    result = runtime.generate_text(report, loaded, rest, params, cache, on_text=write_text)
    write_text("\n")
    if result.finish_reason == "length":
        report.say(f"cut short after {len(result.tokens)} tokens")
    report.say(report.footer())
    conversation.messages = [*messages, {"role": "assistant", "content": result.text}]
    conversation.cache, conversation.cached = result.cache, tokens + result.tokens


def continued(
    report: Report, loaded: Loaded, conversation: Conversation, tokens: list[int], capacity: int
) -> tuple[KVCache, list[int]]:
    """The cache cut back to what it shares with `tokens`, and those that it lacks, at least one."""
    from jaxdecode.cli import runtime

    if conversation.cache is None:
        return runtime.empty_cache(report, loaded, capacity), tokens
    shared = 0
    for old, new in zip(conversation.cached, tokens[:-1], strict=False):
        if old != new:
            break
        shared += 1
    return conversation.cache.truncate(shared), tokens[shared:]
