"""Which kernels serve a problem of which size: the crossover points, in one table.

cuDNN is in no row of it, though for some batches of equal lengths it is the faster: in
benchmarks/results/h200/attention.json, told no lengths of full caches, its kernels take 6.8 % less
time than the split kernels for 64 sequences of 1024 tokens (16/2 heads), 5.6 % for 128 x 512, 1.8 %
for 64 x 8192 and 0.4 % for 16 x 8192 (32/32); for other full caches 0.7 to 91 % more. But a call
comes with lengths that only the device knows, and what sees nothing must get zeros. With lengths,
and its empty rows zeroed, cuDNN took 24.5 us where the split kernels took 21.6 (256 x 256), 22.7
and 21.3 (128 x 512), 21.4 and 20.8 (64 x 1024), 123.4 and 123.2 (64 x 8192), 473.7 and 475.4 (16 x
8192, 32/32). That may win 2 % where lengths are equal (of a decoder's steps, in decode_batch.json,
0.6 to 1.7 % for 8 to 64 x 8192) and loses much where they are not: the same file of attention has
32 of 512 to 65536 tokens at 1.9 times the split kernels' time. The plan, which the layers of a step
share, is not counted: 17 to 36 us for 16 to 1024 sequences.

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
