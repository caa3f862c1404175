"""What generation gives back."""

from __future__ import annotations

import dataclasses

from jaxdecode.models.kv_cache import KVCache
from jaxdecode.stats import Stats


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one generated token, from the model's logits before penalties and
    temperature.

    Attributes:
      logprob: of the token itself.
      top: (token, logprob) of the likeliest tokens, likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """One generated text.

    Attributes:
      tokens: every id generated, a final eos included.
      text: without eos and stop string; empty without a tokenizer.
      finish_reason: "stop" (an eos or a stop string) or "length" (max_tokens).
      logprobs: one per token, or None unless asked for.
      seed: of the draws.
      stats: counts and times of the whole call.
      cache: continues after `tokens`; shared by all results of a call, row by row. Over a mesh it
        may have more rows, which are empty.
    """

    tokens: list[int]
    text: str
    finish_reason: str
    logprobs: list[TokenLogprobs] | None
    seed: int
    stats: Stats
    cache: KVCache


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One generated token as it comes.

    Attributes:
      text: new text that is final; "" while a character or a stop string is incomplete.
      token: its id.
      logprobs: None unless asked for.
      finish_reason: None, and "stop" or "length" on the last chunk.
      result: on the last chunk, the whole result.
    """

    text: str
    token: int
    logprobs: TokenLogprobs | None
    finish_reason: str | None = None
    result: Result | None = None
