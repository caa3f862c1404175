"""One token's way through a decoder layer on Pallas Mosaic GPU, from the output projection to the
next layer's projections, in one launch.

The products are bound by the reading of their weights. Launched one by one, each waits for the
last bytes of the one before it, for its own first ones, and for the small kernels in between. Here
a warpgroup of each thread block streams weights through a ring in shared memory (TMA) and never
waits for a result. The other multiplies; while it waits for the others' share of the next vector,
memory goes on filling the ring.

Thread blocks tell each other what they make by slots (slots.py): no barrier, no fence. A column
block that several share is finished by the first of them, which has it last: it adds up the parts
of the others in their order, so every run gives the same bits. All thread blocks must run at the
same time, for they wait for one another: there are no more of them than multiprocessors, and one
fills the shared memory of each.

The letters are those of layer_config.py.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecode.pallas_kernels.layer_attention import (
    Attend,
    attend_chunk,
    merge_heads,
    stream_cache,
)
from jaxdecode.pallas_kernels.layer_config import (
    COLUMNS,
    ROWS,
    TILES,
    VECTOR,
    LayerConfig,
    parts_shape,
)
from jaxdecode.pallas_kernels.layer_tiles import (
    Job,
    Loaded,
    Scratch,
    allocate,
    divide,
    share_of,
    stream_share,
)
from jaxdecode.pallas_kernels.mosaic import LOG2_E, accumulate, load_vector
from jaxdecode.pallas_kernels.norm_kernel import normalised, rounded_sum
from jaxdecode.pallas_kernels.slots import (
    LINE,
    ROW,
    line_of,
    put_line,
    slot_layout,
    take,
    take_lines,
)

# Parts of a column block that are taken together.
_MOST_PARTS = 8
# Rows that the tensor cores' instruction has; one would do.
_FILLED = 64
# Elements of a vector that a thread block moves at a time: its threads hold them in registers.
_AT_ONCE = 8192
# Elements of a vector that are taken when they are needed. Those that other thread blocks finish
# last are needed first by few.
_PIECE = 2048


class Append(NamedTuple):
    """What the next layer does with its projections before its attention.

    Attributes:
      cos, sin: [H] float32, what each element of a head is multiplied by, and what the one half a
        head away that is added to it.
      slot: int32 [1], of the cache; one that it does not have is not written.
      keys, values: Refs of [1, S, K, H].
    """

    cos: Any
    sin: Any
    slot: Any
    keys: Any
    values: Any


def layer(
    attention: jax.Array | Attend, x: jax.Array, weights: Any, turn: jax.Array, slots: Any,
    append: Append | None, config: LayerConfig,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Runs the kernel.

    Args:
      attention: [N * H], the heads' results, or how they come about: as `config` has it.
      x: [D], the residual stream.
      weights: `fused_layer.LayerWeights`.
      turn: int32 [2], above 0, and another one in each launch that has these slots; and 0 if no
        projections are made, which are then anything.
      slots: Ref of int32 [sum(config.slots)], zero before the first launch.
      append: where the next layer's keys and values go, if its projections are queries, and keys
        and values of heads of COLUMNS columns.

    Returns:
      x [D] for the next layer, and its projections, one after the other; with `append` only its
      queries, rotated.
    """
    dtype = x.dtype
    projected = COLUMNS * (config.next_blocks[0] if append else sum(config.next_blocks))
    new_x, projected = plgpu.kernel(
        functools.partial(_layer_kernel, config=config),
        out_type=[jax.ShapeDtypeStruct(x.shape, dtype), jax.ShapeDtypeStruct((projected,), dtype)],
        grid=(config.num_blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=allocate(dtype, config),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="decoder_layer",
    )(attention, x, turn, append, *weights[:5], *weights.projections, slots)
    return new_x, projected


def _layer_kernel(
    attention, x_ref, turn_ref, append, o_ref, gate_up_ref, down_ref, mlp_scale_ref,
    next_scale_ref,
    *refs, config: LayerConfig,
):  # fmt: skip
    """One thread block's share of the products."""
    count = len(config.next_blocks)
    next_refs, (slots_ref, new_x_ref, projected_ref, *scratch) = refs[:count], refs[count:]
    scratch = divide(Scratch(*scratch), config)
    chunks, attended, middle, hidden, following, *parts = _areas(slots_ref, config)
    weights = ((o_ref,), (gate_up_ref,), (down_ref,), next_refs)
    jobs = [Job(*each) for each in zip(config.products, weights, parts, strict=True)]
    block, warpgroup = map(lax.axis_index, ("block", "warpgroup"))
    projects = turn_ref[1] != 0

    @pl.when(warpgroup == 0)
    def _consume():
        turn = turn_ref[0]
        finish = functools.partial(_store, projected_ref)
        if append is not None:
            finish = functools.partial(_rotate_and_append, _loaded(append), projected_ref)
        work = functools.partial(_Work, block, turn, scratch, config)
        o, gate_up, down, projections = (work(job) for job in jobs)
        step = jnp.int32(0)
        if config.attention is None:
            _copy(attention, scratch.x)
        else:
            step = attend_chunk(attention, block, turn, chunks, scratch, config)
            merge_heads(block, turn, chunks, attended, x_ref.dtype, config)
        step = o.run(step, functools.partial(_add_to_residual, middle, None), attended, x_ref)
        gate_up.take_normed(middle, mlp_scale_ref)
        step = gate_up.run(step, functools.partial(_gate, hidden))
        add = functools.partial(_add_to_residual, following, new_x_ref)
        step = down.run(step, add, hidden, scratch.residual)

        @pl.when(projects)
        def _():
            projections.take_normed(following, next_scale_ref)
            projections.run(step, finish)

    @pl.when(warpgroup == 1)
    def _produce():
        so_far = Loaded(jnp.int32(0), jnp.int32(0))
        if config.attention is not None:
            so_far = stream_cache(attention, block, so_far, scratch, config)
        *others, of_next = jobs
        for job in others:
            so_far = stream_share(job, block, so_far, scratch, config)

        @pl.when(projects)
        def _():
            stream_share(of_next, block, so_far, scratch, config)


def _areas(slots_ref, config):
    """The slots of each vector, and of each product's parts."""
    ends = list(itertools.accumulate(config.slots, initial=0))
    return [
        slots_ref.at[pl.ds(start, end - start)] if end > start else None
        for start, end in itertools.pairwise(ends)
    ]


class _Work(NamedTuple):
    """What the multiplying warpgroup does of a product."""

    block: Any
    turn: Any
    scratch: Scratch
    config: LayerConfig
    job: Job

    @property
    def share(self):
        """The thread block's steps."""
        return share_of(self.job.product, self.block)

    def take_normed(self, slots_ref, scale_ref):
        """Takes the stream: the residual, and normalised what is multiplied."""
        D, dtype = scale_ref.shape[0], scale_ref.dtype
        # On its way while the others are waited for.
        scale = plgpu.load(scale_ref, layout=slot_layout(D, dtype))
        (x,) = take(self.turn, [slots_ref], jax.ShapeDtypeStruct((D,), dtype))
        self.scratch.residual[...] = x
        mean_square = jnp.sum(jnp.square(x.astype(jnp.float32))) / D
        self.scratch.x[pl.ds(0, D)] = normalised(x, mean_square, scale, self.config.eps)

    def run(self, start, target, slots_ref=None, residual_ref=None):
        """Multiplies the thread block's tiles, of the ring's steps from `start` on; `target` takes
        the column blocks that it finishes, with the residual stream's. The vector is there, or
        taken from slots, each piece when it is needed."""
        product, share = self.job.product, self.share

        def column_block(begin):
            column, step = share.place(begin)
            end = jnp.minimum(begin + (product.steps - step), share.count)
            finish = functools.partial(target, self, column)
            if residual_ref is not None:
                # On its way while tiles are multiplied.
                residual = residual_ref.at[pl.ds(column * COLUMNS, COLUMNS)]
                finish = functools.partial(finish, plgpu.load(residual, layout=LINE))
            tile = functools.partial(self._multiply, start, step - begin, slots_ref)
            zeros = jnp.zeros((_FILLED, COLUMNS), jnp.float32)
            zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
            accs = lax.fori_loop(begin, end, tile, (zeros,) * (TILES if product.gated else 1))
            self._finish(column, [self._line(i, acc) for i, acc in enumerate(accs)], finish)
            return end

        lax.while_loop(lambda begin: begin < share.count, column_block, jnp.int32(0))
        return start + share.count

    def _multiply(self, start, step_of_first, slots_ref, i, accs):
        """The sums with those of the i-th step."""
        product, scratch, accs = self.job.product, self.scratch, list(accs)
        row = (step_of_first + i) * product.rows
        if slots_ref is not None:
            self._take_piece(slots_ref, i, row)
        parts = [scratch.x.at[pl.ds(row + j, ROWS)] for j in range(0, product.rows, ROWS)]
        spread = [_spread(part) for part in parts]
        for tile in range(TILES):
            stage = lax.rem((start + i) * TILES + tile, jnp.int32(self.config.stages))
            acc, x = tile % len(accs), spread[tile % len(spread)]
            plgpu.barrier_wait(scratch.full.at[stage])
            accs[acc] = accumulate(accs[acc], x, scratch.ring.at[stage])
            plgpu.barrier_arrive(scratch.released.at[stage])
        return tuple(accs)

    def _take_piece(self, slots_ref, i, row):
        """Takes the piece of the vector that begins with a row, or holds the first one. After as
        many steps as a column block has, all that is multiplied is there."""
        product, dtype = self.job.product, self.scratch.x.dtype
        size = min(_PIECE, product.depth // VECTOR * VECTOR)

        @pl.when((i < product.steps) & ((i == 0) | (lax.rem(row, jnp.int32(size)) == 0)))
        def _():
            # The last one may begin in the one before it.
            start = jnp.minimum(lax.div(row, jnp.int32(size)) * size, product.depth - size)
            # A word of slots holds a value of 16 bits.
            slots = slots_ref.at[pl.ds(start, size)]
            (values,) = take(self.turn, [slots], jax.ShapeDtypeStruct((size,), dtype))
            self.scratch.x[pl.ds(start, size)] = values

    def _line(self, tile, acc):
        """A row of acc, a value for each thread."""
        return line_of(acc, self.scratch.sums.at[pl.ds(tile * COLUMNS, COLUMNS)])

    def _finish(self, column, sums, finish):
        """Finishes a column block, or hands a part of one to the thread block that does."""
        product = self.job.product
        if self.job.parts is None:
            finish(sums)
            return
        shared = column - product.whole * product.num_blocks
        first, last = self.share.owners(shared)
        is_alone = shared < 0
        others = jnp.where(is_alone, 0, last - first)

        @pl.when(is_alone | (self.block == first))
        def _():
            def add(i, sums):
                count = jnp.minimum(others - i * _MOST_PARTS, _MOST_PARTS)
                parts = self._take_parts(i * _MOST_PARTS, count, len(sums), shared)
                return tuple(x + y for x, y in zip(sums, parts, strict=True))

            trips = lax.div(others + (_MOST_PARTS - 1), jnp.int32(_MOST_PARTS))
            finish(lax.fori_loop(0, trips, add, tuple(sums)))

        @pl.when(jnp.logical_not(is_alone) & (self.block > first))
        def _():
            for i, values in enumerate(sums):
                put_line(values, self.turn, self._part(self.block - first - 1, i, shared))

    def _take_parts(self, first, count, tiles, column):
        _, _, columns = parts_shape(self.job.product)
        refs = [self._part(first, tile, column) for tile in range(tiles)]
        fills, distance = [0.0] * tiles, 2 * tiles * columns
        parts = take_lines(self.turn, refs, fills, _MOST_PARTS, count, distance)
        return [sum(lines) for lines in parts]

    def _part(self, part, tile, column):
        """The slots of one part of a tile's columns: of each of their sums two words."""
        _, tiles, columns = parts_shape(self.job.product)
        start = (part * tiles + tile) * columns + column * COLUMNS
        return self.job.parts.at[pl.ds(2 * start, 2 * COLUMNS)]


def _spread(x_ref):
    """x as every row of a matrix, in registers."""
    values = plgpu.load(x_ref, layout=ROW, optimized=False)
    return lax.broadcast_in_dim(values, (_FILLED, values.shape[0]), (1,))


def _add_to_residual(slots_ref, new_x_ref, work, column, residual, sums):
    """Tells the residual stream with the sums added to it."""
    columns = pl.ds(column * COLUMNS, COLUMNS)
    total = rounded_sum(residual, sums[0].astype(residual.dtype))
    put_line(total, work.turn, slots_ref.at[columns])
    if new_x_ref is not None:
        new_x_ref[columns] = total


def _gate(slots_ref, work, column, sums):
    """Tells silu(gate) * up."""
    dtype = work.scratch.x.dtype
    gate, up = (x.astype(dtype).astype(jnp.float32) for x in sums)
    hidden = gate / (1.0 + jnp.exp2(gate * -LOG2_E)) * up
    put_line(hidden.astype(dtype), work.turn, slots_ref.at[pl.ds(column * COLUMNS, COLUMNS)])


def _store(target_ref, work, column, sums):
    """Stores the sums."""
    del work
    target_ref[pl.ds(column * COLUMNS, COLUMNS)] = sums[0].astype(target_ref.dtype)


def _loaded(append):
    """All but the caches in registers."""
    cos, sin = (plgpu.load(ref, layout=LINE) for ref in (append.cos, append.sin))
    return append._replace(cos=cos, sin=sin, slot=append.slot[0])


def _rotate_and_append(append, q_ref, work, column, sums):
    """Stores a head: rotated, or in the cache, or both."""
    dtype, H = q_ref.dtype, COLUMNS
    _, S, K, _ = append.keys.shape
    num_q_heads = q_ref.shape[0] // H
    x = sums[0].astype(dtype).astype(jnp.float32)
    # Twice, so that the other half of the head stands behind and before each.
    for i in range(2):
        work.scratch.sums[pl.ds(i * H, H)] = x
    other = plgpu.load(work.scratch.sums.at[pl.ds(H // 2, H)], layout=LINE)
    rotated = (x * append.cos + other * append.sin).astype(dtype)
    fits = (append.slot >= 0) & (append.slot < S)
    head = column - num_q_heads

    @pl.when(head < 0)
    def _():
        q_ref[pl.ds(column * H, H)] = rotated

    @pl.when((head >= 0) & (head < K) & fits)
    def _():
        append.keys[0, append.slot, head] = rotated.astype(append.keys.dtype)

    @pl.when((head >= K) & fits)
    def _():
        value = x.astype(dtype).astype(append.values.dtype)
        append.values[0, append.slot, head - K] = value


def _copy(source_ref, target_smem):
    size = source_ref.shape[0]
    for start in range(0, size, _AT_ONCE):
        part = pl.ds(start, min(_AT_ONCE, size - start))
        target_smem[part] = load_vector(source_ref.at[part])
