"""Text from prompts: tokenise, prefill in chunks, decode many tokens per dispatch, detokenise."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxdecode.cache_room import filled_lengths, refuse_donated, room_for
from jaxdecode.decode_loop import (
    DecodedTokens,
    DecodeState,
    SplitModel,
    decode,
    prefill,
    start_state,
)
from jaxdecode.errors import NonFiniteLogitsError, RequestError
from jaxdecode.models.kv_cache import KVCache
from jaxdecode.models.llama import Llama
from jaxdecode.plan import Plan, explain_exhaustion, plan_model
from jaxdecode.processes import check_same, random_seed
from jaxdecode.prompts import encode_prompts
from jaxdecode.results import Chunk, Result, TokenLogprobs
from jaxdecode.sampling import SamplingArrays, SamplingParams, sample_indices
from jaxdecode.stats import Stopwatch
from jaxdecode.text_stream import TextStream

TOKENS_PER_DISPATCH = 8
MAX_TOKENS_PER_DISPATCH = 1024
PREFILL_STEP_SIZE = 512
_SMALLEST_BUCKET = 16


def generate(
    model: Llama, tokenizer: Any, prompts: Any, params: SamplingParams | None = None, *,
    cache: KVCache | None = None, implementation: str | None = None,
    prefill_step_size: int = PREFILL_STEP_SIZE,
) -> list[Result]:  # fmt: skip
    """Continues one prompt or a batch of prompts of different lengths.

    A batch gives each prompt what it would get alone. The same prompt given several times is
    sampled differently each time.

    Args:
      model: from `jaxdecode.load` or `Llama(config)`.
      tokenizer: anything with encode(str) -> ids and decode(ids) -> str. None: prompts are ids.
      prompts: a str (special tokens are added), a list of {"role", "content"} (goes through the
        chat template), a list of token ids, or a list of such prompts.
      params: SamplingParams() when None, which is greedy.
      cache: continue after what it holds; `model.init_cache(batch, capacity)` to choose the room.
        Over a mesh, batch is a multiple of the axis `data`, and rows without a prompt stay empty.
        It is donated: use the one in the results from then on. None: just enough room.
      implementation: of attention, see `jaxdecode.decode_attention`.
      prefill_step_size: tokens of each prompt in a chunk of prefill, a power of two >= 16.

    Returns:
      One Result per prompt, in order.

    Raises:
      RequestError: a prompt is empty, has ids outside the vocabulary, or does not fit; the cache is
        not of this model and mesh.
      NonFiniteLogitsError: the model produced NaN or infinity.
      OutOfMemoryError: the device has no memory left; the message shows what was planned.
    """
    params = params or SamplingParams()
    with _explained(model, tokenizer, prompts, params, cache):
        run = _Run(
            model, tokenizer, prompts, params, cache, implementation, sizes=(prefill_step_size,)
        )
        run.check_step_size(prefill_step_size)
        run.prefill(prefill_step_size)
        while not run.finished:
            run.decode(TOKENS_PER_DISPATCH)
        return run.results()


def stream_generate(
    model: Llama, tokenizer: Any, prompt: Any, params: SamplingParams | None = None, *,
    cache: KVCache | None = None, implementation: str | None = None,
    tokens_per_dispatch: int = TOKENS_PER_DISPATCH, prefill_step_size: int = PREFILL_STEP_SIZE,
    on_prefill: Any = None,
) -> Iterator[Chunk]:  # fmt: skip
    """Like `generate` for one prompt, but yields each token as it comes.

    The texts of all chunks make the text that `generate` returns. Checks its arguments at once.

    Args:
      tokens_per_dispatch: tokens that come together; more are faster in all, fewer come sooner.
      on_prefill: called with (tokens done, tokens in all) after each chunk of the prompt.
    """
    if not 1 <= tokens_per_dispatch <= MAX_TOKENS_PER_DISPATCH:
        raise RequestError(
            f"tokens_per_dispatch must be from 1 to {MAX_TOKENS_PER_DISPATCH}, "
            f"found {tokens_per_dispatch}"
        )
    params = params or SamplingParams()
    explained = partial(_explained, model, tokenizer, prompt, params, cache)
    with explained():
        run = _Run(
            model, tokenizer, prompt, params, cache, implementation,
            sizes=(tokens_per_dispatch, prefill_step_size),
        )  # fmt: skip
    if len(run.rows) != 1:
        raise RequestError(f"stream_generate takes one prompt, found {len(run.rows)}; use generate")
    run.check_step_size(prefill_step_size)
    return _stream(run, tokens_per_dispatch, prefill_step_size, on_prefill, explained)


def _stream(
    run: _Run, tokens_per_dispatch: int, prefill_step_size: int, on_prefill: Any,
    explained: Callable[[], contextlib.AbstractContextManager[None]],
) -> Iterator[Chunk]:  # fmt: skip
    with explained():
        run.prefill(prefill_step_size, on_prefill)
    while not run.finished:
        with explained():
            chunks = run.decode(tokens_per_dispatch)
        if run.finished:
            (result,) = run.results()
            chunks[-1] = dataclasses.replace(
                chunks[-1], finish_reason=result.finish_reason, result=result
            )
        yield from chunks


def _explained(
    model: Llama, tokenizer: Any, prompts: Any, params: SamplingParams, cache: KVCache | None
) -> contextlib.AbstractContextManager[None]:
    """Where memory runs out inside, an error shows what this request was planned to take."""

    def planned() -> Plan | None:
        lengths = list(map(len, encode_prompts(tokenizer, prompts, model.config.vocab_size)))
        context = max(lengths) + params.max_tokens if cache is None else cache.capacity
        return plan_model(model, context=context, batch=len(lengths))

    return explain_exhaustion(planned)


class _Row:
    """One sequence of a run, on the host."""

    def __init__(self, prompt: list[int], stream: TextStream | None, stop_ids: frozenset[int]):
        self.prompt = prompt
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.text: list[str] = []
        self.finish_reason: str | None = None
        self._stream = stream
        self._stop_ids = stop_ids

    def add(self, token: int, logprobs: TokenLogprobs, max_tokens: int) -> str:
        """Takes one generated token and returns the text that became final by it."""
        self.tokens.append(token)
        self.logprobs.append(logprobs)
        text = ""
        if token in self._stop_ids:
            self.finish_reason = "stop"
        elif self._stream is not None:
            text = self._stream.push(token)
            if self._stream.stopped:
                self.finish_reason = "stop"
        if self.finish_reason is None and len(self.tokens) == max_tokens:
            self.finish_reason = "length"
        if self.finish_reason and self._stream is not None and not self._stream.stopped:
            text += self._stream.finish()
        self.text.append(text)
        return text


class _Run:
    """One call of generate: its rows on the host, its state on the device."""

    def __init__(
        self, model: Llama, tokenizer: Any, prompts: Any, params: SamplingParams,
        cache: KVCache | None, implementation: str | None, *, sizes: tuple[int, ...] = (),
    ):  # fmt: skip
        what = "prompts and sampling values"
        try:
            filled = [] if cache is None else filled_lengths(model, cache)
            encoded = encode_prompts(tokenizer, prompts, model.config.vocab_size, filled)
            stop_ids = _stop_ids(model, tokenizer, params)
        except Exception as error:
            check_same(model.sharding, f"refused: {error}", what)  # or the others would wait
            raise
        check_same(model.sharding, (encoded, params, stop_ids, implementation, sizes), what)
        idle = -len(encoded) % model.sharding.data
        cache = room_for(model, encoded, idle, params.max_tokens, cache, filled)
        self.seed = random_seed(model.sharding) if params.seed is None else params.seed
        self.rows = [
            _Row(ids, _text_stream(tokenizer, params), frozenset(stop_ids)) for ids in encoded
        ]
        self._params = params
        self._idle = idle
        self._filled = filled[: len(encoded)] or [0] * len(encoded)
        self._implementation = implementation
        self._model = SplitModel(model)
        self._begun = 0  # tokens per row
        self._ahead: DecodedTokens | None = None
        self._place = model.sharding.place
        remaining = self._per_row([params.max_tokens] * len(encoded), idle=0)
        self._state: DecodeState = start_state(model, cache, remaining)
        self._runs_ahead = _has_own_processor(self._state.cache.lengths)
        indices = sample_indices(encoded) + [0] * idle
        self._sampling = SamplingArrays.create(params, self.seed, indices)
        # Padded, so that the number of stop ids makes no new compilation.
        padding = -len(stop_ids) % 16 or 16 * (not stop_ids)
        self._stop_ids = np.array(stop_ids + [-1] * padding, np.int32)
        self._watch = Stopwatch()

    @property
    def finished(self) -> bool:
        return all(row.finish_reason for row in self.rows)

    def _per_row(self, values: Sequence[int], *, idle: int) -> np.ndarray:
        """[B] int32 from one value per row, and one for those that only fill up the batch."""
        return np.array([*values, *[idle] * self._idle], np.int32)

    def check_step_size(self, step_size: int) -> None:
        if step_size < _SMALLEST_BUCKET or step_size & (step_size - 1):
            raise RequestError(
                f"prefill_step_size must be a power of two from {_SMALLEST_BUCKET}, "
                f"found {step_size}"
            )

    def prefill(self, step_size: int, on_prefill: Any = None) -> None:
        """Runs the prompts, `step_size` tokens of each at a time."""
        refuse_donated(self._state.cache)  # a stream begins some time after it was asked for
        lengths = self._per_row([len(row.prompt) for row in self.rows], idle=0)
        longest = int(lengths.max())
        with self._watch.phase("prompt"):
            for start in range(0, longest, step_size):
                width = _bucket(min(step_size, longest - start))
                tokens = np.zeros((len(lengths), width), np.int32)
                for row, padded in zip(self.rows, tokens, strict=False):
                    piece = row.prompt[start : start + width]
                    padded[: len(piece)] = piece
                self._state = prefill(
                    self._model.static, self._model.leaves, self._state, tokens,
                    np.clip(lengths - start, 0, width), implementation=self._implementation,
                )  # fmt: skip
                if on_prefill is not None:
                    jax.block_until_ready(self._state.logits)
                    on_prefill(min(start + width, longest), longest)
            jax.block_until_ready(self._state.logits)

    def decode(self, num_steps: int) -> list[Chunk]:
        """Generates up to `num_steps` tokens per row. Returns the first row's as chunks."""
        with self._watch.phase("generation", since_last=self._ahead is not None):
            made = self._ahead or self._begin(num_steps)
            # Begun before these are read, or the device would wait for the host.
            more = self._runs_ahead and self._begun < self._params.max_tokens
            self._ahead = self._begin(num_steps) if more else None
            made = jax.device_get(made)
        first_step = max(len(row.tokens) for row in self.rows)
        running = [row.finish_reason is None for row in self.rows]
        chunks = [self._take(made, r, first_step) for r in range(len(self.rows))]
        if running != [row.finish_reason is None for row in self.rows]:
            self._let_finished_idle()
        return chunks[0]

    def _begin(self, num_steps: int) -> DecodedTokens:
        """What the device makes of `num_steps` more tokens per row, some time."""
        self._begun += num_steps
        self._state, made = decode(
            self._model.static, self._model.leaves, self._state, self._sampling, self._stop_ids,
            num_steps=num_steps, num_logprobs=self._params.logprobs or 0,
            implementation=self._implementation,
        )  # fmt: skip
        return made

    def _take(self, made: DecodedTokens, r: int, first_step: int) -> list[Chunk]:
        """Gives one dispatch's tokens to row r; what comes after its stop string is dropped."""
        row, chunks = self.rows[r], []
        for i in range(len(made.tokens)):
            if row.finish_reason:
                break
            if not made.finite[i, r]:
                raise NonFiniteLogitsError(first_step + i, r)
            top = zip(made.top_tokens[i, r].tolist(), made.top_logprobs[i, r].tolist(), strict=True)
            logprobs = TokenLogprobs(float(made.logprobs[i, r]), tuple(top))
            token = int(made.tokens[i, r])
            text = row.add(token, logprobs, self._params.max_tokens)
            wanted = self._params.logprobs is not None
            chunks.append(Chunk(text, token, logprobs if wanted else None))
        return chunks

    def _let_finished_idle(self) -> None:
        """Tells the device what it cannot know: which rows have a stop string."""
        running = [row.finish_reason is None for row in self.rows]
        self._state = dataclasses.replace(
            self._state,
            remaining=self._state.remaining * self._place(self._per_row(running, idle=0), "B"),
        )

    def _cache(self) -> KVCache:
        """The cache without what the rows dropped."""
        kept = [
            filled + len(row.prompt) + len(row.tokens)
            for filled, row in zip(self._filled, self.rows, strict=True)
        ]
        return self._state.cache.truncate(self._place(self._per_row(kept, idle=0), "B"))

    def results(self) -> list[Result]:
        stats = self._watch.stats(
            prompt_tokens=sum(len(row.prompt) for row in self.rows),
            generated_tokens=sum(len(row.tokens) for row in self.rows),
        )
        cache = self._cache()
        return [
            Result(
                tokens=row.tokens,
                text="".join(row.text),
                finish_reason=row.finish_reason or "length",
                logprobs=row.logprobs if self._params.logprobs is not None else None,
                seed=self.seed,
                stats=stats,
                cache=cache,
            )
            for row in self.rows
        ]


