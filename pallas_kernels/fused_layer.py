"""The part of a decoder layer between two attentions, for one token: what can be one kernel, where,
and its call.

D model width, F feed-forward width, N query heads, K KV heads, H head_dim, P columns of all that
the next layer projects.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxdecode.pallas_kernels import flash_decode, norm, rope_append, xla
from jaxdecode.pallas_kernels.kernel_call import with_plain_gradient
from jaxdecode.pallas_kernels.layer_config import (
    COLUMNS,
    FEWEST_STAGES,
    VECTOR,
    layer_config,
)
from jaxdecode.pallas_kernels.rope_append import CACHE_DTYPES
from jaxdecode.pallas_kernels.split_config import NUM_SMS

Array = jax.Array

DTYPES = flash_decode.DTYPES
# Query heads that one product attends with. Those of a KV head must all be among them.
_ROWS = 8


class LayerWeights(NamedTuple):
    """From one attention to the next.

    Attributes:
      o: [N * H, D] or [N, H, D]. gate_up: [D, 2 F] or [D, 2, F], the gate first. down: [F, D].
      mlp_scale, next_scale: [D], of the norms before gate_up and before the next layer.
      projections: [D, ...] each, the next layer's.
    """

    o: Array
    gate_up: Array
    down: Array
    mlp_scale: Array
    next_scale: Array
    projections: tuple[Array, ...]


def why_not(weights: Any) -> str | None:
    """Why the kernel is not for weights of these shapes and dtypes, or not for this machine; None
    if it is."""
    weights = jax.eval_shape(_matrices, weights)
    arrays = jax.tree.leaves(weights)
    dtypes = {jnp.dtype(x.dtype).name for x in arrays}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return f"the kernel takes weights all in {' or '.join(DTYPES)}, not {sorted(dtypes)}"
    (NH, D), F = weights.o.shape, weights.down.shape[0]
    if D % VECTOR:
        return f"the kernel takes a model width that is a multiple of {VECTOR}, not {D}"
    widths = (NH, F, *(x.shape[1] for x in weights.projections))
    if min(NH, F) < VECTOR or any(width % COLUMNS for width in widths):
        return (
            f"the kernel takes heads and a feed-forward width of {VECTOR} in all or more, and all "
            f"widths in multiples of {COLUMNS}, not {widths}"
        )
    if D > norm.MAX_ROW_BYTES // 2 or _config(weights, 0.0).stages < FEWEST_STAGES:
        return f"vectors of {max(D, F, NH)} leave too little shared memory for weights"
    return why_not_here()


def why_not_here() -> str | None:
    """Why the kernel cannot run on this machine; None if it can."""
    if (obstacle := flash_decode.why_not_here()) is not None:
        return obstacle
    for device in jax.local_devices():
        found = getattr(device, "core_count", 0)
        if device.platform == "gpu" and found < NUM_SMS:
            return (
                f"the kernel needs {NUM_SMS} multiprocessors, and {device.device_kind} has {found}"
            )
    return None


class Attend(NamedTuple):
    """What the heads attend to: the slots lo <= s < hi of a cache.

    Attributes:
      q: [1, 1, N, H], rotated. keys, values: [1, S, K, H]. lo, hi: [1, 1] int32, hi <= S.
    """

    q: Array
    keys: Array
    values: Array
    lo: Array
    hi: Array


def can_attend(weights: LayerWeights, q: Any, keys: Any) -> bool:
    """Whether `run` may attend such queries to a cache like this."""
    K, H = keys.shape[2:]
    return (
        flash_decode.why_not(q, keys) is None
        and H == COLUMNS
        and q.shape[:2] == (1, 1)
        and q.dtype == keys.dtype == weights.o.dtype
        and q.shape[2] % _ROWS == 0
        and _ROWS % (q.shape[2] // K) == 0
        and K <= NUM_SMS
    )


def new_slots(attention: Array | Attend, weights: LayerWeights) -> Array:
    """What thread blocks of `run` tell each other things in: int32, for layers of weights of these
    shapes that begin with such an attention, or with what it found."""
    config = _config(jax.eval_shape(_matrices, weights), 0.0, attention)
    return jnp.zeros(sum(config.slots), jnp.int32)


class Append(NamedTuple):
    """Where the next layer's keys and values go.

    Attributes:
      cos, sin: [1, 1, 1, H / 2] float32, of the token's position.
      slots: [1, 1] int32, as `rope_append.rotate_and_append` takes them.
      keys, values: [1, S, K, H]; a jitted step that takes them donated writes them in place.
    """

    cos: Array
    sin: Array
    slots: Array
    keys: Array
    values: Array


def can_append(weights: LayerWeights, keys: Any) -> bool:
    """Whether `run` may append to a cache like this, and rotate."""
    H = keys.shape[3]
    return H == COLUMNS and keys.dtype in CACHE_DTYPES and len(weights.projections) == 2


def run(
    attention: Array | Attend, x: Array, weights: LayerWeights, slots: Array, turn: int | Array,
    eps: float, append: Append | None = None, *, is_last: bool = False,
) -> tuple[Array, ...]:  # fmt: skip
    """One token's way from an attention, or its result, to the next layer's projections.

    The last layer of a model has none to go to. To share the kernel with the others it is called as
    they are, with the projections and the cache of any other layer, and told that it is the last:
    its projections are then anything, and caches what they were.

    The kernel rounds where `plain` does, except that it does not round silu(gate), whose
    exponential is approximate; and it adds up products in another order. The call is for weights
    that `why_not` finds no obstacle with; its gradient is that of `plain`.

    The kernel's thread blocks wait for one another, so it needs the GPU for itself: two calls that
    run at the same time, as of two processes under CUDA's MPS, could wait for ever.

    Args:
      attention: [N * H], what the heads found; or, if `can_attend`, what they attend to.
      x: [D], the residual stream. All in the weights' dtype.
      slots: from `new_slots`, or from the call before.
      turn: above 0, and another one in each call that has these slots.
      eps: of the norms.
      append: if `can_append`, and projections are the weights of queries, and of keys and values.
      is_last: whether only x is wanted.

    Returns:
      (x [D] for the next layer, its projections [P] one after the other, slots). With `append`:
      (x, queries [1, 1, N, H] rotated, keys, values, slots).
    """
    numbers = jnp.array([turn, int(not is_last)], jnp.int32)
    return _by_platform(attention, x, weights, append, slots, numbers, eps=eps)


# One jit for the module, so that equal calls, such as a model's layers, share one trace.
@functools.partial(jax.jit, static_argnames="eps")
def _by_platform(attention, x, weights, append, slots, numbers, *, eps):
    operands = attention, x, weights, append, slots, numbers
    leaves, structure = jax.tree.flatten(operands)

    def of_leaves(call):
        return lambda *leaves: call(*jax.tree.unflatten(structure, leaves), eps=eps)

    kernel, formula = of_leaves(_forward), of_leaves(plain)
    # Decided when it is lowered: a process with a GPU may compile a function for its CPU.
    return lax.platform_dependent(
        *leaves,
        cuda=lambda *leaves: with_plain_gradient(kernel, formula, leaves),
        default=formula,
    )


def plain(
    attention: Array | Attend, x: Array, weights: LayerWeights, append: Append | None,
    slots: Array, turn: Array, *, eps: float,
) -> tuple[Array, ...]:  # fmt: skip
    """`run` for any device. turn: of `layer_kernel.layer`."""
    weights = _matrices(weights)
    attended = _attended(attention) if isinstance(attention, Attend) else attention
    x, normed = _add_and_norm(x, attended @ weights.o, weights.mlp_scale, eps)
    gate, up = jnp.split(normed @ weights.gate_up, 2)
    hidden = jax.nn.silu(gate) * up
    x, normed = _add_and_norm(x, hidden @ weights.down, weights.next_scale, eps)
    projected = jnp.concatenate([normed @ weight for weight in weights.projections])
    if append is None:
        return x, projected, slots
    K, H = append.keys.shape[2:]
    heads = projected.reshape(1, 1, -1, H)
    q, kv = heads[:, :, : -2 * K], heads[:, :, -2 * K :].reshape(1, 1, 2, K, H)
    append = append._replace(slots=jnp.where(turn[1] == 0, -1, append.slots))
    return x, *rope_append.plainly(q, kv, *append), slots


def _attended(attend):
    out, _ = xla.attend(*attend, scale=attend.q.shape[3] ** -0.5)
    return out.astype(attend.q.dtype).reshape(-1)


def _add_and_norm(x, delta, scale, eps):
    rows = norm.plain(x[None, None], delta[None, None], scale, eps=eps)
    return tuple(row[0, 0] for row in rows)


# A jit of its own, so that one kernel serves calls of which all is wanted, and less, as the last.
@functools.partial(jax.jit, static_argnames="eps")
def _forward(attention, x, weights, append, slots, turn, *, eps):
    from jaxdecode.pallas_kernels import layer_attention, layer_kernel

    # Here, for outside of a jit each reshape would be a copy.
    weights = _matrices(weights)
    slots_ref, config = jax.new_ref(slots), _config(weights, eps, attention)
    if isinstance(attention, Attend):
        attention = layer_attention.Attend(*attention)._replace(q=attention.q[0, 0])
    run = functools.partial(layer_kernel.layer, attention, x, weights, turn, slots_ref)
    if append is None:
        return *run(None, config), jax.freeze(slots_ref)
    cos, sin = append.cos.reshape(-1), append.sin.reshape(-1)
    keys, values = (jax.new_ref(cache) for cache in (append.keys, append.values))
    x, q = run(
        layer_kernel.Append(
            jnp.concatenate([cos, cos]), jnp.concatenate([-sin, sin]), append.slots.reshape(1),
            keys, values,
        ),
        config,
    )  # fmt: skip
    q = q.reshape(1, 1, -1, append.keys.shape[3])
    return x, q, jax.freeze(keys), jax.freeze(values), jax.freeze(slots_ref)


def _matrices(weights):
    D = weights.mlp_scale.shape[0]
    return weights._replace(
        o=weights.o.reshape(-1, D),
        gate_up=weights.gate_up.reshape(D, -1),
        projections=tuple(weight.reshape(D, -1) for weight in weights.projections),
    )


def _config(weights, eps, attention=None):
    (NH, D), F = weights.o.shape, weights.down.shape[0]
    next_columns = tuple(weight.shape[1] for weight in weights.projections)
    K = attention.keys.shape[2] if isinstance(attention, Attend) else None
    return layer_config(D, F, NH, next_columns, eps, NUM_SMS, K)
