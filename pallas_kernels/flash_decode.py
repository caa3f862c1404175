"""Flash-Decoding on a GPU, host side: what the kernels can do and where, and their call.

B batch, T query tokens, S capacity, N query heads, K KV heads, G = N // K, H head_dim.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from jaxdecode.pallas_kernels.kernel_call import differentiable
from jaxdecode.pallas_kernels.split_config import (
    NUM_SMS,
    SplitConfig,
    blocks_to_merge_in_one,
    choose_num_splits,
    num_row_blocks,
    split_config,
)
from jaxdecode.pallas_kernels.split_plan import SplitPlan, make_plan

Array = jax.Array

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 80, 96, 128, 192, 256)


def why_not(q: Any, k: Any) -> str | None:
    """Why no kernel, split-KV or wide-query, can serve these shapes and dtypes; None if one can."""
    S, H = k.shape[1], q.shape[3]
    if q.dtype not in DTYPES:
        return f"the kernels take {' and '.join(DTYPES)}, not {q.dtype}"
    if H not in HEAD_DIMS:
        return f"the kernels take head_dim {', '.join(map(str, HEAD_DIMS))}, not {H}"
    if S % 8 or S < 64:
        return f"the kernels need a capacity that is a multiple of 8 and at least 64, not {S}"
    return None


def why_not_here() -> str | None:
    """Why the kernels cannot run on this machine; None if they can."""
    if jax.default_backend() != "gpu":
        return f"the kernels need an NVIDIA Hopper GPU, and JAX runs on {jax.default_backend()}"
    # The GPU first: where it is another, a newer jax would not help.
    device = jax.devices("gpu")[0]
    capability = getattr(device, "compute_capability", "unknown")
    if capability != "9.0":
        return (
            "the kernels need an NVIDIA Hopper GPU (compute capability 9.0), and "
            f"{device.device_kind} has {capability}"
        )
    if jax.__version_info__ < (0, 11, 2):
        return f"GPU kernels need Python >= 3.12 and jax >= 0.11.2, this is jax {jax.__version__}"
    return None


def warn_of_idle_gpu() -> None:
    """Warns if there is a GPU but it cannot run the kernels. Python shows it once per process."""
    if jax.default_backend() == "gpu" and (obstacle := why_not_here()) is not None:
        warnings.warn(
            f"decode_attention runs its portable implementation on this GPU: {obstacle}",
            RuntimeWarning,
            stacklevel=1,
        )


def attend(
    q: Array, k: Array, v: Array, lo: Array, hi: Array, *,
    scale: float, softcap: float | None = None, sinks: Array | None = None,
    num_splits: int | None = None, out_dtype: Any = jnp.float32,
) -> tuple[Array, Array]:  # fmt: skip
    """Attends each query to the cache slots lo <= s < hi of its sequence, the keys cut in chunks.

    Arguments and results are those of `xla.attend`, and:

    Args:
      num_splits: equal chunks per sequence; None for about one per multiprocessor and, in a batch,
        for equal work per multiprocessor whatever the lengths.
      out_dtype: of the result.
    """
    forward = functools.partial(_attend, scale=scale, softcap=softcap, num_splits=num_splits)
    return differentiable(forward, (q, k, v, lo, hi, sinks), scale, softcap, out_dtype)


def _attend(q, k, v, lo, hi, sinks, *, scale, softcap, num_splits, out_dtype):
    in_one = num_splits is None and merges_in_one(q.shape, k.shape)
    # One sequence needs no plan: equal chunks of it are equal work.
    if num_splits is None and q.shape[0] == 1:
        num_splits = choose_num_splits(q.shape, k.shape)
    config = split_config(q.shape, k.shape, num_splits, scale, softcap)
    plan = _plan(lo, hi, k.shape, config) if num_splits is None else None
    return _forward(q, k, v, lo, hi, sinks, plan, config=config, in_one=in_one, out_dtype=out_dtype)


def merges_in_one(q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> bool:
    """Whether both steps are one launch here, for a call that asks for no number of splits. (For
    one that does, a row's result must not depend on the batch around it, nor on its kernels.)

    The launch's thread blocks wait for one another, so all must run at the same time on any GPU of
    this process; a program that is exported from here is for such GPUs too. Where there is none,
    nobody knows what the program will run on.

    Two launches at the same time could wait for ever, or mix what they tell each other. XLA runs
    those of a process one after the other, unless it is asked to run parts of a CUDA graph
    concurrently; two processes that share a GPU by CUDA's MPS ask for a number of splits."""
    blocks = blocks_to_merge_in_one(q_shape, k_shape)
    gpus = [device for device in jax.local_devices() if device.platform == "gpu"]
    if blocks is None or not gpus:
        return False
    return all(getattr(gpu, "core_count", 0) >= blocks for gpu in gpus)


def _plan(lo: Array, hi: Array, k_shape: tuple[int, ...], config: SplitConfig) -> SplitPlan:
    B, S, K, _ = k_shape
    heads = K * config.row_blocks
    tiles = B * heads * -(-S // config.block_kv)
    return make_plan(lo, hi, block_kv=config.block_kv, heads=heads, num_blocks=min(NUM_SMS, tiles))


# One jit for the module, so that equal calls, such as a model's layers, share one lowering. The
# plan comes from outside of it, or each call would make its own.
@functools.partial(jax.jit, static_argnames=("config", "in_one", "out_dtype"))
def _forward(q, k, v, lo, hi, sinks, plan, *, config, in_one, out_dtype):
    from jaxdecode.pallas_kernels import combine_kernel, flash_decode_kernel, part_slots

    if plan is not None:
        return _by_plan(q, k, v, lo, hi, sinks, plan, config, in_one, out_dtype)
    if in_one:
        slots = part_slots.new_slots(config.num_splits * num_row_blocks(q.shape, k.shape), config)
        return flash_decode_kernel.attention_in_one(
            q, k, v, lo, hi, sinks, slots, out_dtype, config
        )
    partials = flash_decode_kernel.split_attention(q, k, v, lo, hi, config)
    return combine_kernel.combine_splits(*partials, sinks, q.shape, out_dtype, config)


def _by_plan(q, k, v, lo, hi, sinks, plan, config, in_one, out_dtype):
    """Step 1 stores the results of whole items itself; step 2 adds those of the others."""
    from jaxdecode.pallas_kernels import combine_kernel, part_slots, planned_kernel

    B, T, N, H = q.shape
    if in_one:
        slots = part_slots.new_slots(2 * len(plan.blocks), config)
        out, lse = planned_kernel.planned_attention_in_one(
            q, k, v, lo, hi, sinks, slots, plan, out_dtype, config
        )
    else:
        to_combine, out, lse = planned_kernel.planned_attention(
            q, k, v, lo, hi, sinks, plan, out_dtype, config
        )
        out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)
        combine_kernel.combine_planned(to_combine, sinks, out_ref, lse_ref, config)
        out, lse = jax.freeze(out_ref), jax.freeze(lse_ref)
    return out.reshape(B, T, N, H), _lse_of_tokens(lse, (B, T, N), config)


def _lse_of_tokens(lse, shape, config):
    """[B, K, row_blocks, rows] as [B, T, N], without the rows that only fill row blocks. Nothing is
    moved where a row block is the heads of a token."""
    (B, T, N), K = shape, lse.shape[1]
    lse = lse[..., : config.block_t * config.block_g]
    lse = lse.reshape(B, K, config.row_blocks_t, config.row_blocks_g, config.block_t, -1)
    lse = lse.transpose(0, 2, 4, 1, 3, 5).reshape(B, -1, K, config.row_blocks_g * config.block_g)
    return lse[:, :T, :, : N // K].reshape(B, T, N)
