"""The LLaMA decoder in Flax NNX: LLaMA 1/2/3, CodeLlama, SmolLM2, Mistral.

B batch, T tokens in this call, V vocabulary, D model width, F feed-forward width, L layers,
N query heads, K KV heads, H head_dim. Weights stand input dimension first; fused ones keep the
fused axis apart, so that a sharded axis is never cut across two of its parts.

Over several devices the whole step runs inside `jax.shard_map`: below `Llama.__call__` every array
is this device's part, and `Step.sharding` sums and gathers by dimension letter. On one device these
do nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdecode.models import fused_layers
from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.kv_cache import KVCache, cache_tree
from jaxdecode.models.mailboxes import Mailboxes, open_mailboxes
from jaxdecode.models.params import param_letters, param_shapes
from jaxdecode.models.projection import project
from jaxdecode.models.rope import rope_table
from jaxdecode.models.sharding import Sharding
from jaxdecode.pallas_kernels import attend_part, decode_attention, merge_columns
from jaxdecode.pallas_kernels.peer import resume, side_by_side
from jaxdecode.pallas_kernels.rope_append import rotate_and_append

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Step:
    """What every layer of one call shares.

    Attributes:
      num_tokens: [B] int32, real tokens of each row in this call.
      slots: [B, T] int32, where they go in the cache, as `KVCache.slots` says.
      cos, sin: [B, T, 1, H / 2] rotations at the tokens' positions.
      implementation, num_splits: passed to decode_attention.
      sharding: how the arrays are cut.
      mailboxes: what sums of [B, T, D] and the parts of attention go through.
    """

    num_tokens: Array
    slots: Array
    cos: Array
    sin: Array
    implementation: str | None
    num_splits: int | None
    sharding: Sharding
    mailboxes: Mailboxes


class Partial(NamedTuple):
    """What each device has of a result [B, T, D]: yet to be summed over the devices that hold
    parts of these dimensions."""

    x: Array
    letters: str


class RMSNorm(nnx.Module):
    """Adds a result to x [B, T, D]. Returns the sum s, and s / rms(s) * scale.

    Residual and norm are one operation, on several GPUs together with the sum over them."""

    def __init__(self, config: LlamaConfig, dtype: Any):
        self.scale = nnx.Param(jnp.ones(config.embed_dim, dtype))
        self.eps = config.norm_eps

    def __call__(self, x: Array, result: Partial, step: Step) -> tuple[Array, Array]:
        scale = self.scale[...]
        return step.sharding.sum_and_norm(x, *result, scale, self.eps, step.mailboxes.sums)


class Attention(nnx.Module):
    """Rotary grouped-query attention against the cache, after appending its own tokens to it."""

    def __init__(self, config: LlamaConfig, layer: int, rngs: nnx.Rngs, dtype: Any):
        D, N, K, H = config.embed_dim, config.num_q_heads, config.num_kv_heads, config.head_dim
        self.q = _weight(rngs, (D, N, H), D, dtype)
        self.kv = _weight(rngs, (D, 2, K, H), D, dtype)
        self.o = _weight(rngs, (N, H, D), N * H, dtype)
        self.layer = layer
        self.window = config.window

    def __call__(self, q: Array, kv: Array, cache: KVCache, step: Step) -> tuple[Array, KVCache]:
        """What `project` returns attends to the cache: [B, T, N * H], before `output`."""
        q, cache = self.append(q, kv, cache, step)
        return self.attend(q, cache, step), cache

    def attend(self, q: Array, cache: KVCache, step: Step) -> Array:
        """What `append` returns attends to the cache."""
        out = self._attend(q, cache, step)
        return out.astype(q.dtype).reshape(*out.shape[:2], -1)

    def output(self, attended: Array) -> Partial:
        """The output projection."""
        o = self.o[...]
        # Flat, or XLA on CPU transposes the whole weight at each step.
        return Partial(project(attended, o.reshape(-1, o.shape[-1]))[0], "NH")

    def project(self, x: Array, step: Step) -> tuple[Array, Array]:
        """Queries [B, T, N, H], and keys and values [B, T, 2, K, H], of the new tokens."""
        q, kv = project(x, self.q[...], self.kv[...])
        if step.sharding.parts("H") > 1:  # together, for one collective
            (B, T, N, _), K = q.shape, kv.shape[3]
            heads = jnp.concatenate([q, kv.reshape(B, T, 2 * K, -1)], axis=2)
            heads = step.sharding.gather(heads, "H", dimension=3)
            q, kv = heads[:, :, :N], heads[:, :, N:].reshape(B, T, 2, K, -1)
        return q, kv

    def append(self, q: Array, kv: Array, cache: KVCache, step: Step) -> tuple[Array, KVCache]:
        """The queries rotated, and the cache with the new tokens."""
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        q, keys, values = rotate_and_append(q, kv, step.cos, step.sin, step.slots, keys, values)
        return q, cache.with_layer(self.layer, keys, values)

    def _attend(self, q: Array, cache: KVCache, step: Step) -> Array:
        """Attention to the cache: [B, T, N, H], or this device's columns of it."""
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        operands = q.astype(keys.dtype), keys, values, cache.lengths + step.num_tokens
        options: dict[str, Any] = {
            "q_start": cache.lengths,
            "window": self.window,
            "implementation": step.implementation,
            "num_splits": step.num_splits,
        }
        if cache.num_parts == 1:
            return decode_attention(*operands, **options)
        part = cache.part(step.sharding.index("S"))
        out, lse = attend_part(*operands, part, **options)
        return merge_columns(out, lse, step.sharding.axes("S"), step.mailboxes.merges)


