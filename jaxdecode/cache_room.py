"""The cache of one call of generation: checked if it was given, made if it was not."""

from __future__ import annotations

import jax

from jaxdecode.errors import RequestError
from jaxdecode.models.kv_cache import KVCache
from jaxdecode.models.llama import Llama


def filled_lengths(model: Llama, cache: KVCache) -> list[int]:
    """Tokens in each row of a given cache, after checking that it is usable and the model's own."""
    refuse_donated(cache)
    config = model.config
    expected = (config.num_layers, config.num_kv_heads, config.head_dim)
    found = (len(cache.keys), *cache.keys[0].shape[2:])
    if found != expected:
        raise RequestError(
            f"cache has (layers, KV heads, head_dim) = {found}, but the model {expected}; "
            "make it with model.init_cache(batch_size, capacity)"
        )
    place, weights = cache.keys[0].sharding, model.embed[...].sharding
    if model.sharding.mesh is None:
        # Under `jax.set_mesh` what a step makes is on all of its devices, whole.
        whole = place.num_devices == weights.num_devices or place.is_fully_replicated
        fits = cache.num_parts == 1 and whole
    else:
        fits = place.is_equivalent_to(model.sharding.named("BSKH"), 4)
    if not fits:
        raise RequestError(
            f"the cache lies on {_shown(place)}, but the model on {_shown(weights)}; "
            "make it with model.init_cache(batch_size, capacity)"
        )
    return model.sharding.fetch(cache.lengths).tolist()


def refuse_donated(cache: KVCache) -> None:
    """Raises RequestError if an earlier call wrote into this cache; a part of it, such as its
    lengths, may be newer than that."""
    if any(array.is_deleted() for array in jax.tree.leaves(cache)):
        raise RequestError(
            "cache was donated to an earlier call; use the cache in that call's results"
        )


def _shown(place: jax.sharding.Sharding) -> str:
    if not isinstance(place, jax.sharding.NamedSharding):
        return f"{place.num_devices} device(s) without a mesh"
    sizes = ", ".join(f"{axis}={size}" for axis, size in place.mesh.shape.items())
    return f"the mesh {sizes}"


def room_for(
    model: Llama,
    prompts: list[list[int]],
    idle: int,
    max_tokens: int,
    cache: KVCache | None,
    filled: list[int],
) -> KVCache:
    """The cache to use, after checking that every prompt and its tokens fit."""
    rows = len(prompts) + idle
    if cache is None:
        needed = max(map(len, prompts)) + max_tokens
        limit = model.config.max_positions
        if needed > limit:
            raise RequestError(
                f"a prompt of {needed - max_tokens} tokens and max_tokens={max_tokens} exceed the "
                f"{limit} positions the model was trained for; shorten one of them, or pass "
                f"cache=model.init_cache({rows}, {needed}) to go beyond"
            )
        # Sizes in steps, so that similar requests share a compilation.
        capacity = 1 << (needed - 1).bit_length() if needed <= 1024 else -(-needed // 1024) * 1024
        return model.init_cache(rows, capacity)
    if len(filled) != rows:
        fill = f", which take {rows} rows on a mesh with data={model.sharding.data}" if idle else ""
        raise RequestError(
            f"cache has {len(filled)} rows but there are {len(prompts)} prompts{fill}"
        )
    if any(filled[len(prompts) :]):
        raise RequestError(
            f"the cache holds tokens in more than {len(prompts)} of its {rows} rows, but there are "
            f"{len(prompts)} prompts; give one for each row that holds tokens"
        )
    for have, prompt in zip(filled, prompts, strict=False):
        if have + len(prompt) + max_tokens > cache.capacity:
            raise RequestError(
                f"the cache holds {have} tokens of its capacity {cache.capacity}; a prompt of "
                f"{len(prompt)} tokens and max_tokens={max_tokens} do not fit; shorten one of them "
                f"or make a larger cache with model.init_cache({rows}, capacity)"
            )
    return cache
