"""Which tiles of the weights a thread block has in layer_kernel.py, and their way into its shared
memory."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecode.pallas_kernels.layer_config import COLUMNS, ROWS, TILES, LayerConfig, Product
from jaxdecode.pallas_kernels.mosaic import swizzled

# Tiles that a thread block has asked for and not got, at most. That many keep memory busy. More
# would only queue up, and whatever is asked for meanwhile would have to wait behind them: so fewer
# while the ring fills and what is awaited is a vector.
MOST_IN_FLIGHT = 5
_MOST_WHILE_WAITING = 3


class Scratch(NamedTuple):
    """Shared memory of a thread block, and the barriers that say when it is full or free again.

    x: what is multiplied. residual: the stream that results are added to. sums: of a column block,
    on their way from the threads that have them to all. heads: what attention needs, if there is
    one, in the memory of x."""

    ring: Any
    x: Any
    residual: Any
    sums: Any
    full: Any
    released: Any
    q_full: Any = None
    heads: Any = None


class Heads(NamedTuple):
    """Query heads of a KV head, and the softmax weights of a tile."""

    q: Any
    p: Any


class Loaded(NamedTuple):
    """The ring's steps that have been asked for, and the tiles that are known to be there."""

    steps: Any
    landed: Any


class Job(NamedTuple):
    """A product, its weights, and the slots of the parts of its shared column blocks: None if there
    are none."""

    product: Product
    weights: tuple[Any, ...]
    parts: Any


class Share(NamedTuple):
    """What a thread block has of a product: its whole column blocks, and of the steps of those that
    are shared first <= i < last."""

    product: Product
    block: Any
    first: Any
    last: Any

    @property
    def count(self) -> Any:
        """Steps in all."""
        return self.product.whole * self.product.steps + self.last - self.first

    def place(self, i: Any) -> tuple[Any, Any]:
        """(column block, step in it) of its i-th step."""
        product, steps = self.product, jnp.int32(self.product.steps)
        in_shared = i - product.whole * product.steps
        j = jnp.where(in_shared < 0, i, self.first + in_shared)
        column, step = lax.div(j, steps), lax.rem(j, steps)
        alone = column * product.num_blocks + self.block
        shared = product.whole * product.num_blocks + column
        return jnp.where(in_shared < 0, alone, shared), step

    def owners(self, column: Any) -> tuple[Any, Any]:
        """The first and the last thread block of a shared column block, counted from 0."""
        steps = self.product.steps
        return _owner(column * steps, self.product), _owner((column + 1) * steps - 1, self.product)


def allocate(dtype: Any, config: LayerConfig) -> Scratch:
    """The types of a thread block's scratch memory."""
    barriers = plgpu.Barrier(num_barriers=config.stages)
    tiled = swizzled(COLUMNS, dtype.itemsize)
    x = plgpu.SMEM((config.widest,), dtype)
    if config.attention is not None:
        rows = config.attention.rows
        heads = Heads(
            q=plgpu.SMEM((rows, COLUMNS), dtype, transforms=tiled),
            p=plgpu.SMEM((rows, ROWS), dtype, transforms=tiled),
        )
        x = plgpu.RefUnion(x, heads)
    return Scratch(
        ring=plgpu.SMEM((config.stages, ROWS, COLUMNS), dtype, transforms=tiled),
        x=x,
        residual=plgpu.SMEM((config.width,), dtype),
        sums=plgpu.SMEM((TILES * COLUMNS,), jnp.float32),
        full=barriers,
        released=barriers,
        q_full=None if config.attention is None else plgpu.Barrier(),
    )


def divide(scratch: Scratch, config: LayerConfig) -> Scratch:
    """The scratch memory, where attention has its own."""
    if config.attention is None:
        return scratch
    x, heads = scratch.x
    return scratch._replace(x=x, heads=heads)


def share_of(product: Product, block: Any) -> Share:
    """A thread block's."""
    total, sharers = jnp.int32(product.shared * product.steps), jnp.int32(product.sharers)
    ends = [jnp.minimum(lax.div((block + i) * total, sharers), total) for i in (0, 1)]
    return Share(product, block, *ends)


def _owner(step, product):
    """The thread block that has one of the shared steps."""
    total = max(product.shared * product.steps, 1)
    return lax.div((step + 1) * product.sharers - 1, jnp.int32(total))


def stream_share(
    job: Job, block: Any, so_far: Loaded, scratch: Scratch, config: LayerConfig
) -> Loaded:
    """Loads a thread block's tiles, each once its stage of the ring is free again."""
    share = share_of(job.product, block)

    def load(i, landed):
        column, step = share.place(i)
        fills_ring = i * TILES < config.stages
        most = jnp.where(fills_ring, _MOST_WHILE_WAITING, MOST_IN_FLIGHT)
        for tile, place in enumerate(_places(column, step, job.product)):
            load = functools.partial(_load_weights, place, job, config)
            number = (so_far.steps + i) * TILES + tile
            landed = load_tile(number, landed, most, load, scratch, config)
        return landed

    landed = lax.fori_loop(0, share.count, load, so_far.landed)
    return Loaded(so_far.steps + share.count, landed)


def _places(column, step, product):
    """Row and column block of each tile of a step."""
    row = step * product.rows
    if product.gated:
        return [(row, column + tile * product.columns) for tile in range(TILES)]
    return [(row + tile * ROWS, column) for tile in range(TILES)]


def load_tile(
    number: Any, landed: Any, most: Any, load: Callable, scratch: Scratch, config: LayerConfig
) -> Any:
    """Calls load(tile, barrier) for the ring's tile of this number, once its stage is free.

    landed: tiles that are known to be there. Returns those after this, all but `most`."""
    stages = jnp.int32(config.stages)
    stage, enough = lax.rem(number, stages), jnp.maximum(number - (most - 1), landed)

    def wait(earlier, _):
        plgpu.barrier_wait(scratch.full.at[lax.rem(earlier, stages)])
        return ()

    lax.fori_loop(landed, enough, wait, ())

    @pl.when(number >= config.stages)
    def _():
        plgpu.barrier_wait(scratch.released.at[stage])

    load(scratch.ring.at[stage], scratch.full.at[stage])
    return enough


def _load_weights(place, job, config, tile, full):
    row, column = place

    def load(weight, first):
        columns = pl.ds((column - first) * COLUMNS, COLUMNS)
        plgpu.copy_gmem_to_smem(weight.at[pl.ds(row, ROWS), columns], tile, full)

    if len(job.weights) == 1:
        load(*job.weights, 0)
        return
    ends = itertools.pairwise(itertools.accumulate(config.next_blocks, initial=0))
    for weight, (first, end) in zip(job.weights, ends, strict=True):
        pl.when((column >= first) & (column < end))(functools.partial(load, weight, first))
