"""What FasterTransformer's decoding attention would cost: a model, not a measurement.

Its kernel (masked multi-head attention, October 2023) runs one thread block per query head and
sequence, cuts no sequence into parts, and keeps the logits of the whole context in shared memory, 4
bytes per key and 2 more for the weights in half precision. The model is kind to it: the rest of the
step reads its weights at the ceiling, query heads of a group find in the cache what another of them
has read, and nothing but reading takes time. What it cannot escape is that a block, and so a head,
reads the keys and values of its whole sequence through one multiprocessor.
"""

from __future__ import annotations

import math

from jaxdecode.models.config import LlamaConfig

NAME = "fastertransformer_model"
MULTIPROCESSORS = 132  # of an H100 or H200
SHARED_MEMORY = 227 * 1024  # bytes that a block of theirs may have
BYTES_PER_LOGIT = 6
# A multiprocessor gets more than an equal share of the ceiling while others are idle, but not all.
MOST_SHARES = 1.5


def longest_context() -> int:
    """Tokens beyond which the logits do not fit into shared memory."""
    return SHARED_MEMORY // BYTES_PER_LOGIT


def step_seconds(
    config: LlamaConfig, weight_bytes: int, depth: int, batch: int, itemsize: int, ceiling: float
) -> float | None:
    """Seconds of one decode step, None where the kernel cannot run.

    Args:
      weight_bytes: read in a step.
      depth: tokens that each sequence sees.
      itemsize: bytes per number in the cache.
      ceiling: bytes per second that the device reads.
    """
    if depth > longest_context():
        return None
    waves = math.ceil(batch * config.num_q_heads / MULTIPROCESSORS)
    block_bytes = 2 * depth * config.head_dim * itemsize
    through_one = waves * block_bytes / (MOST_SHARES * ceiling / MULTIPROCESSORS)
    all_bytes = batch * config.num_kv_heads * block_bytes
    return weight_bytes / ceiling + config.num_layers * max(through_one, all_bytes / ceiling)
