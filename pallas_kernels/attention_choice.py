"""Which implementation serves a call of `decode_attention`, why, and how it goes about it."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxdecode.pallas_kernels import flash_decode
from jaxdecode.pallas_kernels.crossover import MOST_DECODE_TOKENS, wide_is_faster
from jaxdecode.pallas_kernels.split_config import choose_num_splits

IMPLEMENTATIONS = ("flash_decode", "xla", "cudnn")


@dataclasses.dataclass(frozen=True)
class AttentionChoice:
    """Which implementation serves a call, and why.

    Attributes:
      implementation: one of IMPLEMENTATIONS.
      reason: for people.
      asked_for: named by the caller, so no other may take its place.
      how: for people, how flash_decode divides a call of these shapes; "" of the others.
    """

    implementation: str
    reason: str
    asked_for: bool = False
    how: str = ""

    def __str__(self) -> str:
        return f"{self.implementation}: {'; '.join(filter(None, (self.reason, self.how)))}"


def choose(
    q: Any, k: Any, *, num_splits: int | None, implementation: str | None, not_cudnn: str | None
) -> AttentionChoice:
    """Chooses the implementation for a checked call; `not_cudnn` is why it cannot be cuDNN."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation must be None or one of {IMPLEMENTATIONS}, found {implementation!r}"
        )
    if implementation in ("xla", "cudnn"):
        if num_splits is not None:
            raise ValueError(
                f"num_splits={num_splits} goes with flash_decode, which splits the keys; "
                f"leave it out for {implementation!r}"
            )
        if implementation == "cudnn" and not_cudnn is not None:
            raise NotImplementedError(
                f"cudnn cannot serve this call: {not_cudnn}; leave out implementation"
            )
        return AttentionChoice(implementation, "asked for", asked_for=True)
    obstacle = flash_decode.why_not_here() or flash_decode.why_not(q, k)
    asked_for = implementation is not None
    asked = asked_for or num_splits is not None
    if obstacle is None:
        reason = "asked for" if asked else "the kernels for this GPU"
        return AttentionChoice("flash_decode", reason, asked_for, how_divided(q, k, num_splits))
    if asked:
        raise NotImplementedError(
            f"flash_decode cannot serve this call: {obstacle}; leave out implementation and "
            "num_splits to run the portable implementation"
        )
    return AttentionChoice("xla", f"the portable implementation; {obstacle}")


def is_wide(q: Any, k: Any, num_splits: int | None) -> bool:
    """Whether flash_decode serves the call by its wide-query kernel."""
    return num_splits is None and wide_is_faster(q.shape, k.shape)


def how_divided(q: Any, k: Any, num_splits: int | None) -> str:
    """Which of its kernels flash_decode runs for a call, and how they divide the work."""
    if is_wide(q, k, num_splits):
        return (
            f"{q.shape[1]} query tokens are more than {MOST_DECODE_TOKENS}, and by the measured "
            "crossover the wide-query kernel is the faster for them"
        )
    merged = ""
    if num_splits is None and flash_decode.merges_in_one(q.shape, k.shape):
        merged = ", and merge in the same launch"
    if num_splits is None and q.shape[0] > 1:
        return (
            "the split-KV kernels follow a plan that divides the batch into equal work for the "
            f"multiprocessors{merged}"
        )
    chunks = choose_num_splits(q.shape, k.shape) if num_splits is None else num_splits
    if chunks == 1:
        return "the split-KV kernels leave each sequence whole"
    return f"the split-KV kernels cut each sequence into {chunks} chunks{merged}"
