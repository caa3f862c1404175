"""The layers of a step of one token on one GPU, with one kernel from each attention to the next.

The arithmetic is that of the modules in llama.py, which run what is before the first attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxdecode.models.kv_cache import KVCache
from jaxdecode.pallas_kernels import fused_layer
from jaxdecode.pallas_kernels.decode_attention import visible_ranges
from jaxdecode.pallas_kernels.fused_layer import LayerWeights
from jaxdecode.pallas_kernels.varying import varying_axes

if TYPE_CHECKING:
    from jaxdecode.models.llama import Block, Partial, Step

Array = jax.Array


def why_not(blocks: Sequence[Block], x: Array, step: Step) -> str | None:
    """Why the layers of a step that begins with x [B, T, D] are not fused; None if they are."""
    if step.sharding.mesh is not None:
        return "the model is on a mesh"
    if (tokens := x.shape[0] * x.shape[1]) != 1:
        return f"the kernel is for one token, not {tokens}"
    if len(blocks) < 2:
        return "there is one layer"
    weights = _weights_between(blocks[0], blocks[1])
    if x.dtype != weights.o.dtype:
        return f"the embedding is {x.dtype} and the layers are {weights.o.dtype}"
    if any(varying_axes(leaf) for leaf in jax.tree.leaves((x, weights, step.num_tokens))):
        return "the step is inside shard_map and differs between devices"
    return fused_layer.why_not(weights)


def run_layers(
    blocks: Sequence[Block], x: Array, result: Partial, cache: KVCache, step: Step
) -> tuple[Array, Partial, KVCache]:
    """All layers, as one after the other would run them.

    Args:
      x: [1, 1, D], the residual stream. result: what is added to it first.

    Returns:
      (x, what is yet to be added to it: nothing; cache).
    """
    x, normed = blocks[0].attn_norm(x, result, step)
    q, kv = blocks[0].attn.project(normed, step)
    q, cache = blocks[0].attn.append(q, kv, cache, step)
    visible = visible_ranges(
        cache.lengths + step.num_tokens, 1, cache.capacity, q_start=cache.lengths,
        window=blocks[0].attn.window,
    )  # fmt: skip
    slots = None
    # The first layer stands for the one that the last does not have behind it.
    for turn, (block, following) in enumerate(
        zip(blocks, [*blocks[1:], blocks[0]], strict=True), 1
    ):
        weights, is_last = _weights_between(block, following), turn == len(blocks)
        attention = _attention(block, weights, q, cache, visible, step)
        if slots is None:
            slots = fused_layer.new_slots(attention, weights)
        operands = attention, x.reshape(-1), weights, slots, turn, block.mlp_norm.eps
        layer = following.attn.layer
        keys, values = cache.keys[layer], cache.values[layer]
        if fused_layer.can_append(weights, keys):
            append = fused_layer.Append(step.cos, step.sin, step.slots, keys, values)
            row, q, keys, values, slots = fused_layer.run(*operands, append, is_last=is_last)
            cache = cache.with_layer(layer, keys, values)
        else:
            row, projected, slots = fused_layer.run(*operands, is_last=is_last)
            q, kv = projected[: q.size].reshape(q.shape), projected[q.size :].reshape(kv.shape)
            if not is_last:
                q, cache = following.attn.append(q, kv, cache, step)
        x = row.reshape(x.shape)
    return x, result._replace(x=jnp.zeros_like(x)), cache


def _attention(
    block: Block, weights: LayerWeights, q: Array, cache: KVCache,
    visible: tuple[Array, Array], step: Step,
) -> Array | fused_layer.Attend:  # fmt: skip
    """What a block's heads attend to, if the kernel does that too, or what they find."""
    keys, values = cache.keys[block.attn.layer], cache.values[block.attn.layer]
    is_chosen = step.implementation in (None, "flash_decode") and step.num_splits is None
    if not (is_chosen and fused_layer.can_attend(weights, q, keys)):
        return block.attn.attend(q, cache, step).reshape(-1)
    return fused_layer.Attend(q, keys, values, *visible)


def _weights_between(block: Block, following: Block) -> LayerWeights:
    """Those of a block behind its attention, and of the next one before."""
    return LayerWeights(
        o=block.attn.o[...],
        gate_up=block.mlp.gate_up[...],
        down=block.mlp.down[...],
        mlp_scale=block.mlp_norm.scale[...],
        next_scale=following.attn_norm.scale[...],
        projections=(following.attn.q[...], following.attn.kv[...]),
    )
