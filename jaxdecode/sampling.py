"""Choosing the next token: penalties, filters and the draw, on arrays. B batch, V vocabulary.

The order is Hugging Face's: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from typing import Any

import jax
import jax.numpy as jnp

from jaxdecode.errors import RequestError

Array = jax.Array

MAX_TOKENS_LIMIT = 2**31 - 1
MAX_LOGPROBS = 100
MAX_STOPS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a text is continued. Checks itself.

    Attributes:
      max_tokens: tokens to generate at most, >= 1.
      temperature: 0 for greedy; logits are divided by it.
      top_p: in (0, 1]; the smallest set of tokens with at least this probability. 1: off.
      top_k: the k most likely tokens; 0: off.
      min_p: in [0, 1); tokens at least this likely relative to the likeliest. 0: off.
      repetition_penalty: > 0; logits of tokens in this call's prompt or generated in it are divided
        by it where positive and multiplied where negative (arXiv 1909.05858). A cache to continue
        from does not say which tokens it holds, so those do not count. 1: off.
      stop: strings at which the text ends; they are not part of it. A str is one stop string.
      stop_token_ids: ids at which the text ends; None: the model's own eos ids.
      ignore_eos: go on past the model's own eos ids.
      seed: of the draws; None: a random one, which the result names.
      logprobs: None, or how many of the likeliest tokens to report beside each token's own
        log-probability.

    Raises:
      RequestError: a value is out of range; the message names it.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self):
        checked: dict[str, Any] = {
            "max_tokens": _integer("max_tokens", self.max_tokens, 1, MAX_TOKENS_LIMIT),
            "temperature": _number("temperature", self.temperature, 0.0, 1e4),
            "top_p": _number("top_p", self.top_p, 0.0, 1.0, open_low=True),
            "top_k": _integer("top_k", self.top_k, 0, 2**31 - 1),
            "min_p": _number("min_p", self.min_p, 0.0, 1.0, open_high=True),
            "repetition_penalty": _number(
                "repetition_penalty", self.repetition_penalty, 0.0, 1e4, open_low=True
            ),
            "stop": _stop_strings(self.stop),
        }
        if self.seed is not None:
            checked["seed"] = _integer("seed", self.seed, 0, 2**63 - 1)
        if self.logprobs is not None:
            checked["logprobs"] = _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos must be True or False, found {self.ignore_eos!r}")
        if self.stop_token_ids is not None:
            ids = _items("stop_token_ids", self.stop_token_ids, "ids")
            checked["stop_token_ids"] = tuple(
                _integer("stop_token_ids", token, 0, 2**31 - 1) for token in ids
            )
        # As plain Python numbers: NumPy's would wrap around or lack methods further on.
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """SamplingParams as traced scalars, so that hardly a value of theirs makes a new compilation.

    There are three programs: without a draw, with one, and with one after the sort that top-k and
    top-p need. One program that decided on values would stop at each token, on a GPU, until the
    host knows them.

    Attributes:
      temperature, top_p, min_p, repetition_penalty: float32 scalars; top_k: int32 scalar.
      keys: [B] random keys, one per sequence: fold_in(key(seed), sample index).
      draws: whether the temperature is above 0, in float32. sorts: whether it is, and top-k or
        top-p is on.
    """

    temperature: Array
    top_p: Array
    top_k: Array
    min_p: Array
    repetition_penalty: Array
    keys: Array
    draws: bool = dataclasses.field(metadata={"static": True})
    sorts: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(cls, params: SamplingParams, seed: int, sample_indices: list[int]) -> SamplingArrays:
        """`sample_indices` [B] tell samples of the same prompt apart."""
        # A key takes 32 bits of a seed; the rest, where there is one, is folded in.
        # By the generator whose draws for a row do not depend on the rows beside it, whatever JAX
        # is told to use elsewhere.
        key = jax.random.key(seed & 0xFFFFFFFF, impl="threefry2x32")
        if seed >> 32:
            key = jax.random.fold_in(key, seed >> 32)
        fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        # A device may take what is smaller for zero, and divide by it.
        draws = bool(params.temperature >= jnp.finfo(jnp.float32).tiny)
        return cls(
            temperature=jnp.float32(params.temperature),
            top_p=jnp.float32(params.top_p),
            top_k=jnp.int32(params.top_k),
            min_p=jnp.float32(params.min_p),
            repetition_penalty=jnp.float32(params.repetition_penalty),
            keys=fold(key, jnp.asarray(sample_indices, jnp.uint32)),
            draws=draws,
            sorts=draws and (params.top_k > 0 or params.top_p < 1),
        )


def sample_indices(prompts: list[list[int]]) -> list[int]:
    """How many times the same prompt came before: what tells samples of one prompt apart."""
    counts: dict[tuple[int, ...], int] = {}
    indices = []
    for prompt in map(tuple, prompts):
        indices.append(counts.get(prompt, 0))
        counts[prompt] = indices[-1] + 1
    return indices


def sample(logits: Array, seen: Array, positions: Array, sampling: SamplingArrays) -> Array:
    """Draws one token per sequence.

    Args:
      logits: [B, V] float32.
      seen: [B, V] bool, tokens of the prompt and those already generated.
      positions: [B] int32, where the new token will stand in its sequence.

    Returns:
      [B] int32. A sequence's draw depends on its own key and position only.
    """
    logits = penalize(logits, seen, sampling.repetition_penalty)
    if not sampling.draws:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Shifted first, so that a tiny temperature cannot overflow.
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    filtered = filter_logits(shifted / sampling.temperature, sampling)
    keys = jax.vmap(jax.random.fold_in)(sampling.keys, positions)
    gumbel = functools.partial(jax.random.gumbel, shape=logits.shape[1:], dtype=logits.dtype)
    noise = jax.vmap(gumbel)(keys)
    return jnp.argmax(filtered + noise, axis=-1).astype(jnp.int32)


def penalize(logits: Array, seen: Array, penalty: Array) -> Array:
    """Makes tokens already seen less likely (penalty > 1) or more (< 1). [B, V] each."""
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    # A tiny penalty overflows, and infinity minus infinity would leave nothing to choose from.
    limit = jnp.finfo(logits.dtype).max
    return jnp.where(seen, jnp.clip(penalized, -limit, limit), logits)


def filter_logits(logits: Array, sampling: SamplingArrays) -> Array:
    """Sets the logits outside top-k, top-p and min-p to -inf. [B, V]; tokens that tie with the last
    one kept are kept too."""
    # The sort is the expensive part, and plain temperature sampling does without.
    if sampling.sorts:
        logits = _keep_likely(logits, sampling)
    top = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(logits >= top + jnp.log(sampling.min_p), logits, -jnp.inf)


def _keep_likely(logits: Array, sampling: SamplingArrays) -> Array:
    """Sets the logits outside top-k and top-p to -inf."""
    V = logits.shape[-1]
    ordered = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(V, dtype=jnp.int32)[None, :]
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)
    kth = jax.lax.dynamic_slice_in_dim(ordered, k - 1, 1, axis=-1)
    in_top_k = ordered >= kth
    probability = jax.nn.softmax(jnp.where(in_top_k, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    # The likeliest token always stays; top_p = 1 keeps all, whatever the rounding of the sum.
    inside = (before < sampling.top_p) | (rank == 0) | (sampling.top_p >= 1)
    count = jnp.sum((inside & in_top_k).astype(jnp.int32), axis=-1, keepdims=True)
    lowest = jnp.take_along_axis(ordered, count - 1, axis=-1)
    return jnp.where(logits >= lowest, logits, -jnp.inf)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else _items("stop", stop, "strings")
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop takes at most {MAX_STOPS} strings, found {len(stops)}")
    for text in stops:
        if not isinstance(text, str) or not text:
            raise RequestError(f"stop must hold non-empty strings, found {text!r}")
    return stops


def _items(name: str, value: Any, what: str) -> tuple[Any, ...]:
    try:
        return tuple(value)
    except TypeError:
        raise RequestError(f"{name} must be a sequence of {what}, found {value!r:.100}") from None


def _integer(name: str, value: Any, low: int, high: int) -> int:
    integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not (integer and low <= value <= high):
        raise RequestError(f"{name} must be an integer from {low} to {high}, found {value!r:.100}")
    return int(value)


def _number(
    name: str, value: Any, low: float, high: float, *,
    open_low: bool = False, open_high: bool = False,
) -> float:  # fmt: skip
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    excluded = (low,) * open_low + (high,) * open_high
    # NaN is inside nothing.
    if not (number and low <= value <= high and value not in excluded):
        start, end = "above" if open_low else "from", "to below" if open_high else "to"
        raise RequestError(
            f"{name} must be a number {start} {low:g} {end} {high:g}, found {value!r:.100}"
        )
    return float(value)
