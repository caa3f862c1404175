"""Which kernels serve a problem of which size: the crossover points, in one table.

cuDNN is in no row of it, though told no lengths of full caches it is up to a percent faster for
some batches (benchmarks/results/h200/attention.json). But a call comes with lengths that only the
device knows, and what sees nothing must get zeros: what cuDNN wins where lengths are equal it loses
many times where they are not. For 32 of 512 to 65536 tokens it takes almost twice as long. The
plan, which the layers of a step share, is not counted: 15 to 24 us for 16 to 256 sequences
("once_us" in those results).

All points were measured on an H200 with bfloat16 and head_dim 128. They are rules of the shapes
alone: an H100 has the same multiprocessors, and who finds other points there changes them here.

B batch, T query tokens, S capacity, N query heads, K KV heads.
"""

from __future__ import annotations

from jaxdecode.pallas_kernels.split_config import NUM_SMS, num_row_blocks

Shape = tuple[int, ...]

# Up to so many query tokens a call is decoding, which the split kernels are made for.
MOST_DECODE_TOKENS = 16
# Query rows of a block of the wide-query kernel.
WIDE_ROWS = 128
# Row blocks that the split kernels go through while each multiprocessor does a block of the
# wide-query kernel: against 32k tokens 2.3 us for a row block, 420 us for a round of 132 blocks. It
# tells the faster one for 17 to 256 tokens of 64/8 and of 16/2 heads.
_ROW_BLOCKS_PER_ROUND = 180


def wide_is_faster(q_shape: Shape, k_shape: Shape) -> bool:
    """Whether the wide-query kernel serves this call faster than the split kernels do."""
    B, T, N, _ = q_shape
    if T <= MOST_DECODE_TOKENS:
        return False
    heads = wide_heads(q_shape, k_shape)
    blocks = B * (N // heads) * -(-T * heads // WIDE_ROWS)
    rounds = -(-blocks // NUM_SMS)
    return num_row_blocks(q_shape, k_shape) > _ROW_BLOCKS_PER_ROUND * rounds


def wide_heads(q_shape: Shape, k_shape: Shape) -> int:
    """Query heads of a block of the wide-query kernel: two of a KV head that has evenly many."""
    return 1 if q_shape[2] // k_shape[2] % 2 else 2
