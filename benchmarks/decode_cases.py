"""What benchmarks/decode.py measures: a list of cases per chart, the most important ones first."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

OURS, NO_SPLIT, XLA, CUDNN = "flash_decode", "flash_decode_nosplit", "xla", "cudnn"
ALL = (OURS, XLA, NO_SPLIT, CUDNN)
K = 1024


@dataclasses.dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
      lengths: tokens in the cache of each sequence at the start.
      implementation: of attention.
      capacity: of the cache; None for just enough.
      step_size: None to decode. Else the lengths are those of prompts, so many tokens at a time.
      called: `jaxdecode.generate` is called, beside the same tokens in one dispatch.
    """

    lengths: tuple[int, ...]
    implementation: str
    capacity: int | None = None
    step_size: int | None = None
    called: bool = False

    def __str__(self) -> str:
        low, high = min(self.lengths), max(self.lengths)
        depth = str(low) if low == high else f"{low}..{high}"
        what = "depth" if self.step_size is None else f"{self.step_size} at a time of a prompt of"
        how = ", called" if self.called else ""
        return f"{self.implementation}, batch {len(self.lengths)}, {what} {depth}{how}"


@dataclasses.dataclass(frozen=True)
class Chart:
    """One results file.

    Attributes:
      preset: the model.
      title: what the chart shows.
      x: what is drawn to the right, "depth" or "batch"; None for a table only.
      cases: in the order of their importance.
      cost_model: also give the rows of FasterTransformer's cost model.
    """

    preset: str
    title: str
    x: str | None
    cases: tuple[Case, ...]
    cost_model: bool = False


def _at_depths(
    depths: tuple[int, ...], implementations: tuple[str, ...], *, batch: int = 1,
    capacity: int | None = None, longest: int | None = None,
) -> tuple[Case, ...]:  # fmt: skip
    """A case for each depth and implementation. With `longest`, our kernels' caches all have room
    for so many tokens: they read what is there, and one compiled program serves every depth."""

    def room(depth: int, name: str) -> int | None:
        if longest is None or name not in (OURS, NO_SPLIT):
            return capacity
        # How many chunks there can be follows from the room, and short caches do better with few.
        return K if depth < K else longest + K

    return tuple(
        Case((depth,) * batch, name, room(depth, name))
        for depth in depths
        for name in implementations
    )


def _of_sizes(batches: tuple[int, ...], implementations: tuple[str, ...]) -> tuple[Case, ...]:
    return tuple(Case((8 * K,) * batch, name) for batch in batches for name in implementations)


def ragged_lengths(count: int, low: int, high: int) -> tuple[int, ...]:
    """`count` lengths, evenly spaced on a logarithmic scale, in an order that is no order."""
    lengths = np.geomspace(low, high, count).round().astype(int)
    return tuple(np.random.default_rng(0).permutation(lengths).tolist())


# As long as they fit beside the weights of Llama-3.1-8B: every sequence has slots for the longest.
RAGGED = ragged_lengths(32, 512, 16 * K)
EVEN = math.ceil(sum(RAGGED) / len(RAGGED))
# Between the depths that every implementation is measured at first.
_BETWEEN = (32 * K, 2 * K, 16 * K, 4 * K, K)
_FILLED = 64 * K - 1024  # leaves room for the tokens

CHARTS = {
    "depth": Chart(
        "codellama-34b", "CodeLlama-34B, bfloat16, batch 1", "depth",
        _at_depths((512, 64 * K, 8 * K), ALL, longest=128 * K)
        + _at_depths((128 * K, *_BETWEEN), (OURS, NO_SPLIT), longest=128 * K)
        + _at_depths((128 * K, *_BETWEEN), (XLA, CUDNN)),
        cost_model=True,
    ),
    "capacity": Chart(
        "codellama-34b", "CodeLlama-34B, batch 1, a cache of 64k tokens as it fills", "depth",
        _at_depths((512, _FILLED), (OURS, XLA, CUDNN), capacity=64 * K)
        + _at_depths((8 * K, 2 * K, 32 * K), (OURS, XLA, CUDNN), capacity=64 * K),
    ),
    "mha": Chart(
        "llama-2-7b", "LLaMA-2-7B (32 KV heads), float16, batch 1", "depth",
        _at_depths((512, 64 * K), ALL, longest=64 * K)
        + _at_depths((4 * K,), ALL, batch=16)
        + _at_depths((8 * K, *_BETWEEN), (OURS, NO_SPLIT), longest=64 * K)
        + _at_depths((8 * K, *_BETWEEN), (XLA, CUDNN)),
    ),
    "batch": Chart(
        "llama-3.1-8b", "Llama-3.1-8B, bfloat16, 8k tokens in the cache", "batch",
        _at_depths((2 * K,), ALL)
        + _of_sizes((1, 64, 8), ALL)
        + _of_sizes((32, 2, 16, 4), (OURS, XLA))
        + _of_sizes((32, 2, 16, 4), (CUDNN, NO_SPLIT)),
    ),
    "ragged": Chart(
        "llama-3.1-8b", "Llama-3.1-8B, 32 sequences of 512 to 16k tokens", None,
        tuple(Case(RAGGED, name) for name in ALL) + _at_depths((EVEN,), ALL, batch=32),
    ),
    "call": Chart(
        "codellama-34b", "CodeLlama-34B, bfloat16, a call of generate", None,
        (Case((512,), OURS, called=True),),
    ),
    "call_8b": Chart(
        "llama-3.1-8b", "Llama-3.1-8B, bfloat16, a call of generate", None,
        tuple(Case((2 * K,) * batch, OURS, called=True) for batch in (1, 32)),
    ),
    "prompt": Chart(
        "codellama-34b", "CodeLlama-34B, bfloat16, time to the first token of a prompt", None,
        tuple(
            Case((length,), name, step_size=step)
            for length, name, step in (
                (8 * K, OURS, 2 * K), (8 * K, OURS, 512), (512, OURS, 512), (2 * K, OURS, 2 * K),
                (32 * K, OURS, 2 * K), (8 * K, XLA, 2 * K), (64 * K, OURS, 2 * K),
            )
        ),
    ),
}  # fmt: skip