class Mlp(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, dtype: Any):
        D, F = config.embed_dim, config.ffw_dim
        self.gate_up = _weight(rngs, (D, 2, F), D, dtype)
        self.down = _weight(rngs, (F, D), F, dtype)

    def __call__(self, x: Array) -> Partial:
        (gate_up,) = project(x, self.gate_up[...])
        hidden = jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]
        return Partial(project(hidden, self.down[...])[0], "F")


class Block(nnx.Module):
    """One layer: attention and feed-forward, each behind a norm and beside a residual.

    Takes the residual stream x and what the layer before adds to it; so does the layer after."""

    def __init__(self, config: LlamaConfig, layer: int, rngs: nnx.Rngs, dtype: Any):
        self.attn_norm = RMSNorm(config, dtype)
        self.attn = Attention(config, layer, rngs, dtype)
        self.mlp_norm = RMSNorm(config, dtype)
        self.mlp = Mlp(config, rngs, dtype)

    def __call__(
        self, x: Array, result: Partial, cache: KVCache, step: Step
    ) -> tuple[Array, Partial, KVCache]:
        x, normed = self.attn_norm(x, result, step)
        attended, cache = self.attn(*self.attn.project(normed, step), cache, step)
        return *self.finish(x, attended, step), cache

    def finish(self, x: Array, attended: Array, step: Step) -> tuple[Array, Partial]:
        """All behind the attention."""
        x, normed = self.mlp_norm(x, self.attn.output(attended), step)
        return x, self.mlp(normed)


