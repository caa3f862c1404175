"""The sizes of the split kernels: how queries, keys and shared memory are divided.

B batch, T query tokens, S capacity, N query heads, K KV heads, G = N // K, H head_dim.
"""

from __future__ import annotations

import dataclasses

Shape = tuple[int, ...]

# Streaming multiprocessors of an H100 or H200, and the shared memory of one block there.
NUM_SMS = 132
SHARED_BYTES = 227 * 1024
# Of it, for the ring of K and V tiles: with less in flight the memory's latency shows.
_RING_BYTES = 128 * 1024
# The accumulator and the product that is added to it stay in registers.
_RESULT_ELEMENTS = 64 * 128
_ITEM_BYTES = 2


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    """Static sizes of the split kernel.

    Attributes:
      num_splits: C, chunks per sequence and KV head; None where a plan says how many.
      head_dim: H.
      block_kv: keys per tile, a multiple of 64.
      stages: K/V tiles in flight.
      block_t, block_g: query tokens and heads of a row block; block_t * block_g <= 64.
      row_blocks_t, row_blocks_g: how many row blocks cover T tokens and G heads.
      scale: of the logits. softcap: None for none.
    """

    num_splits: int | None
    head_dim: int
    block_kv: int
    stages: int
    block_t: int
    block_g: int
    row_blocks_t: int
    row_blocks_g: int
    scale: float
    softcap: float | None = None

    @property
    def rows(self) -> int:
        """Rows of a row block, padded to what the tensor cores take."""
        return _round_up(self.block_t * self.block_g, 8)

    @property
    def row_blocks(self) -> int:
        return self.row_blocks_t * self.row_blocks_g

    @property
    def width(self) -> int:
        """Columns of a K or V tile in shared memory: the tensor cores take V's 64 at a time."""
        return _width(self.head_dim)

    @property
    def shared_bytes(self) -> int:
        """An upper bound of the shared memory of one block of the split kernel."""
        arrays = (
            2 * self.stages * self.block_kv * self.width * _ITEM_BYTES,  # K and V
            2 * 64 * self.width * _ITEM_BYTES,  # q as loaded, q as multiplied
            self.rows * self.block_kv * _ITEM_BYTES,  # softmax weights
            self.rows * self.width * 4,  # result
            self.rows * 4,  # its log-sum-exp
            128 * 4 * 4,  # Mosaic's own, for sums across warps
            8 * (3 * self.stages + 1),  # barriers
        )
        return sum(_round_up(size, 1024) for size in arrays)


def split_config(
    q_shape: Shape, k_shape: Shape, num_splits: int | None, scale: float, softcap: float | None
) -> SplitConfig:
    """The sizes of the kernels for these shapes: the tuning table."""
    block_t, block_g, row_blocks_t, row_blocks_g = _row_blocks(q_shape, k_shape)
    S, H = k_shape[1], k_shape[3]
    # Few narrow rows leave registers and shared memory for tall tiles.
    tall = S >= 128 and block_t * block_g <= 16 and _width(H) <= 128
    block_kv = 128 if tall else 64
    return SplitConfig(
        num_splits=num_splits,
        head_dim=H,
        block_kv=block_kv,
        stages=min(6, _RING_BYTES // (2 * block_kv * _width(H) * _ITEM_BYTES)),
        block_t=block_t,
        block_g=block_g,
        row_blocks_t=row_blocks_t,
        row_blocks_g=row_blocks_g,
        scale=scale,
        softcap=softcap,
    )


def choose_num_splits(q_shape: Shape, k_shape: Shape, num_sms: int = NUM_SMS) -> int:
    """Chunks per sequence that keep the multiprocessors busy: the fewest within 10 % of the best.

    At most one for each 64 keys of the capacity."""
    blocks = num_row_blocks(q_shape, k_shape)
    most = max(1, min(num_sms, k_shape[1] // 64))

    def busy(splits: int) -> float:
        waves = blocks * splits / num_sms
        return waves / -(-blocks * splits // num_sms)

    best = max(busy(splits) for splits in range(1, most + 1))
    return next(splits for splits in range(1, most + 1) if busy(splits) >= 0.9 * best)


def num_row_blocks(q_shape: Shape, k_shape: Shape) -> int:
    """Row blocks of all KV heads of all sequences."""
    _, _, row_blocks_t, row_blocks_g = _row_blocks(q_shape, k_shape)
    return k_shape[0] * k_shape[2] * row_blocks_t * row_blocks_g


def _row_blocks(q_shape: Shape, k_shape: Shape) -> tuple[int, int, int, int]:
    """block_t, block_g and how many of each: as many tokens as fit beside the heads of a group."""
    _, T, N, H = q_shape
    G = N // k_shape[2]
    limit = _most_rows(_width(H))
    block_g = min(G, limit)
    block_t = min(T, limit // block_g)
    return block_t, block_g, -(-T // block_t), -(-G // block_g)


def _most_rows(width: int) -> int:
    """Rows of a block that registers and shared memory leave room for: 64 up to 128 columns."""
    staged_q = 2 * 64 * width * _ITEM_BYTES
    left = SHARED_BYTES - _RING_BYTES - staged_q - 4 * 1024
    shared = left // (4 * width + 64 * _ITEM_BYTES)
    return min(64, _RESULT_ELEMENTS // width // 8 * 8, shared // 8 * 8)


def _width(head_dim: int) -> int:
    return _round_up(head_dim, 64)


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
