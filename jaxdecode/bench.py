"""How fast a model decodes here, and how near that comes to reading its bytes once per token.

The bound: a decode step reads every weight but the embedding table, of which it looks up one row
per sequence (a tied table is the output projection too, and is read whole), and the keys and values
of every token that its sequences see. Bytes over the read ceiling of this device are the time that
no decoder undercuts. KV bytes are the mean over the timed tokens.

Depth d means that the cache holds d tokens when the clock starts. They are not prefilled: the cache
gets random contents and its lengths are set. What a step reads and computes depends on lengths, not
on values, so it takes the same time; zeros would not do, because chips run them at higher clocks.

B batch.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxdecode.decode_loop import DecodeState, SplitModel, decode, start_state
from jaxdecode.errors import DeviceError, RequestError
from jaxdecode.generation import MAX_TOKENS_PER_DISPATCH, PREFILL_STEP_SIZE, generate
from jaxdecode.memory import num_weights
from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.kv_cache import KVCache, round_up_capacity
from jaxdecode.models.llama import Llama
from jaxdecode.models.random_model import random_array
from jaxdecode.models.sharding import Sharding
from jaxdecode.pallas_kernels import IMPLEMENTATIONS, AttentionChoice, explain_attention
from jaxdecode.sampling import SamplingArrays, SamplingParams

Array = jax.Array

# Attention as it was before Flash-Decoding: the keys of a sequence are not split.
NO_SPLIT = "flash_decode_nosplit"
NAMES = ("auto", *IMPLEMENTATIONS, NO_SPLIT)
MAX_TOKENS, MAX_REPETITIONS = MAX_TOKENS_PER_DISPATCH, 10_000
MAX_DEPTH, MAX_BATCH = 2**30, 2**16
_ONE_DEVICE = Sharding()
_WITHOUT_END = np.iinfo(np.int32).max
# Streams of random values that no weight uses.
_FIRST_CACHE_STREAM = 2**20


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement; with `dataclasses.asdict`, one row of a results file.

    Attributes:
      test: "tg128 @ d512" (128 tokens generated at depth 512) or "pp512" (a prompt of 512 tokens),
        as llama-bench names them.
      mesh: over which the model is sharded; "" on one device.
      depth: tokens in the cache at the start; a list where the sequences differ.
      capacity: slots per sequence of the cache.
      implementation: of attention.
      tokens: per sequence and repetition.
      tok_s: tokens of all sequences per second, the mean of the repetitions; None if the clock did
        not move.
      tok_s_std: its standard deviation; None for one repetition.
      seconds: of a repetition, the mean; for a prompt, the time to its first token.
      compile_s: how much longer the first repetition took, which counts for nothing else.
      gb_s: bytes read per second, in 10^9.
      bytes_per_step: read by one device in one step. None, like the bound, for a prompt.
      bound_tok_s: what the read ceiling allows; fraction_of_bound: tok_s over that.
    """

    model: str
    mesh: str
    dtype: str
    test: str
    batch: int
    depth: int | list[int]
    capacity: int
    implementation: str
    tokens: int
    repetitions: int
    tok_s: float | None
    tok_s_std: float | None
    seconds: float
    compile_s: float
    gb_s: float | None = None
    bytes_per_step: int | None = None
    bound_tok_s: float | None = None
    fraction_of_bound: float | None = None


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measures one model.

    Attributes:
      model: any; speed does not depend on the weights' values.
      name: of the model, for the rows.
      read_ceiling: bytes per second, see `jaxdecode.read_bandwidth`.
      tokens: generated per measurement, all in one dispatch.
      repetitions: measurements per row, after one that compiles, and of decoding one more: at its
        second run XLA records on a GPU what it launches from then on.

    Raises:
      RequestError: a value is out of range.
    """

    model: Llama
    name: str
    read_ceiling: float
    tokens: int = 128
    repetitions: int = 5

    def __post_init__(self):
        check_range("tokens", self.tokens, 1, MAX_TOKENS)
        check_range("repetitions", self.repetitions, 1, MAX_REPETITIONS)
        if not self.read_ceiling > 0:
            raise RequestError(f"read_ceiling must be above 0 bytes/s, found {self.read_ceiling}")

    def decode(
        self, lengths: Sequence[int], implementation: str = "auto", *, capacity: int | None = None
    ) -> Row:
        """Times the decode step of `generate`, greedy, as many tokens per dispatch as are measured.

        Args:
          lengths: [B] tokens in the cache of each sequence when the clock starts.
          implementation: of attention, one of NAMES.
          capacity: tokens per sequence that the cache has room for; None for just enough.

        Raises:
          RequestError: the tokens do not fit into the capacity.
          DeviceError: the implementation does not run here.
        """
        config, sharding = self.model.config, self.model.sharding
        dispatch = self.dispatch(lengths, implementation, capacity=capacity)
        num_bytes = cache_bytes(config, lengths, self.tokens, self.model.dtype.itemsize)
        # Each device reads its own part of the cache, and of the weights.
        num_bytes /= sharding.parts("B") * sharding.parts("S") * sharding.parts("K")
        num_bytes += weight_bytes(self.model)
        return self._row(
            _test_name(self.tokens, lengths), dispatch.choice,
            batch=len(lengths), depth=list(lengths) if len(set(lengths)) > 1 else lengths[0],
            capacity=dispatch.capacity, tokens=self.tokens, num_bytes=round(num_bytes),
            seconds=self._times(dispatch),
        )  # fmt: skip

    def _times(self, dispatch: Dispatch) -> list[float]:
        compiling, _, *seconds = (dispatch() for _ in range(self.repetitions + 2))
        return [compiling, *seconds]

    def dispatch(
        self, lengths: Sequence[int], implementation: str = "auto", *, capacity: int | None = None
    ) -> Dispatch:
        """What `decode` times, by itself; arguments and errors are the same."""
        config, sharding = self.model.config, self.model.sharding
        slots = slots_for(lengths, self.tokens, capacity, sharding)
        choice = choose_attention(
            config, self.model.dtype, implementation, sharding, len(lengths), slots
        )
        return Dispatch(self.model, lengths, implementation, choice, slots, self.tokens)

    def prefill(
        self, prompt_tokens: int, batch: int = 1, implementation: str = "auto", *,
        step_size: int = PREFILL_STEP_SIZE,
    ) -> Row:  # fmt: skip
        """Times `generate` from the prompts' ids to the logits of their first tokens.

        Args:
          prompt_tokens: of each of `batch` prompts.
          implementation: of attention, one of NAMES but flash_decode_nosplit.
          step_size: tokens of each prompt that go through the model at once.
        """
        check_range("prompt_tokens", prompt_tokens, 1, MAX_DEPTH)
        check_range("batch", batch, 1, MAX_BATCH)
        if implementation == NO_SPLIT:
            raise RequestError(f"{NO_SPLIT} is for decoding; a prompt goes through flash_decode")
        cache = self.model.init_cache(batch, prompt_tokens + 1)
        capacity, width = cache.capacity, min(prompt_tokens, step_size)
        config = self.model.config
        choice = choose_attention(
            config, self.model.dtype, implementation, self.model.sharding, batch, capacity, width
        )
        prompts = [[i % config.vocab_size for i in range(prompt_tokens)]] * batch
        seconds: list[float] = []
        for _ in range(self.repetitions + 1):
            result, *_ = generate(
                self.model, None, prompts, SamplingParams(max_tokens=1, ignore_eos=True),
                cache=cache, implementation=None if implementation == "auto" else implementation,
                prefill_step_size=step_size,
            )  # fmt: skip
            cache = result.cache.truncate(0)
            compiling = 0.0 if seconds else result.stats.compile_seconds
            seconds.append(result.stats.prompt_seconds + compiling)
        return self._row(
            f"pp{prompt_tokens}", choice, batch=batch, depth=0, capacity=capacity,
            tokens=prompt_tokens, seconds=seconds,
        )  # fmt: skip

    def _row(
        self, test: str, choice: AttentionChoice, *, batch: int, depth: int | list[int],
        capacity: int, tokens: int, seconds: list[float], num_bytes: int | None = None,
    ) -> Row:  # fmt: skip
        """The row of these times, of which the first is that of compiling and warming up."""
        first, *seconds = seconds
        rate, deviation = mean_and_deviation(batch * tokens, seconds)
        row = Row(
            model=self.name, mesh=str(self.model.sharding),
            dtype=self.model.dtype.name, test=test, batch=batch, depth=depth, capacity=capacity,
            implementation=choice.implementation, tokens=tokens,
            repetitions=len(seconds), tok_s=rate, tok_s_std=deviation,
            seconds=statistics.fmean(seconds), compile_s=max(0.0, first - min(seconds)),
        )  # fmt: skip
        if num_bytes is None:
            return row
        bound = batch * self.read_ceiling / num_bytes
        fraction = None if rate is None else rate / bound
        return dataclasses.replace(
            row, bytes_per_step=num_bytes, bound_tok_s=bound, fraction_of_bound=fraction,
            gb_s=None if fraction is None else fraction * self.read_ceiling / 1e9,
        )  # fmt: skip


class Dispatch:
    """So many tokens decoded in one go, at each call from the same lengths on.

    Attributes:
      choice: how the devices attend.
      capacity: slots per sequence of the cache.
    """

    def __init__(
        self, model: Llama, lengths: Sequence[int], name: str, choice: AttentionChoice,
        capacity: int, tokens: int,
    ):  # fmt: skip
        self.choice, self.capacity = choice, capacity
        self._model, self._split = model, SplitModel(model)
        self._lengths = np.array(lengths, np.int32)
        sampling = SamplingArrays.create(SamplingParams(), 0, [0] * len(lengths))
        self._sampling = sampling, np.full(16, -1, np.int32)
        implementation, num_splits = _arguments(name)
        self._options: dict[str, Any] = {
            "num_steps": tokens, "num_logprobs": 0,
            "implementation": implementation, "num_splits": num_splits,
        }  # fmt: skip
        self._start = functools.partial(_fresh_state, model, lengths, capacity)
        self._state: Any = None

    def __call__(self) -> float:
        """Runs, and returns the seconds that it took; the first call compiles."""
        if self._state is None:
            self._state = jax.block_until_ready(self._start())
        start = time.perf_counter()
        state, _ = decode(*self._operands(self._state), **self._options)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start
        cache = state.cache.truncate(self._model.sharding.place(self._lengths, "B"))
        self._state = jax.block_until_ready(dataclasses.replace(state, cache=cache))
        return seconds

    def hlo(self) -> str:
        """The program that runs, as XLA compiled it; after a call."""
        lowered = decode.lower(*self._operands(self._state), **self._options)
        return lowered.compile().as_text() or ""

    def lower(self) -> jax.stages.Lowered:
        """The program that runs, to be compiled before there is a cache: on one device its shapes
        are enough, on several one is made for its places, and goes again."""
        on_one = self._model.sharding.mesh is None
        state = jax.eval_shape(self._start) if on_one else self._start()
        return decode.lower(*self._operands(state), **self._options)

    def _operands(self, state: Any) -> tuple[Any, ...]:
        return self._split.static, self._split.leaves, state, *self._sampling


def _fresh_state(model: Llama, lengths: Sequence[int], capacity: int) -> DecodeState:
    remaining = np.full(len(lengths), _WITHOUT_END, np.int32)
    return start_state(model, filled_cache(model, lengths, capacity), remaining)


def choose_attention(
    config: LlamaConfig, dtype: Any, name: str, sharding: Sharding = _ONE_DEVICE,
    batch: int | None = None, capacity: int = 1024, query_tokens: int = 1,
) -> AttentionChoice:  # fmt: skip
    """Which implementation each device runs under this name, and why.

    The choice's `implementation` names the row. A batch of None is a sequence on each device, and
    a capacity grows to what a cache over so many devices has.

    Raises:
      RequestError: there is no such name.
      DeviceError: it does not run here; the message says why.
    """
    if name not in NAMES:
        raise RequestError(f"attention must be one of {', '.join(NAMES)}, found {name!r}")
    B, H = batch or sharding.data, config.head_dim
    slots = round_up_capacity(capacity, sharding.parts("S"))
    q = sharding.local_shape("BTN_", (B, query_tokens, config.num_q_heads, H))
    kv = sharding.local_shape("BSK_", (B, slots, config.num_kv_heads, H))
    cache = jax.ShapeDtypeStruct(kv, dtype)
    implementation, num_splits = _arguments(name)
    try:
        choice = explain_attention(
            jax.ShapeDtypeStruct(q, dtype), cache, cache, kv[1], window=config.window,
            implementation=implementation, num_splits=num_splits,
        )  # fmt: skip
    except NotImplementedError as error:
        raise DeviceError(f"attention {name}: {error}") from error
    return dataclasses.replace(choice, implementation=NO_SPLIT) if name == NO_SPLIT else choice


def slots_for(
    lengths: Sequence[int], tokens: int, capacity: int | None = None,
    sharding: Sharding = _ONE_DEVICE,
) -> int:  # fmt: skip
    """Slots of a cache for `tokens` more behind these lengths, or of the given capacity.

    Raises:
      RequestError: the tokens do not fit, or a length is out of range.
    """
    check_range("the number of sequences", len(lengths), 1, MAX_BATCH)
    for length in lengths:
        check_range("a depth", length, 0, MAX_DEPTH)
    needed = max(lengths) + tokens
    if capacity is not None and needed > check_range("capacity", capacity, 1, 2 * MAX_DEPTH):
        raise RequestError(
            f"a depth of {max(lengths)} and {tokens} tokens need a capacity of {needed}, "
            f"found {capacity}"
        )
    return round_up_capacity(needed if capacity is None else capacity, sharding.parts("S"))


def weight_bytes(model: Llama) -> int:
    """Bytes of the weights that one device reads in a decode step."""
    return num_weights(model.config, model.sharding, read=True) * model.dtype.itemsize


def cache_bytes(config: LlamaConfig, lengths: Sequence[int], tokens: int, itemsize: int) -> float:
    """Bytes of keys and values that a decode step reads: the mean over `tokens` steps.

    Step i of a sequence that had `length` tokens sees length + i + 1, or as many as the window
    holds.
    """
    window = config.window or _WITHOUT_END
    seen = sum(min(length + i + 1, window) for length in lengths for i in range(tokens))
    return seen / tokens * config.kv_bytes_per_token(itemsize)


def filled_cache(model: Llama, lengths: Sequence[int], capacity: int) -> KVCache:
    """A cache that holds so many tokens of each sequence, of random contents."""
    cache = model.init_cache(len(lengths), capacity)
    place = model.sharding.named("BSKH") if model.sharding.mesh else None
    # One after the other in place, so that no second cache has to fit.
    contents = [
        _randomised(array, np.uint32(_FIRST_CACHE_STREAM + i), place)
        for i, array in enumerate((*cache.keys, *cache.values))
    ]
    layers = len(cache.keys)
    cache = dataclasses.replace(
        cache, keys=tuple(contents[:layers]), values=tuple(contents[layers:])
    )
    return cache.advance(model.sharding.place(np.array(lengths, np.int32), "B"))


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True, static_argnames="place")
def _randomised(array: Array, stream: Array, place: NamedSharding | None) -> Array:
    return random_array(stream, array.shape, array.dtype, place=place)


def mean_and_deviation(count: int, seconds: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation of `count` per second.

    (None, None) if the clock did not move in one of them; no deviation of a single one."""
    if min(seconds) <= 0:
        return None, None
    rates = [count / each for each in seconds]
    return statistics.fmean(rates), statistics.stdev(rates) if len(rates) > 1 else None


def _arguments(name: str) -> tuple[str | None, int | None]:
    """(implementation, num_splits) of attention."""
    if name == NO_SPLIT:
        return "flash_decode", 1
    return None if name == "auto" else name, None


def _test_name(tokens: int, lengths: Sequence[int]) -> str:
    low, high = min(lengths), max(lengths)
    depth = f" @ d{low}" if low == high else f" @ d{low}..{high}"
    return f"tg{tokens}{depth if high else ''}"


def check_range(what: str, value: Any, low: int, high: int) -> int:
    """The value; RequestError unless it is an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{what} must be an integer from {low} to {high}, found {value!r}")
    return value
