"""The kernel of wide-query attention on Pallas Mosaic GPU, for Hopper.

One thread block holds 128 query rows: two warpgroups of 64, each the tokens of one query head. A
third warpgroup streams the K and V tiles that both read through a ring in shared memory (TMA). The
two take turns (FlashAttention-3, arXiv 2407.08608): while one multiplies, the other computes its
softmax, so that the tensor cores always have work.

B batch, T query tokens, S capacity, N query heads, K KV heads, H head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecode.pallas_kernels.mosaic import LOG2_E, accumulate, meet, swizzled, zero_unseen

# Query rows of a warpgroup: what an instruction of the tensor cores takes.
ROWS = 64
# Warpgroups that compute; one more loads.
_CONSUMERS = 2


@dataclasses.dataclass(frozen=True)
class WideConfig:
    """Static sizes of the wide-query kernel.

    Attributes:
      heads: query heads of a block, 2 (of one KV head, same tokens) or 1 (its tokens side by side).
      block_kv: keys per tile, a multiple of 64.
      stages: K/V tiles in flight.
      scale: of the logits. softcap: None for none.
    """

    heads: int
    block_kv: int
    stages: int
    scale: float
    softcap: float | None = None

    @property
    def tokens(self) -> int:
        """Query tokens of a block."""
        return ROWS * _CONSUMERS // self.heads

    @property
    def unit(self) -> float:
        """What turns the kernel's logits into base 2. Left to the exponential, it costs nothing;
        but it must be above zero, or what is masked does not stay -inf."""
        return self.scale * LOG2_E if self.softcap is None and self.scale > 1e-30 else 1.0


def wide_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, lo: jax.Array, hi: jax.Array,
    sinks: jax.Array | None, out_dtype: Any, config: WideConfig,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Attends every query to the slots lo <= s < hi of its sequence.

    Args:
      q: [B, T, N, H], T a multiple of 8; k, v: [B, S, K, H].
      lo, hi: [B, R] int32 that never decrease along R, which is T rounded up to `config.tokens`.
      sinks: [N] float32 or None, one more logit per head with a zero value.

    Returns:
      out [B, T, N, H] in out_dtype, lse [B, N, R] float32, natural log, sinks counted.
    """
    B, _, N, H = q.shape
    R = lo.shape[1]
    tiled = swizzled(H, q.dtype.itemsize)
    ring = plgpu.SMEM((config.stages, config.block_kv, H), q.dtype, transforms=tiled)
    # The result leaves in columns, so that it needs little shared memory.
    columns = next(x for x in (64, 32, 16) if H % x == 0)
    out_tiled = swizzled(columns, jnp.dtype(out_dtype).itemsize)
    loaded = plgpu.Barrier(num_barriers=config.stages)
    released = plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=config.stages)
    return plgpu.kernel(
        functools.partial(_wide_kernel, config=config, has_sinks=sinks is not None),
        out_type=[
            jax.ShapeDtypeStruct(q.shape, out_dtype),
            jax.ShapeDtypeStruct((B, N, R), jnp.float32),
        ],
        grid=(N // config.heads, R // config.tokens, B),
        grid_names=("head_block", "row_block", "batch"),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((_CONSUMERS, ROWS, H), q.dtype, transforms=tiled),
            plgpu.SMEM((_CONSUMERS, ROWS, columns), out_dtype, transforms=out_tiled),
            plgpu.Barrier(num_arrivals=_CONSUMERS),
            plgpu.Barrier(num_arrivals=_CONSUMERS),
            *_Ring(ring, ring, loaded, loaded, released, released, plgpu.Barrier()),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="flash_decode_prefill",
    )(q, k, v, lo, hi, *(() if sinks is None else (sinks,)))


class _Ring(NamedTuple):
    """The K and V tiles in flight, and the barriers that hand them over."""

    k: Any
    v: Any
    k_full: Any
    v_full: Any
    k_released: Any
    v_released: Any
    v_cleaned: Any


class _Visible(NamedTuple):
    """What the rows of a warpgroup see: each row [64]; all of them; any row of the block."""

    rows: tuple[Any, Any]
    by_all: tuple[Any, Any]
    by_any: tuple[Any, Any]


def _wide_kernel(q_ref, k_ref, v_ref, lo_ref, hi_ref, *refs, config: WideConfig, has_sinks: bool):
    """128 query rows that read one KV head of one sequence."""
    sinks_ref, refs = refs[:has_sinks], refs[has_sinks:]
    out_ref, lse_ref, q_smem, out_smem, q_full, turn, *ring_refs = refs
    ring = _Ring(*ring_refs)
    b, warpgroup = lax.axis_index("batch"), lax.axis_index("warpgroup")
    # The last rows see most: begun first, they are not what all wait for at the end.
    t0 = lo_ref.shape[1] - (lax.axis_index("row_block") + 1) * config.tokens
    by_any = lo_ref[b, t0], hi_ref[b, t0 + config.tokens - 1]
    block = jnp.int32(config.block_kv)
    first = lax.div(by_any[0], block)
    tiles = jnp.maximum(lax.div(by_any[1] + (block - 1), block) - first, 0)

    def place(consumer):
        """The query head and the first token of a warpgroup."""
        n = lax.axis_index("head_block") * config.heads
        return (n + consumer, t0) if config.heads == 2 else (n, t0 + consumer * ROWS)

    @pl.when(warpgroup < _CONSUMERS)
    def _consume():
        plgpu.set_max_registers(232, action="increase")
        n, t = place(warpgroup)
        rows = pl.ds(t, ROWS)
        visible = _Visible(
            rows=(_load_rows(lo_ref.at[b, rows]), _load_rows(hi_ref.at[b, rows])),
            by_all=(lo_ref[b, t + (ROWS - 1)], hi_ref[b, t]),
            by_any=by_any,
        )
        sink = sinks_ref[0][n] if has_sinks else None
        plgpu.barrier_wait(q_full)
        q = q_smem.at[warpgroup]
        out, lse = _attend_tiles(first, tiles, q, ring, turn, visible, sink, config)
        lse_ref[b, n, rows] = lse
        _store(out, out_smem.at[warpgroup], out_ref.at[b, rows, n])

    @pl.when(warpgroup == _CONSUMERS)
    def _produce():
        plgpu.set_max_registers(40, action="decrease")
        for consumer in range(_CONSUMERS):
            n, t = place(consumer)
            rows = q_ref.at[b, pl.ds(t, ROWS), n]
            plgpu.copy_gmem_to_smem(rows, q_smem.at[consumer], q_full)
        h = lax.div(n, jnp.int32(q_ref.shape[2] // k_ref.shape[2]))

        def load(i, _):
            tile = (b, pl.ds((first + i) * block, config.block_kv), h)
            _refill(i, tiles, k_ref.at[tile], ring.k, ring.k_full, ring.k_released)
            _refill(i, tiles, v_ref.at[tile], ring.v, ring.v_full, ring.v_released)
            return ()

        # Waits for the last tiles too: Mosaic's interpreter (jax 0.11) wants all arrivals seen.
        lax.fori_loop(0, tiles + config.stages, load, ())


def _refill(i, tiles, source, smem, full, released):
    """Loads tile i into its slot of the ring, once all have read what the slot held."""
    stages = smem.shape[0]
    slot = lax.rem(i, jnp.int32(stages))

    @pl.when(i >= stages)
    def _():
        plgpu.barrier_wait(released.at[slot])

    @pl.when(i < tiles)
    def _():
        plgpu.copy_gmem_to_smem(source, smem.at[slot], full.at[slot])


def _attend_tiles(first, tiles, q, ring, turn, visible, sink, config):
    """Online softmax of a warpgroup's rows over all tiles: out [64, H] and lse [64]."""
    warpgroup = lax.axis_index("warpgroup")

    # The second starts when the first has multiplied: from there on each waits for the other.
    @pl.when(warpgroup == 1)
    def _():
        meet(turn)

    def tile(i, carry):
        acc, top, total = carry
        slot = lax.rem(i, jnp.int32(config.stages))
        start = (first + i) * config.block_kv
        plgpu.barrier_wait(ring.k_full.at[slot])
        logits = _logits(q, ring.k.at[slot], turn, start, visible, config)
        plgpu.barrier_arrive(ring.k_released.at[slot])
        p, rescale, top = _softmax(logits, top, config)
        acc = acc * _across(rescale, acc.shape[1])
        total = total * rescale + p.sum(axis=1)
        p = p.astype(q.dtype)
        plgpu.barrier_wait(ring.v_full.at[slot])
        _clean(ring, slot, start, visible.by_any)
        # All arithmetic stays before the turn, where it costs the tensor cores nothing.
        acc, total, p = lax.optimization_barrier((acc, total, p))
        meet(turn)
        acc = accumulate(acc, p, ring.v.at[slot])
        plgpu.barrier_arrive(ring.v_released.at[slot])
        return acc, top, total

    # A sink is one more key, whose value is zero.
    top, total = (-jnp.inf, 0.0) if sink is None else (sink * LOG2_E, 1.0)
    carry = lax.fori_loop(0, tiles, tile, (_zeros(q.shape), _filled(top), _filled(total)))

    @pl.when(warpgroup == 0)
    def _():
        meet(turn)

    acc, top, total = carry
    empty = total == 0.0
    divisor = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, (top + jnp.log2(divisor)) / LOG2_E)
    return acc * _across(1.0 / divisor, acc.shape[1]), lse


def _logits(q, k_tile, turn, start, visible, config):
    """Logits [64, block_kv] of a tile, in `config.unit`; -inf for the slots a row does not see."""
    shape = (q.shape[0], k_tile.shape[0])

    def multiply(acc):
        plgpu.wgmma(acc, q, k_tile.transpose((1, 0)))
        meet(turn)
        return acc[...]

    def mask(logits):
        lo, hi = (_across(x, shape[1]) for x in visible.rows)
        slot = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA) + start
        return jnp.where((slot >= lo) & (slot < hi), logits, -jnp.inf)

    logits = _capped(pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32)), config)
    inside = (start >= visible.by_all[0]) & (start + shape[1] <= visible.by_all[1])
    return lax.cond(inside, lambda x: x, mask, logits)