def _has_own_processor(array: jax.Array) -> bool:
    """Whether its devices compute beside the host. Where they are the host, tokens that are begun
    ahead and then not wanted would keep it from what comes next."""
    return all(device.platform != "cpu" for device in array.devices())


def _stop_ids(model: Llama, tokenizer: Any, params: SamplingParams) -> list[int]:
    if params.stop_token_ids is not None:
        return list(params.stop_token_ids)
    if params.ignore_eos:
        return []
    # A checkpoint may name some of its ends in its configuration and others in its tokenizer.
    return list(dict.fromkeys((*model.config.eos_ids, *getattr(tokenizer, "eos_ids", ()))))


def _text_stream(tokenizer: Any, params: SamplingParams) -> TextStream | None:
    if tokenizer is None:
        if params.stop:
            raise RequestError(
                f"stop={params.stop!r} needs a tokenizer; without one use stop_token_ids"
            )
        return None
    # Other tokenizers, as those of transformers, do not count added tokens as their vocabulary.
    counted = hasattr(tokenizer, "__len__")
    known = len(tokenizer) if counted else getattr(tokenizer, "vocab_size", None)

    def decode_known(ids: list[int]) -> str:
        # A model may have more rows than its tokenizer has tokens, for a round number.
        return tokenizer.decode([x for x in ids if known is None or x < known])

    return TextStream(decode_known, stop=params.stop)


def _bucket(length: int) -> int:
    """The padded width of a chunk: a power of two, so that few widths are compiled."""
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())
