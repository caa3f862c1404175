"""The steps of generation, compiled for shapes alone: no array of a model is made."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdecode.decode_loop import DecodeState, SplitModel, decode, prefill
from jaxdecode.memory import Workload
from jaxdecode.models.kv_cache import KVCache, cache_tree
from jaxdecode.models.llama import Llama
from jaxdecode.models.params import param_letters, param_shapes
from jaxdecode.models.sharding import Sharding, fit_mesh
from jaxdecode.sampling import SamplingArrays, SamplingParams


def make_sharding(config, sizes) -> Sharding:
    """On the machine's own devices; without sizes, on one."""
    if not sizes:
        return Sharding()
    devices = np.array(jax.devices()[: int(np.prod(list(sizes.values())))])
    return fit_mesh(config, Mesh(devices.reshape(tuple(sizes.values())), tuple(sizes)))


def compile_prefill(work: Workload, sharding: Sharding, step=prefill):
    model, state = _shapes(work, sharding)
    batch = state.cache.lengths.shape[0]
    tokens = jax.ShapeDtypeStruct((batch, work.prefill_step_size), jnp.int32)
    counts = jax.ShapeDtypeStruct((batch,), jnp.int32)
    lowered = step.lower(model.static, model.leaves, state, tokens, counts, implementation=None)
    return lowered.compile()


def compile_decode(work: Workload, sharding: Sharding, num_steps=8):
    model, state = _shapes(work, sharding)
    batch = state.cache.lengths.shape[0]
    # What takes the most memory: a sort of the logits.
    params = SamplingParams(temperature=1.0, top_p=0.5)
    sampling = jax.eval_shape(lambda: SamplingArrays.create(params, 0, [0] * batch))
    stop_ids = jax.ShapeDtypeStruct((16,), jnp.int32)
    return decode.lower(
        model.static, model.leaves, state, sampling, stop_ids,
        num_steps=num_steps, num_logprobs=5, implementation=None,
    ).compile()  # fmt: skip


def bytes_used(compiled) -> int:
    """On each device: what goes in, what comes out beside it, and what is needed in between."""
    stats = compiled.memory_analysis()
    made = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + made + stats.temp_size_in_bytes


def _shapes(work: Workload, sharding: Sharding) -> tuple[SplitModel, DecodeState]:
    def array(letters, shape, dtype):
        place = None if sharding.mesh is None else sharding.named(letters)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    config, batch = work.config, work.rows(sharding) * sharding.data
    letters, shapes = param_letters(config), param_shapes(config)
    params = {name: array(letters[name], shapes[name], work.dtype) for name in shapes}
    kv = (batch, work.capacity(sharding), config.num_kv_heads, config.head_dim)
    sizes = {"BSKH": (kv, work.cache_dtype or work.dtype), "B": ((batch,), jnp.int32)}
    cache: KVCache = cache_tree(
        config, sharding.parts("S"), lambda letters: array(letters, *sizes[letters])
    )
    state = DecodeState(
        cache=cache,
        logits=array("BD", (batch, config.vocab_size), jnp.float32),
        seen=array("BD", (batch, config.vocab_size), bool),
        remaining=array("B", (batch,), jnp.int32),
    )
    return SplitModel(Llama.from_params(config, params, sharding)), state
