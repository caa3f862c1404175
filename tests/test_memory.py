"""Planned bytes against the arrays that are made, and against the programs that XLA compiles."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from compiled_steps import bytes_used, compile_decode, compile_prefill, make_sharding

from jaxdecode.decode_loop import prefill
from jaxdecode.errors import RequestError
from jaxdecode.memory import Workload, needed, num_weights
from jaxdecode.models.config import PRESETS, LlamaConfig
from jaxdecode.models.kv_cache import KVCache
from jaxdecode.models.params import param_letters, param_shapes

SMALL = LlamaConfig(
    vocab_size=96, embed_dim=64, ffw_dim=128, num_layers=2, num_q_heads=8, num_kv_heads=4,
    head_dim=16,
)  # fmt: skip
VARIANTS = {
    "grouped": {},
    "tied": {"tie_embeddings": True},
    "multi-head": {"num_kv_heads": 8},
    "odd vocabulary": {"vocab_size": 97},
}
MESHES = {
    "one": {},
    "tensor=4": {"tensor": 4},
    "seq=8": {"seq": 8},
    "data=2,tensor=2,seq=2": {"data": 2, "tensor": 2, "seq": 2},
}


def on_first_device(tree) -> int:
    """Bytes that the first device holds of arrays that exist."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_and_cache_to_the_byte(variant, mesh):
    config = dataclasses.replace(SMALL, **VARIANTS[variant])
    sharding = make_sharding(config, MESHES[mesh])
    work = Workload(config=config, context=1000, batch=4, dtype="bfloat16", cache_dtype="float32")
    memory = needed(work, sharding, "gpu")

    letters = param_letters(config)
    weights = {
        name: jnp.zeros(shape, jnp.bfloat16, device=sharding.mesh and sharding.named(letters[name]))
        for name, shape in param_shapes(config).items()
    }
    assert memory.weights == on_first_device(weights)
    cache = KVCache.create(config, 4, 1000, "float32", sharding)
    assert memory.cache == on_first_device(cache)
    assert memory.total == memory.weights + memory.cache + memory.workspace


@pytest.mark.parametrize("name", PRESETS)
def test_weights_of_the_presets(name):
    config = PRESETS[name]
    one = make_sharding(config, {})
    assert num_weights(config, one) == config.num_parameters
    embed = 0 if config.tie_embeddings else config.vocab_size * config.embed_dim
    assert num_weights(config, one, read=True) == config.num_parameters - embed


def test_a_batch_that_the_mesh_does_not_divide_is_filled_up():
    sharding = make_sharding(SMALL, {"data": 4})
    three = Workload(config=SMALL, context=128, batch=3, dtype="float32")
    assert needed(three, sharding, "gpu") == needed(
        dataclasses.replace(three, batch=4), sharding, "gpu"
    )
    assert (
        needed(three, sharding, "gpu").cache
        < needed(dataclasses.replace(three, batch=5), sharding, "gpu").cache
    )


# The steps: what XLA's own analysis says that they need, for models of every kind of bulk.

WIDE = dataclasses.replace(PRESETS["llama-3.1-8b"], vocab_size=1024, bos_id=1, eos_ids=())
WORKLOADS = {
    "long prompts": (WIDE, {"num_layers": 2}, {"context": 8192, "prefill_step_size": 2048}, {}),
    "many layers": (
        SMALL, {"num_layers": 6, "embed_dim": 256, "head_dim": 64, "num_kv_heads": 8},
        {"context": 1024, "batch": 4, "prefill_step_size": 64}, {},
    ),
    "large vocabulary": (
        SMALL, {"vocab_size": 128_000}, {"context": 128, "batch": 64, "prefill_step_size": 16}, {},
    ),
    "large batch": (WIDE, {"num_layers": 1}, {"context": 1024, "batch": 32}, {}),
    "half precision": (WIDE, {"num_layers": 1}, {"context": 4096, "dtype": "bfloat16"}, {}),
    "narrow cache": (
        WIDE, {"num_layers": 1}, {"context": 32_768, "batch": 4, "cache_dtype": "bfloat16"}, {},
    ),
    "tensor=4": (WIDE, {"num_layers": 1}, {"context": 4096, "batch": 2}, {"tensor": 4}),
    "seq=8": (WIDE, {"num_layers": 1}, {"context": 4096, "batch": 2}, {"seq": 8}),
    "data=2,tensor=2,seq=2": (
        WIDE, {"num_layers": 1}, {"context": 4096, "batch": 2}, MESHES["data=2,tensor=2,seq=2"],
    ),
}  # fmt: skip


def planned(name, platform):
    """(workload, its sharding, memory) of one of WORKLOADS."""
    config, changes, sizes, mesh = WORKLOADS[name]
    config = dataclasses.replace(config, **changes)
    work = Workload(config=config, **{"dtype": "float32", "prefill_step_size": 256} | sizes)
    sharding = make_sharding(config, mesh)
    return work, sharding, needed(work, sharding, platform)


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_workspace_bounds_the_compiled_steps(name):
    work, sharding, memory = planned(name, "cpu")
    used = bytes_used(compile_prefill(work, sharding))
    if name in ("large vocabulary", "half precision"):  # where decoding takes more
        used = max(used, bytes_used(compile_decode(work, sharding)))
    # Tokens, counts and seeds go in too.
    assert memory.weights + memory.cache < used <= memory.total + 2**16
    # And it is no idle bound, but for the float32 copies that not every XLA makes.
    if min(work.itemsize, work.cache_itemsize) == 4:
        assert memory.workspace < 4 * (used - memory.weights - memory.cache)


def test_a_step_that_copies_the_cache_goes_over_the_bound():
    """Not donated, it stays beside the new one."""
    work, sharding, memory = planned("narrow cache", "cpu")
    work = dataclasses.replace(work, cache_dtype="float32")
    memory = needed(work, sharding, "cpu")
    keeping = jax.jit(prefill.__wrapped__, static_argnames=("static", "implementation"))
    assert bytes_used(compile_prefill(work, sharding, step=keeping)) > memory.total
    assert bytes_used(compile_prefill(work, sharding)) <= memory.total


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["codellama-34b", "llama-3.1-8b", "llama-2-7b"])
@pytest.mark.parametrize("prefill_step_size", [512, 8192])
def test_the_workspace_bounds_the_compiled_steps_on_a_gpu(name, dtype, prefill_step_size):
    config = dataclasses.replace(PRESETS[name], num_layers=4)
    work = Workload(config=config, context=65_536, dtype=dtype, prefill_step_size=prefill_step_size)
    sharding = make_sharding(config, {})
    memory = needed(work, sharding, jax.devices()[0].platform)
    for compile_step in (compile_prefill, compile_decode):
        used = bytes_used(compile_step(work, sharding))
        assert memory.weights + memory.cache < used <= memory.total + 2**16


def test_the_platforms_differ_in_what_they_add():
    work = Workload(config=WIDE, context=4096, dtype="bfloat16")
    one = make_sharding(WIDE, {})
    wide = 2 * (needed(work, one, "cpu").weights + needed(work, one, "cpu").cache)
    assert needed(work, one, "cpu").workspace > wide  # float32 copies
    assert needed(work, one, "gpu").workspace < wide


@pytest.mark.parametrize("name", ["context", "batch", "prefill_step_size"])
@pytest.mark.parametrize("value", [0, -1, 2**31, 2**40])
def test_numbers_out_of_range(name, value):
    sizes = {"context": 128} | {name: value}
    with pytest.raises(RequestError, match=f"{name} must be from 1 to 2147483647, found {value}"):
        Workload(config=SMALL, dtype="float32", **sizes)
