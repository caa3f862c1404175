"""How the products of a decoder layer are cut and shared among the thread blocks of one kernel.

D model width, F feed-forward width, N query heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from jaxdecode.pallas_kernels.split_config import SplitConfig

# Rows and columns of a tile. A row is 256 bytes that follow each other in memory; with 128 the
# kernel read 3 % more slowly.
ROWS, COLUMNS = 64, 128
# Elements of 16 bits that the threads of a warpgroup take from slots together: each a slot.
VECTOR = 512
# Tiles of a step: one after the other of the same columns, or one of the gate and one of up.
TILES = 2
# Shared memory of a thread block, less what Mosaic takes for itself.
_SHARED_BYTES = 227 * 1024 - 4096
_ITEMSIZE = 2
# Tiles in the ring. Fewer do not outlast the wait for the other thread blocks; there must be at
# least as many as layer_tiles.py has in flight.
FEWEST_STAGES = 8


@dataclasses.dataclass(frozen=True)
class Product:
    """A vector times a matrix, column block by column block.

    As long as there is one for each thread block, column blocks are given out whole. The steps of
    those that are left are cut into equal ranges, column block by column block.

    Attributes:
      depth: rows of the matrix.
      columns: column blocks; of the gate, each with that of up.
      gated: whether it is gate and up.
      num_blocks: thread blocks.
    """

    depth: int
    columns: int
    gated: bool
    num_blocks: int

    @property
    def rows(self) -> int:
        """Of the matrix, in a step."""
        return ROWS if self.gated else TILES * ROWS

    @property
    def steps(self) -> int:
        """Of a column block."""
        return self.depth // self.rows

    @property
    def whole(self) -> int:
        """Column blocks that each thread block has to itself."""
        return self.columns // self.num_blocks

    @property
    def shared(self) -> int:
        """Column blocks that several thread blocks may share."""
        return self.columns - self.whole * self.num_blocks

    @property
    def sharers(self) -> int:
        """Thread blocks, the first ones, that have any of the shared steps; above 0."""
        return max(min(self.num_blocks, self.shared * self.steps), 1)

    @property
    def parts(self) -> int:
        """Thread blocks that share a column block, at most."""
        total = self.shared * self.steps
        ends = [i * total // self.sharers for i in range(self.sharers + 1)]
        found = [0] * self.shared
        for first, last in itertools.pairwise(ends):
            for column in range(first // self.steps, -(-last // self.steps)):
                found[column] += first < last
        return max(found, default=1)


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """Static sizes of a layer from the output projection on to the next layer's queries, keys and
    values.

    Attributes:
      products: output projection, gate and up, down, and what the next layer projects.
      next_blocks: column blocks of each weight of the last product.
      eps: of the norms.
      num_blocks: thread blocks, no more than run at the same time.
      attention: how the kernel attends first; None if it begins with what others attended to.
    """

    products: tuple[Product, Product, Product, Product]
    next_blocks: tuple[int, ...]
    eps: float
    num_blocks: int
    attention: SplitConfig | None = None

    @property
    def widest(self) -> int:
        """Elements of the longest vector that is multiplied."""
        return max(product.depth for product in self.products)

    @property
    def width(self) -> int:
        """D."""
        return self.products[1].depth

    @property
    def stages(self) -> int:
        """Tiles that the ring has room for."""
        spare = _SHARED_BYTES - _ITEMSIZE * (self.widest + self.width)
        return spare // (_ITEMSIZE * ROWS * COLUMNS)

    @property
    def slots(self) -> tuple[int, ...]:
        """int32 elements of the slots for what is attended to, chunk by chunk and as a vector; for
        what the products make but the last; and for the parts of each product's shared column
        blocks."""
        chunks = math.prod(self.chunks_shape)
        attended = self.products[0].depth if chunks else 0
        vectors = attended, self.width, self.products[2].depth, self.width
        parts = (math.prod(parts_shape(product)) for product in self.products)
        return (
            _words(chunks, 4), *(_words(n, _ITEMSIZE) for n in vectors),
            *(_words(n, 4) for n in parts),
        )  # fmt: skip

    @property
    def chunks_shape(self) -> tuple[int, int, int, int]:
        """[query heads, chunks, 2, columns] of the heads' results, and of their log-sum-exps."""
        if self.attention is None:
            return 0, 0, 0, 0
        return self.products[0].depth // COLUMNS, self.attention.num_splits or 0, 2, COLUMNS


def _words(values: int, itemsize: int) -> int:
    """int32 elements of the slots for so many values; see slots.py."""
    return 2 * values * itemsize // 4


def parts_shape(product: Product) -> tuple[int, int, int]:
    """[parts but the first, tiles, columns] of a product's shared column blocks."""
    tiles = TILES if product.gated else 1
    return max(product.parts - 1, 0), tiles, product.shared * COLUMNS


def layer_config(
    D: int, F: int, NH: int, next_columns: tuple[int, ...], eps: float, num_blocks: int,
    num_kv_heads: int | None = None,
) -> LayerConfig:  # fmt: skip
    """Sizes for a layer; next_columns are those of each of the next layer's projections, and
    num_kv_heads those, of COLUMNS columns, that the kernel attends to, if it does."""
    blocks_of_next = tuple(n // COLUMNS for n in next_columns)
    products = (
        Product(NH, D // COLUMNS, False, num_blocks),
        Product(D, F // COLUMNS, True, num_blocks),
        Product(F, D // COLUMNS, False, num_blocks),
        Product(D, sum(blocks_of_next), False, num_blocks),
    )
    attention = None
    if num_kv_heads is not None:
        attention = _attention_config(NH // COLUMNS // num_kv_heads, num_kv_heads, num_blocks)
    return LayerConfig(products, blocks_of_next, eps, num_blocks, attention)


def _attention_config(group: int, num_kv_heads: int, num_blocks: int) -> SplitConfig:
    """Each KV head is for equally many thread blocks; tiles are those of the weights."""
    return SplitConfig(
        num_splits=num_blocks // num_kv_heads,
        head_dim=COLUMNS,
        block_kv=ROWS,
        stages=1,
        consumers=1,
        transposed=True,
        block_t=1,
        block_g=group,
        row_blocks_t=1,
        row_blocks_g=1,
        scale=COLUMNS**-0.5,
    )
