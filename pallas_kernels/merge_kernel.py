"""Step 2 of Flash-Decoding within the launch of step 1, on Pallas Mosaic GPU.

The thread blocks that attend to the parts of an item tell each other what they found (see
part_slots.py) and then merge it, each some groups of columns of some rows. An item is a row block
of a KV head of a sequence; its tasks are the groups of all its rows.

A warpgroup has sixteen threads for each slot of a group. Some of them, its `lanes`, have different
parts of the same task, so many that each has WORDS of them, and add up across parts at the end; the
others have other tasks. So each slot is read by one thread, in one trip to the cache, whether there
are few parts, and each block has many tasks, or many, and each has few.

The letters are those of flash_decode_kernel.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecode.pallas_kernels.chunk_kernel import first_row
from jaxdecode.pallas_kernels.mosaic import LOG2_E, THREADS
from jaxdecode.pallas_kernels.own_values import gather, own, scatter
from jaxdecode.pallas_kernels.part_slots import (
    APART,
    GROUP_COLUMNS,
    GROUP_SLOTS,
    SLOT,
    WARP_BITS,
    WORDS,
    Places,
    across_lanes,
    across_warps,
    slots_size,
    take,
    told_groups,
)
from jaxdecode.pallas_kernels.split_config import SplitConfig

# Threads of a warpgroup that have the same slot of a group.
_MOST_LANES = THREADS // GROUP_SLOTS
# Tasks that a thread has at once where the number of parts is not known when compiled: of two
# parts of eight rows all that there are.
_TASKS = 2


class Item(NamedTuple):
    """An item, and what a thread block has of it.

    Attributes:
      b, h, row_block: which it is.
      part: number of the thread block's part. parts: how many there are, 1 or more.
      places: of the parts' slots.
    """

    b: Any
    h: Any
    row_block: Any
    part: Any
    parts: Any
    places: Places


class Results(NamedTuple):
    """Refs of what is merged into.

    Attributes:
      out: [B, T, K, G, H]. lse: natural log, sinks counted. sinks: [N] float32 or None.
      lse_place: of a row in `lse`, whose dimensions count as one, by item, row, token, and head.
    """

    out: Any
    lse: Any
    sinks: Any
    lse_place: Callable[..., Any]


class _Sums(NamedTuple):
    """Of parts of tasks, as `take` has them: the largest log-sum-exp in base 2, and with weights
    relative to it their sum and those of a slot's two columns."""

    top: Any
    total: Any
    near: Any
    far: Any


class Share(NamedTuple):
    """What the threads of a block have to merge. Arrays are [n * THREADS] int32, of n tasks of each
    thread.

    Attributes:
      bits: 2^bits threads have different parts of the same task, its lanes.
      first, extra, stride: of the slots, as `take` wants them.
      count: slots of a task in a thread, None if they are always WORDS.
      column, lse: where to store a task's first column and its log-sum-exp; negative if not here.
      head: of the task.
    """

    bits: Any
    first: Any
    extra: Any
    stride: Any
    count: Any
    column: Any
    lse: Any
    head: Any