def _capped(products, config):
    """Products of queries and keys as logits: times `config.unit`, they are in base 2."""
    if config.softcap is None:
        return products if config.unit != 1.0 else products * (config.scale * LOG2_E)
    # tanh(x) = 1 - 2 / (1 + exp(2 x)); the tanh of approximate math has only 11 bits.
    root = lax.rsqrt(1.0 + jnp.exp2(products * (2 * LOG2_E * config.scale / config.softcap)))
    return config.softcap * LOG2_E * (1.0 - 2.0 * (root * root))


def _softmax(logits, top, config):
    """One step of the online softmax.

    Returns (weights [64, block_kv], the factor [64] of what was summed before, new top [64])."""
    new_top = jnp.maximum(top, logits.max(axis=1) * config.unit)
    # A row that has seen nothing yet: -inf less -inf would be NaN.
    shift = jnp.where(new_top == -jnp.inf, 0.0, new_top)
    p = jnp.exp2(logits * config.unit - _across(shift, logits.shape[1]))
    return p, jnp.exp2(top - shift), new_top


def _clean(ring, slot, start, seen):
    """Zeroes the slots of a V tile that no row of the block sees, before either warpgroup reads it.

    The first has its turn before the second, so it cleans for both."""
    block = ring.v.shape[1]

    @pl.when((start < seen[0]) | (start + block > seen[1]))
    def _():
        @pl.when(lax.axis_index("warpgroup") == 0)
        def _():
            zero_unseen(ring.v.at[slot], start, *seen)
            plgpu.commit_smem()
            plgpu.barrier_arrive(ring.v_cleaned)

        @pl.when(lax.axis_index("warpgroup") == 1)
        def _():
            plgpu.barrier_wait(ring.v_cleaned)


def _store(out, staging, target):
    """Writes a warpgroup's rows [64, H], those past T excepted, some columns at a time."""
    columns = staging.shape[1]
    for column in range(0, out.shape[1], columns):
        staging[...] = out[:, column : column + columns].astype(staging.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging, target.at[:, pl.ds(column, columns)])
        plgpu.wait_smem_to_gmem(0)


def _load_rows(rows):
    """[64] values of global memory, one for each row of a tile."""
    return plgpu.load(rows, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _zeros(shape):
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def _filled(value):
    """[64] equal values, one for each row of a tile."""
    rows = jnp.full((ROWS,), value, jnp.float32)
    return plgpu.layout_cast(rows, plgpu.Layout.WGMMA.reduce(1))


def _across(x, columns):
    """x [64] as [64, columns]."""
    return lax.broadcast_in_dim(x, (*x.shape, columns), (0,))
