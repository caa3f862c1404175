"""The cases of the attention benchmark, who is measured on them, and how the inputs rotate.

B batch, S capacity of the cache, N query heads, K KV heads, H head_dim; one query token (T = 1).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

# "jaxdecode" is what decode_attention chooses, measured where that is not flash_decode.
OURS = ("jaxdecode", "flash_decode", "flash_decode_nosplit", "jaxdecode_xla")
JAX_PEERS = ("xla", "cudnn")
TORCH_PEERS = ("sdpa_flash", "sdpa_cudnn", "fa3", "fa3_nosplit", "flashinfer")
PEERS = JAX_PEERS + TORCH_PEERS
IMPLEMENTATIONS = OURS + PEERS

T = 1
H = 128
DTYPE = "bfloat16"
ITEM_BYTES = 2

PAGE = 16  # tokens, for the peers whose caches are paged
# What a rotation reads before it comes back to a buffer: several times the L2 of an H200 (60 MB).
COLD_BYTES = 300_000_000
LEAST_CALLS = 24
MOST_BUFFERS = 64  # arguments of one jitted function

MOST_ERROR = 1e-2  # ||out - ref|| / ||ref|| of any sequence; honest bfloat16 stays below 4e-3


@dataclasses.dataclass(frozen=True)
class Rotation:
    """`chains` runs of `calls` calls in a row; a chain goes round its own `buffers` caches."""

    buffers: int
    calls: int
    chains: int


@dataclasses.dataclass(frozen=True)
class Case:
    """One query token for each of B sequences whose caches of capacity S hold kv_len[b] tokens."""

    B: int
    S: int
    N: int
    K: int
    kv_len: tuple[int, ...]

    @property
    def is_full(self) -> bool:
        """Whether every slot of the cache is visible."""
        return min(self.kv_len) == self.S

    @property
    def is_ragged(self) -> bool:
        """Whether the sequences differ in length."""
        return len(set(self.kv_len)) > 1

    @property
    def name(self) -> str:
        """For example "8x65536 16/2 filled 2048"."""
        filled = "" if self.is_full else f" filled {self.kv_len[0]}"
        return f"{self.B}x{self.S} {self.N}/{self.K}{' ragged' if self.is_ragged else filled}"

    @property
    def bytes(self) -> int:
        """Bytes of the visible keys and values: what any implementation has to read."""
        return 2 * sum(self.kv_len) * self.K * H * ITEM_BYTES

    @property
    def rotation(self) -> Rotation:
        """Enough caches that each is cold when its turn comes, whatever part of it is read."""
        distinct = max(2, math.ceil(COLD_BYTES / self.bytes))
        chains = math.ceil(distinct / MOST_BUFFERS)
        buffers = math.ceil(distinct / chains)
        return Rotation(buffers, math.ceil(LEAST_CALLS / buffers) * buffers, chains)

    def page_tables(self) -> tuple[list[int], list[int], list[int]]:
        """The caches as pages in order: where each sequence's list of pages starts, the lists, and
        how many tokens each last page holds."""
        starts, pages, last = [0], [], []
        for b, length in enumerate(self.kv_len):
            count = math.ceil(length / PAGE)
            pages += range(b * (self.S // PAGE), b * (self.S // PAGE) + count)
            starts.append(len(pages))
            last.append(length - PAGE * (count - 1))
        return starts, pages, last

    def row(self) -> dict:
        """The fields of a results row that describe the case."""
        return {
            "B": self.B,
            "T": T,
            "S": self.S,
            "kv_len": list(self.kv_len) if self.is_ragged else self.kv_len[0],
            "N": self.N,
            "K": self.K,
            "H": H,
            "dtype": DTYPE,
            "bytes": self.bytes,
        }


class WrongResult(Exception):
    """An implementation computed something else than attention."""


def check_result(out: Any, ref: Any) -> None:
    """Raises WrongResult when `out` is wrong for any sequence of the batch."""
    out, ref = (np.asarray(x).astype(np.float64).reshape(len(ref), -1) for x in (out, ref))
    error = (np.linalg.norm(out - ref, axis=1) / np.linalg.norm(ref, axis=1)).max()
    if not error <= MOST_ERROR:  # NaN is not
        raise WrongResult(f"relative error {error:.3g}, at most {MOST_ERROR} is honest")


def full(B: int, S: int, N: int = 16, K: int = 2) -> Case:
    """A full cache."""
    return Case(B, S, N, K, (S,) * B)


def filled(B: int, S: int, length: int) -> Case:
    """A cache of capacity S of which `length` slots are filled in each sequence."""
    return Case(B, S, 16, 2, (length,) * B)


def ragged(B: int, S: int, shortest: int = 512) -> Case:
    """Lengths log-uniform between `shortest` and S, always the same ones."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(shortest), np.log(S), B)).astype(int)
    return Case(B, S, 16, 2, tuple(lengths.tolist()))


# One LLaMA layer's attention on one of four GPUs at every length, in batches, and two other models.
MODEL_CASES = (
    *(full(1, S) for S in (512, 2048, 8192, 32768, 65536, 131072, 524288)),
    full(8, 8192),
    full(64, 8192),
    full(16, 8192, 32, 32),
    full(1, 65536, 64, 8),
)
# A cache of which little is filled costs what a small cache costs.
CAPACITY_CASES = (
    filled(1, 65536, 2048),
    full(1, 2048),
    filled(8, 65536, 2048),
    full(8, 2048),
)
# A batch of mixed lengths, and one of the same number of tokens without the mixture.
BATCH_CASES = (ragged(32, 65536), filled(32, 15744, 15662))
LENGTH_CASES = tuple(full(1, 2**i) for i in range(9, 21))
# The table of the Flash-Decoding article: as many tokens in every row but the last.
ARTICLE_CASES = (*(full(65536 // S, S) for S in (2**i for i in range(8, 17))), full(1, 131072))

# The most important first: a run out of time leaves out the last.
CASES = tuple(
    dict.fromkeys(MODEL_CASES + CAPACITY_CASES + BATCH_CASES + LENGTH_CASES + ARTICLE_CASES)
)
