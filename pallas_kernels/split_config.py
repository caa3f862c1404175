"""The sizes of the split kernels: how queries, keys and shared memory are divided.

B batch, T query tokens, S capacity, N query heads, K KV heads, G = N // K, H head_dim.
"""

from __future__ import annotations

import dataclasses
import math

Shape = tuple[int, ...]

# Streaming multiprocessors of an H100 or H200, and the shared memory of one block there.
NUM_SMS = 132
SHARED_BYTES = 227 * 1024
# Of it, for the ring of K and V tiles: with less in flight the memory's latency shows.
_RING_BYTES = 128 * 1024
# Rows of the left operand that one instruction of the tensor cores takes.
TILE = 64
# Up to so many query rows the keys fill them instead.
_MOST_TRANSPOSED_ROWS = 16
# Warpgroups that take turns where query rows fill them and the ring has two slots for each.
_CONSUMERS = 2
_ITEM_BYTES = 2


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    """Static sizes of the split kernel.

    Attributes:
      num_splits: C, chunks per sequence and KV head; None where a plan says how many.
      head_dim: H.
      block_kv: keys per tile, a multiple of 64.
      stages: K/V tiles in flight, a multiple of consumers.
      consumers: warpgroups that compute; one more loads. Two only where not transposed.
      transposed: whether the keys, not the query rows, are the rows of the products.
      block_t, block_g: query tokens and heads of a row block; block_t * block_g <= TILE.
      row_blocks_t, row_blocks_g: how many row blocks cover T tokens and G heads.
      scale: of the logits. softcap: None for none.
    """

    num_splits: int | None
    head_dim: int
    block_kv: int
    stages: int
    consumers: int
    transposed: bool
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
    def product_rows(self) -> int:
        """Query rows of the products: with those that only fill the instruction."""
        return self.rows if self.transposed else TILE

    @property
    def columns(self) -> int:
        """Columns of the result that are stored together: all where shared memory has room."""
        return self.width if self.transposed or self.width <= 128 else 64

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
            2 * TILE * self.width * _ITEM_BYTES,  # q as loaded, q as multiplied
            self.rows * self.block_kv * _ITEM_BYTES if self.transposed else 0,  # softmax weights
            self.product_rows * self.columns * 4,  # result
            3 * self.product_rows * 4,  # its log-sum-exp, and what is handed over beside it
            128 * 4 * 4,  # Mosaic's own, for sums across warps
            8 * (3 * self.stages + 2),  # barriers
        )
        return sum(_round_up(size, 1024) for size in arrays)


def split_config(
    q_shape: Shape, k_shape: Shape, num_splits: int | None, scale: float, softcap: float | None
) -> SplitConfig:
    """The sizes of the kernels for these shapes: the tuning table."""
    block_t, block_g, row_blocks_t, row_blocks_g = _row_blocks(q_shape, k_shape)
    H = k_shape[3]
    transposed = _has_few_rows(q_shape, k_shape)
    narrow = _width(H) <= 128
    block_kv = _block_kv(q_shape, k_shape)
    consumers = 1 if transposed or not narrow else _CONSUMERS
    stages = _RING_BYTES // (2 * block_kv * _width(H) * _ITEM_BYTES)
    return SplitConfig(
        num_splits=num_splits,
        head_dim=H,
        block_kv=block_kv,
        stages=stages // consumers * consumers,
        consumers=consumers,
        transposed=transposed,
        block_t=block_t,
        block_g=block_g,
        row_blocks_t=row_blocks_t,
        row_blocks_g=row_blocks_g,
        scale=scale,
        softcap=softcap,
    )


def blocks_to_merge_in_one(q_shape: Shape, k_shape: Shape, num_sms: int = NUM_SMS) -> int | None:
    """Thread blocks that would have to run at the same time for the launch that attends to the
    chunks to merge them too; None where that is not the faster way, or none.

    A part of many query rows is long to tell. Items of a batch, divided by plan, should seldom be
    in many parts: on an H200 it was faster for 64 sequences of 16/2 heads, slower for 32."""
    # Threads count the elements of the result in 32 bits.
    if not _has_few_rows(q_shape, k_shape) or math.prod(q_shape) >= 2**31:
        return None
    items = num_row_blocks(q_shape, k_shape)
    if q_shape[0] > 1:
        return num_sms if 4 * items >= 3 * num_sms else None
    num_splits = choose_num_splits(q_shape, k_shape, num_sms)
    return num_splits * items if num_splits > 1 else None


def choose_num_splits(q_shape: Shape, k_shape: Shape, num_sms: int = NUM_SMS) -> int:
    """Chunks per sequence that keep the multiprocessors busy: of those within 10 % of the best the
    fewest that are a power of two, which divides a cache and its merge more evenly, or else the
    fewest. At most one for each tile of the capacity."""
    blocks = num_row_blocks(q_shape, k_shape)
    most = max(1, min(num_sms, k_shape[1] // _block_kv(q_shape, k_shape)))

    def busy(splits: int) -> float:
        waves = blocks * splits / num_sms
        return waves / -(-blocks * splits // num_sms)

    best = max(busy(splits) for splits in range(1, most + 1))
    good = [splits for splits in range(1, most + 1) if busy(splits) >= 0.9 * best]
    return next((splits for splits in good if splits & (splits - 1) == 0), good[0])


def num_row_blocks(q_shape: Shape, k_shape: Shape) -> int:
    """Row blocks of all KV heads of all sequences."""
    _, _, row_blocks_t, row_blocks_g = _row_blocks(q_shape, k_shape)
    return k_shape[0] * k_shape[2] * row_blocks_t * row_blocks_g


def _row_blocks(q_shape: Shape, k_shape: Shape) -> tuple[int, int, int, int]:
    """block_t, block_g and how many of each: as many tokens as fit beside the heads of a group."""
    _, T, N, _ = q_shape
    G = N // k_shape[2]
    block_g = min(G, TILE)
    block_t = min(T, TILE // block_g)
    return block_t, block_g, -(-T // block_t), -(-G // block_g)


def _has_few_rows(q_shape: Shape, k_shape: Shape) -> bool:
    """Whether the keys, not the query rows, fill the products. All rows are in one block then."""
    block_t, block_g, _, _ = _row_blocks(q_shape, k_shape)
    return block_t * block_g <= _MOST_TRANSPOSED_ROWS


def _block_kv(q_shape: Shape, k_shape: Shape) -> int:
    """Keys per tile. Few narrow rows leave registers and shared memory for tall ones."""
    is_small = _has_few_rows(q_shape, k_shape) and _width(k_shape[3]) <= 128
    return 128 if is_small and k_shape[1] >= 128 else 64


def _width(head_dim: int) -> int:
    return _round_up(head_dim, 64)


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
