"""The compiled steps of generation: prefill of one padded chunk, and decoding of several tokens.

Both are `jax.jit` over split model state (an `nnx.jit` would cost milliseconds a call), take the
cache donated, and compile once per (model, bucket, capacity, batch, dtype): sampling values are
traced.
B batch, T tokens of a chunk, V vocabulary, n tokens of a dispatch.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdecode.models.kv_cache import KVCache
from jaxdecode.models.llama import Llama
from jaxdecode.models.sharding import Sharding, choose_collectives
from jaxdecode.sampling import SamplingArrays, sample

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What one dispatch hands to the next.

    Attributes:
      cache: holds every token given or generated so far.
      logits: [B, V] float32 for each sequence's next token.
      seen: [B, V] bool, tokens of the prompt and those generated.
      remaining: [B] int32, tokens that each sequence may still generate; 0 once it has stopped.
    """

    cache: KVCache
    logits: Array
    seen: Array
    remaining: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodedTokens:
    """What one dispatch made, n tokens per sequence.

    Attributes:
      tokens: [n, B] int32, -1 where the sequence had stopped.
      finite: [n, B] bool, whether the logits that the token was drawn from were all finite.
      logprobs: [n, B] float32 of the token, before penalties and temperature; NaN where not finite.
      top_tokens, top_logprobs: [n, B, k], the k likeliest.
    """

    tokens: Array
    finite: Array
    logprobs: Array
    top_tokens: Array
    top_logprobs: Array


@dataclasses.dataclass(frozen=True)
class StaticModel:
    """All of a model but its arrays. Hashable, so that jit can key on it, which it does several
    times a call: the hash of a large model's graph takes milliseconds, so it is computed once."""

    graph: Any
    structure: Any
    sharding: Sharding

    @cached_property
    def _hash(self) -> int:
        return hash((self.graph, self.structure, self.sharding))

    def __hash__(self) -> int:
        return self._hash

    def merge(self, leaves: list[Array]) -> Llama:
        """The model with these arrays."""
        model = nnx.merge(self.graph, jax.tree.unflatten(self.structure, leaves))
        model.sharding = self.sharding
        return model


class SplitModel:
    """A model split into `static` and `leaves`, its arrays, for generation: nobody asks for a
    gradient there, so its collectives may be those that have none."""

    def __init__(self, model: Llama):
        graph, state = nnx.split(model)
        self.leaves, structure = jax.tree.flatten(state)
        sharding = model.sharding
        if sharding.mesh is not None and sharding.collectives is None:
            chosen, _ = choose_collectives(sharding.mesh)
            sharding = dataclasses.replace(sharding, collectives=chosen)
        self.static = StaticModel(graph, structure, sharding)


def start_state(model: Llama, cache: KVCache, remaining: np.ndarray) -> DecodeState:
    """The state before prefill, which fills in logits and seen; remaining is [B] int32."""
    shape = (cache.batch_size, model.config.vocab_size)
    place = model.sharding.place
    return DecodeState(
        cache=cache,
        logits=place(np.zeros(shape, np.float32), "BD"),
        seen=place(np.zeros(shape, bool), "BD"),
        remaining=place(remaining, "B"),
    )


@partial(jax.jit, static_argnames=("static", "implementation"), donate_argnames=("state",))
def prefill(
    static: StaticModel, leaves: list[Array], state: DecodeState, tokens: Array, num_tokens: Array,
    *, implementation: str | None,
) -> DecodeState:  # fmt: skip
    """Runs one chunk of the prompts, tokens [B, T] right-padded; rows without tokens stay as is."""
    logits, cache = static.merge(leaves)(
        tokens, state.cache, num_tokens=num_tokens, logits="last", implementation=implementation
    )
    logits = static.sharding.constrain(logits[:, 0], "BD")
    real = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :] < num_tokens[:, None]
    return dataclasses.replace(
        state,
        cache=cache,
        logits=jnp.where((num_tokens > 0)[:, None], logits, state.logits),
        seen=_mark(state.seen, tokens, real),
    )