class Llama(nnx.Module):
    """A LLaMA decoder. `Llama(config)` has random weights, `jaxdecode.load` reads real ones.

    Args:
      rngs: for the weights; nnx.Rngs(0) when None.
      dtype: of the weights; the configuration's own when None.
    """

    sharding: Sharding = Sharding()

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs | None = None, dtype: Any = None):
        rngs = nnx.Rngs(0) if rngs is None else rngs
        dtype = config.dtype if dtype is None else dtype
        D, V = config.embed_dim, config.vocab_size
        self.config = config
        self.embed = _weight(rngs, (V, D), D, dtype)
        self.layers = nnx.List([Block(config, i, rngs, dtype) for i in range(config.num_layers)])
        self.final_norm = RMSNorm(config, dtype)
        self.head = None if config.tie_embeddings else _weight(rngs, (D, V), D, dtype)

    def __call__(
        self, tokens: Array, cache: KVCache, *,
        num_tokens: Array | None = None,
        logits: Literal["all", "last"] = "all",
        implementation: str | None = None,
        num_splits: int | None = None,
        mailboxes: Mailboxes | None = None,
    ) -> tuple[Array, KVCache]:  # fmt: skip
        """Runs new tokens through the decoder and appends them to the cache.

        Args:
          tokens: [B, T] int32, right-padded. Row b's tokens stand at positions cache.lengths[b] on.
          cache: from `init_cache` or an earlier call; donate it to a jitted step.
          num_tokens: [B] integers in [0, T], real tokens of each row (0: idle). None: all T.
          logits: "all", or "last" for each row's last real token only.
          implementation, num_splits: as in `jaxdecode.decode_attention`.
          mailboxes: from `open_mailboxes`, for the calls of a loop. None: each call has its own.

        Returns:
          (logits [B, T, V] float32, or [B, 1, V] for "last"; cache, longer by num_tokens).

        Raises:
          ValueError, TypeError: the arguments do not fit each other or the model.
        """
        _check_call(self, tokens, cache, num_tokens, logits)
        B, T = tokens.shape
        # Clipped, so that a traced count can neither skip slots nor take tokens back.
        count = jnp.full(B, T, jnp.int32) if num_tokens is None else num_tokens
        num_tokens = jnp.clip(count, 0, T).astype(jnp.int32)
        options: dict[str, Any] = {
            "last": logits == "last", "implementation": implementation, "num_splits": num_splits,
        }  # fmt: skip
        if self.sharding.mesh is None:
            return self._run(Mailboxes(), tokens, cache, num_tokens, **options)
        return _run_sharded(*nnx.split(self), mailboxes, tokens, cache, num_tokens, **options)

    def _run(
        self, mailboxes: Mailboxes, tokens: Array, cache: KVCache, num_tokens: Array, *,
        last: bool, implementation: str | None, num_splits: int | None,
    ) -> tuple[Array, KVCache]:  # fmt: skip
        """The step on one device; logits [B, T or 1, V] of its part of the vocabulary."""
        T = tokens.shape[1]
        positions = cache.lengths[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
        cos, sin = rope_table(self.config, positions)
        slots = cache.slots(T, num_tokens, self.sharding.index("S"))
        step = Step(
            num_tokens, slots, cos, sin, implementation, num_splits, self.sharding, mailboxes
        )
        result = self._embed(tokens)
        x = jnp.zeros_like(result.x)
        if fused_layers.why_not(self.layers, x, step) is None:
            x, result, cache = fused_layers.run_layers(self.layers, x, result, cache, step)
        else:
            for block in self.layers:
                x, result, cache = block(x, result, cache, step)
        _, x = self.final_norm(x, result, step)
        if last and x.shape[1] > 1:
            x = jnp.take_along_axis(x, jnp.maximum(num_tokens - 1, 0)[:, None, None], axis=1)
        return self._logits(x), cache.advance(num_tokens)

    def _embed(self, tokens: Array) -> Partial:
        table = self.embed[...]
        if self.sharding.parts("V") == 1:
            return Partial(table[tokens], "V")
        row = tokens - self.sharding.index("V") * table.shape[0]
        # Each device looks up the tokens whose rows it has; the others add zeros.
        found = table.at[row].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        return Partial(found, "V")

    def _logits(self, x: Array) -> Array:
        if self.head is None:
            return jnp.einsum("btd,vd->btv", x, self.embed[...], preferred_element_type=jnp.float32)
        return jnp.einsum("btd,dv->btv", x, self.head[...], preferred_element_type=jnp.float32)

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the weights."""
        return self.embed[...].dtype

    def init_cache(self, batch_size: int, capacity: int, dtype: Any = None) -> KVCache:
        """An empty cache of `capacity` tokens per sequence, in the weights' dtype unless given."""
        dtype = dtype or self.dtype
        return KVCache.create(self.config, batch_size, capacity, dtype, self.sharding)

    def open_mailboxes(self, shape: tuple[int, ...]) -> Mailboxes:
        """For a loop of calls with tokens of this shape, inside the jitted function around it."""
        return open_mailboxes(self.config, self.sharding, shape, self.dtype)

    def params(self) -> dict[str, Array]:
        """The weights by dotted name, in the order of `param_shapes`."""
        flat = {_dotted(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(self))}
        return {name: flat[name] for name in param_shapes(self.config)}

    @classmethod
    def from_params(
        cls, config: LlamaConfig, params: Mapping[str, Array | np.ndarray],
        sharding: Sharding | None = None,
    ) -> Llama:  # fmt: skip
        """A model of given weights, named and shaped as in `param_shapes`; makes no random ones.

        With `sharding`, from `fit_mesh`, each weight should lie as `sharding.named` of its letters
        in `param_letters` says, or every step moves it there; NumPy arrays are put there.

        Raises:
          ValueError: a weight is missing, unknown or of another shape.
        """
        shapes = param_shapes(config)
        for name in sorted(shapes.keys() | params.keys()):
            found = params[name].shape if name in params else None
            if name not in shapes or found != shapes[name]:
                raise ValueError(f"parameter {name}: found {found}, expected {shapes.get(name)}")
        sharding, letters = sharding or Sharding(), param_letters(config)
        params = {
            name: sharding.place(x, letters[name]) if isinstance(x, np.ndarray) else x
            for name, x in params.items()
        }
        graph, state = nnx.split(nnx.eval_shape(lambda: cls(config)))
        flat = [
            (path, leaf.replace(params[_dotted(path)])) for path, leaf in nnx.to_flat_state(state)
        ]
        model = nnx.merge(graph, nnx.from_flat_state(flat))
        model.sharding = sharding
        return model


# A jit of its own: outside of any, shard_map compiles every operation at every call.
@partial(jax.jit, static_argnames=("graph", "last", "implementation", "num_splits"))
def _run_sharded(
    graph: Any, state: Any, mailboxes: Mailboxes | None, tokens: Array, cache: KVCache,
    num_tokens: Array, *, last: bool, implementation: str | None, num_splits: int | None,
) -> tuple[Array, KVCache]:  # fmt: skip
    """`Llama._run` on each device with its part of the weights, of the cache and of the batch."""
    model = nnx.merge(graph, state)
    sharding, letters = model.sharding, param_letters(model.config)
    flat, spec = nnx.to_flat_state(state), sharding.spec
    cache_specs = cache_tree(model.config, sharding.parts("S"), spec)
    mailboxes = model.open_mailboxes(tokens.shape) if mailboxes is None else mailboxes

    def run(leaves: list[Array], mailboxes: Mailboxes, *operands: Any) -> tuple[Array, KVCache]:
        parts = [(path, x.replace(leaf)) for (path, x), leaf in zip(flat, leaves, strict=True)]
        part = nnx.merge(graph, nnx.from_flat_state(parts))
        with resume(mailboxes) as own:
            return part._run(
                own, *operands, last=last, implementation=implementation, num_splits=num_splits
            )

    return jax.shard_map(
        run,
        mesh=sharding.mesh,
        in_specs=(
            [spec(letters[_dotted(path)]) for path, _ in flat],
            side_by_side(sharding.mesh), spec("BT"), cache_specs, spec("B"),
        ),
        out_specs=(spec("BTV"), cache_specs),
    )(
        # What a caller put on a mesh with Explicit axes would not be moved to its place.
        [x[...] for _, x in flat], mailboxes, sharding.constrain(tokens, "BT"), cache,
        sharding.constrain(num_tokens, "B"),
    )  # fmt: skip


def _check_call(
    model: Llama, tokens: Array, cache: KVCache, num_tokens: Array | None, logits: str
) -> None:
    if logits not in ("all", "last"):
        raise ValueError(f"logits must be 'all' or 'last', found {logits!r}")
    if getattr(tokens, "ndim", None) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        found = getattr(tokens, "shape", type(tokens).__name__)
        raise TypeError(f"tokens must be an integer array [batch, length], found {found}")
    B = tokens.shape[0]
    if cache.batch_size != B:
        raise ValueError(f"tokens has {B} rows but the cache {cache.batch_size}")
    layers, wanted = len(cache.keys), model.config.num_layers
    if layers != wanted:
        raise ValueError(f"the cache has {layers} layers but the model {wanted}")
    parts, wanted = cache.num_parts, model.sharding.parts("S")
    if parts != wanted:
        raise ValueError(
            f"the cache is cut into {parts} parts but the model's mesh wants {wanted}; "
            "make it with model.init_cache"
        )
    if num_tokens is not None and getattr(num_tokens, "shape", None) != (B,):
        found = getattr(num_tokens, "shape", num_tokens)
        raise ValueError(f"num_tokens must be an array of shape ({B},), found {found}")
    if num_tokens is not None and not jnp.issubdtype(num_tokens.dtype, jnp.integer):
        raise TypeError(f"num_tokens must be integers, found dtype {num_tokens.dtype}")


def _weight(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: Any) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * fan_in**-0.5)


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)