def tasks_of_thread(parts: int | None, config: SplitConfig) -> int:
    """Tasks that a thread has at once, of an item of so many parts; None if nobody knows."""
    if parts is None:
        return _TASKS
    return -(-_num_tasks(config) // (parts * (_MOST_LANES >> _lane_bits(parts))))


def scratch_size(tasks: int) -> int:
    """float32 elements of shared memory that merging needs for so many tasks of a thread."""
    return len(_Sums._fields) * tasks * THREADS


def merge(
    item: Item, slots_ref: Any, results: Results, scratch_ref: Any, config: SplitConfig
) -> None:
    """Merges a thread block's share of an item's tasks, once their parts are told.

    Args:
      scratch_ref: scratch_size(tasks_of_thread(None)) float32 elements of shared memory.
    """
    at_once = (_TASKS * _MOST_LANES >> _lane_bits(item.parts)) * item.parts

    def some(i, _):
        share = share_of(item, i, _TASKS, results, config)
        merge_share(share, item.parts, slots_ref, results, scratch_ref, config)
        return ()

    lax.fori_loop(0, lax.div(_num_tasks(config) - 1, at_once) + 1, some, ())


def share_of(item: Item, trip: Any, tasks: int, results: Results, config: SplitConfig) -> Share:
    """A thread block's tasks of an item: so many of each thread, after those of `trip` times."""
    bits, parts, part_slots = _lane_bits(item.parts), item.parts, slots_size(1, config) // SLOT
    place = plgpu.broadcasted_iota(jnp.int32, (tasks * THREADS,), 0, layout=own(tasks))
    number, thread = _divided(place, THREADS)
    lane, slot = _divided(thread, GROUP_SLOTS)
    task, lane = _without_last(lane, bits)
    task = ((number + trip * tasks) * (_MOST_LANES >> bits) + task) * parts + item.part
    has_task = task < _num_tasks(config)
    # Nobody stores or waits for those that there are not.
    task = jnp.minimum(task, _num_tasks(config) - 1)
    first = (item.places.first + item.places.step * lane) * part_slots + task * GROUP_SLOTS + slot
    extra = None
    if item.places.extra:
        extra = jnp.where(lane == 0, item.places.extra * part_slots, 0)
        first = first + extra
    # A slot that two threads took, one of them could wait for in vain: it is taken away.
    count = jnp.where(has_task, (parts - lane + ((1 << bits) - 1)) >> bits, 0)
    if isinstance(parts, int):
        at_once = (tasks * _MOST_LANES >> bits) * parts
        if parts == WORDS << bits and _num_tasks(config) == at_once:
            count = None
    stride = (item.places.step * part_slots) << bits
    targets = _targets(task, slot, has_task & (lane == 0), item, results, config)
    return Share(bits, first, extra, stride, count, *targets)


def merge_share(
    share: Share, parts: Any, slots_ref: Any, results: Results, scratch_ref: Any,
    config: SplitConfig,
) -> None:  # fmt: skip
    """Waits for the parts of a share, merges and stores them."""
    sums = _across(_taken(share, parts, slots_ref), share.bits, scratch_ref)
    _store(sums, share, results, config)


def store_empty(item: Item, results: Results, config: SplitConfig) -> None:
    """Stores all rows of an item of one part, which sees nothing."""

    def some(i, _):
        share = share_of(item, i, 1, results, config)
        _store(_no_sums(), share, results, config)
        return ()

    lax.fori_loop(0, -(-_num_tasks(config) // _MOST_LANES), some, ())


def _lane_bits(parts):
    """The fewest bits whose lanes have WORDS of so many parts each, if there are such lanes."""
    most = _MOST_LANES.bit_length() - 1
    if isinstance(parts, int):
        return next((bits for bits in range(most) if WORDS << bits >= parts), most)
    return sum(jnp.where(parts > WORDS << bits, jnp.int32(1), jnp.int32(0)) for bits in range(most))


def _taken(share, parts, slots_ref):
    """The sums of the parts that each thread has."""

    def taken(first, count, extra):
        return _Sums(*take(slots_ref, first, count, share.stride, extra))

    sums = taken(share.first, share.count, share.extra)
    most = WORDS * _MOST_LANES
    if isinstance(parts, int) and parts <= most:
        return sums
    rest = share.first if share.extra is None else share.first - share.extra

    def more(i, sums):
        words = i * WORDS
        return _added(sums, taken(rest + words * share.stride, share.count - words, None))

    return lax.fori_loop(1, lax.div(parts - 1, jnp.int32(most)) + 1, more, sums)


def _across(sums, bits, scratch_ref):
    """The sums of all lanes of a task, in each of them."""
    if isinstance(bits, int) and bits == 0:
        return sums
    top = across_lanes(sums.top, bits, "max")
    weight = jnp.exp2(sums.top - _finite(top))
    sums = _Sums(top, *(across_lanes(x * weight, bits, "sum") for x in sums[1:]))

    def across(sums):
        return _Sums(*across_warps(list(sums), bits, scratch_ref))

    if isinstance(bits, int):
        return across(sums) if bits > WARP_BITS else sums
    return lax.cond(bits > WARP_BITS, across, lambda sums: sums, sums)


def _no_sums():
    """Of no parts, for one task."""

    def filled(value):
        return plgpu.layout_cast(jnp.full((THREADS,), value, jnp.float32), own(1))

    return _Sums(filled(-jnp.inf), filled(0.0), filled(0.0), filled(0.0))


def _added(sums, others):
    top = jnp.maximum(sums.top, others.top)
    weights = [jnp.exp2(each.top - _finite(top)) for each in (sums, others)]
    pairs = zip(sums[1:], others[1:], strict=True)
    return _Sums(top, *(x * weights[0] + y * weights[1] for x, y in pairs))


def _targets(task, slot, is_mine, item, results, config):
    """Where to store a task's first column and log-sum-exp, if it is mine; and its head."""
    _, T, K, G, H = results.out.shape
    row, group = _divided(task, told_groups(config))
    (t0, g0), (t, g) = first_row(item.row_block, config), _divided(row, config.block_g)
    t, g = t0 + t, g0 + g
    head = item.h * G + g
    column = ((item.b * T + t) * (K * G) + head) * H + group * GROUP_COLUMNS + slot
    is_first = is_mine & (group == 0) & (slot == 0)
    lse = results.lse_place(item, row, t, g)
    return jnp.where(is_mine, column, -1), jnp.where(is_first, lse, -1), head


def _store(sums, share, results, config):
    """Stores the columns and log-sum-exps of a share."""
    if results.sinks is not None:
        sums = _added(sums, _sinks(share.head, results.sinks, config))
    top, total, near, far = sums
    is_empty = total == 0.0
    divisor = jnp.where(is_empty, 1.0, total)
    far_column = jnp.where(share.column < 0, share.column, share.column + APART)
    for place, value in ((share.column, near), (far_column, far)):
        scatter(results.out, place, (value / divisor).astype(results.out.dtype))
    lse = jnp.where(is_empty, -jnp.inf, (top + jnp.log2(divisor)) * (1 / LOG2_E))
    scatter(results.lse, share.lse, lse)


def _sinks(heads, sinks_ref, config):
    """The sums of a logit whose value is zero, of each head."""
    if config.block_g == 1:
        sink = sinks_ref[heads]
    else:
        sink = gather(sinks_ref, heads)
    return _Sums(sink * LOG2_E, 1.0, 0.0, 0.0)


def _num_tasks(config):
    return config.block_t * config.block_g * told_groups(config)


def _divided(x, size):
    """x / size, and what is left; x is not negative."""
    if size & (size - 1) == 0:
        return _without_last(x, size.bit_length() - 1)
    return lax.div(x, jnp.int32(size)), lax.rem(x, jnp.int32(size))


def _without_last(x, bits):
    """x without its last bits, and these; x is not negative."""
    if isinstance(bits, int) and bits == 0:
        return x, 0
    return x >> bits, x & ((1 << bits) - 1)


def _finite(top):
    """What logits are compared with: -inf is their largest only where there are none."""
    return jnp.where(top == -jnp.inf, 0.0, top)