@partial(
    jax.jit,
    static_argnames=("static", "num_steps", "num_logprobs", "implementation", "num_splits"),
    donate_argnames=("state",),
)
def decode(
    static: StaticModel, leaves: list[Array], state: DecodeState, sampling: SamplingArrays,
    stop_ids: Array, *, num_steps: int, num_logprobs: int, implementation: str | None,
    num_splits: int | None = None,
) -> tuple[DecodeState, DecodedTokens]:  # fmt: skip
    """Generates `num_steps` tokens per sequence in one loop on the device.

    The trip count is static: a loop that ends on a value would ask the host at each step. Sequences
    that have stopped stay idle. Every token drawn is run, so the cache can always be continued.

    Args:
      stop_ids: [E] int32 ids that end a sequence, padded with -1.
      implementation, num_splits: of attention, see `jaxdecode.decode_attention`.
    """

    V = state.logits.shape[1]
    mailboxes = static.merge(leaves).open_mailboxes((state.cache.batch_size, 1))
    # Looked up in the loop, for there a comparison with each id would be a kernel of its own.
    ends = jnp.zeros(V, bool).at[stop_ids].set(True, mode="drop", wrap_negative_indices=False)

    def step(state: DecodeState, _: None) -> tuple[DecodeState, Array]:
        # Merged inside the step: modules made outside belong to another trace level.
        model = static.merge(leaves)
        active = state.remaining > 0
        token = sample(state.logits, state.seen, state.cache.lengths, sampling)
        made = jnp.where(active, token, -1)
        described = _describe(state.logits, token, made, num_logprobs, static.sharding)
        logits, cache = model(
            token[:, None], state.cache, num_tokens=active.astype(jnp.int32), logits="last",
            implementation=implementation, num_splits=num_splits, mailboxes=mailboxes,
        )  # fmt: skip
        # Each device samples from whole rows.
        logits = static.sharding.constrain(logits[:, 0], "BD")
        state = DecodeState(
            cache=cache,
            logits=jnp.where(active[:, None], logits, state.logits),
            # In a loop on a GPU, a scatter of one token is three kernels.
            seen=state.seen | jax.nn.one_hot(made, V, dtype=bool),
            remaining=jnp.where(active & ~ends[token], state.remaining - 1, 0),
        )
        return state, described

    state, described = jax.lax.scan(step, state, None, length=num_steps)
    # Whole in every process, for the host to read.
    return state, _decoded_tokens(static.sharding.constrain(described, ""))


def _mark(seen: Array, tokens: Array, real: Array) -> Array:
    """seen [B, V] with tokens [B, T] marked where real; the others fall off the end."""
    # By rows, so that devices which hold some of the rows need nothing of the others.
    mark = jax.vmap(lambda row, ids: row.at[ids].set(True, mode="drop"))
    return mark(seen, jnp.where(real, tokens, seen.shape[1]))


def _describe(
    logits: Array, token: Array, made: Array, num_logprobs: int, sharding: Sharding
) -> Array:
    """[B, 2, 1 + k] int32: the token made and the k likeliest, and the bits of their logprobs. In
    one array, for each that the loop fills is a kernel more."""
    # A logit that is not finite makes all of them NaN, so that nothing else need look for it.
    normalizer = jax.nn.logsumexp(
        jnp.where(jnp.isfinite(logits), logits, jnp.nan), axis=-1, keepdims=True
    )
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)
    likeliest = partial(jax.lax.top_k, k=min(num_logprobs, logits.shape[-1]))
    if sharding.mesh is not None:  # XLA would gather all rows: it does not cut this operation
        rows = sharding.spec("BD")
        likeliest = jax.shard_map(likeliest, mesh=sharding.mesh, in_specs=rows, out_specs=rows)
    top_logits, top_tokens = likeliest(logits)
    tokens = jnp.concatenate([made[:, None], top_tokens], axis=-1)
    logprobs = jnp.concatenate([chosen, top_logits], axis=-1) - normalizer
    return jnp.stack([tokens, jax.lax.bitcast_convert_type(logprobs, jnp.int32)], axis=1)


def _decoded_tokens(described: Array) -> DecodedTokens:
    """From what `_describe` made of each step, [n, B, 2, 1 + k]."""
    tokens, bits = described[:, :, 0], described[:, :, 1]
    logprobs = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return DecodedTokens(
        tokens=tokens[:, :, 0],
        finite=~jnp.isnan(logprobs[:, :, 0]),
        logprobs=logprobs[:, :, 0],
        top_tokens=tokens[:, :, 1:],
        top_logprobs=logprobs[:, :, 1:],
    )
