"""What a compiled step exchanges between devices: read from its HLO, to the last collective."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from meshes import collectives, copies, make_mesh, sharded_model, size_name, step_collectives
from naive_llama import CONFIG

from jaxdecode.decode_loop import SplitModel, decode, start_state
from jaxdecode.models.llama import Llama
from jaxdecode.sampling import SamplingArrays, SamplingParams

# A batch and a capacity that no weight has.
B, CAPACITY = 6, 5 * 1024
GROUPED_QUERY = dataclasses.replace(CONFIG, num_q_heads=8, num_kv_heads=4, head_dim=8)
ONE = (1, 1, 1)
MESHES = [ONE, (2, 1, 1), (1, 4, 1), (1, 1, 4), (1, 2, 2), (2, 2, 2)]


def model_on(sizes, **changes) -> Llama:
    return sharded_model(dataclasses.replace(GROUPED_QUERY, **changes), make_mesh(sizes))


def layer_shape(model: Llama) -> tuple[int, ...]:
    """Of one layer's keys on one device."""
    cache = model.init_cache(B, CAPACITY)
    return cache.keys[0].addressable_data(0).shape


def step_hlo(
    model: Llama, T: int = 1, *, donate: bool = True, after=lambda logits, cache: ()
) -> str:
    """The compiled step, with whatever `after` makes of its results."""
    graph, state = nnx.split(model)

    def step(state, tokens, cache):
        logits, new = nnx.merge(graph, state)(tokens, cache)
        return logits, new, after(logits, new)

    cache, place = model.init_cache(B, CAPACITY), model.sharding.place
    jitted = jax.jit(step, donate_argnums=2 if donate else ())
    return jitted.lower(state, place(np.zeros((B, T), np.int32), "BT"), cache).compile().as_text()


@pytest.mark.parametrize("sizes", MESHES, ids=size_name)
def test_a_step_exchanges_what_it_should_and_copies_no_cache(sizes):
    model = model_on(sizes)
    hlo = step_hlo(model)
    assert collectives(hlo) == step_collectives(model.config, model.sharding, B, 1)
    layer = layer_shape(model)
    assert math.prod(layer) * model.sharding.num_devices == B * CAPACITY * 4 * 8
    assert f"f32[{','.join(map(str, layer))}]" in hlo
    assert copies(hlo, layer) == []
    # Keys and values of each layer, and the lengths.
    assert hlo.splitlines()[0].count("alias)") == 2 * model.config.num_layers + 1


@pytest.mark.parametrize(
    ("sizes", "T", "changes"),
    [
        ((1, 2, 2), 5, {}),
        ((1, 2, 2), 1, {"num_layers": 1, "vocab_size": 66}),
        ((1, 2, 2), 1, {"num_layers": 3, "tie_embeddings": True, "window": 200}),
    ],
    ids=["several tokens", "whole vocabulary", "tied, window"],
)
def test_variants_exchange_what_they_should(sizes, T, changes):
    model = model_on(sizes, **changes)
    hlo = step_hlo(model, T)
    assert collectives(hlo) == step_collectives(model.config, model.sharding, B, T)
    assert copies(hlo, layer_shape(model)) == []


def test_what_is_exchanged_does_not_grow_with_the_cache():
    model = model_on((2, 2, 2))
    largest = max(size for _, size in step_collectives(model.config, model.sharding, B, 1))
    assert largest < math.prod(layer_shape(model)) / 100


# Planted faults
def gathered_cache(logits, cache):
    return jax.lax.with_sharding_constraint(cache.keys[0], model_on((1, 2, 2)).sharding.named(""))


def summed_once_more(logits, cache):
    mesh = model_on((1, 2, 2)).sharding.mesh
    over = functools.partial(jax.lax.psum, axis_name="seq")
    return jax.shard_map(over, mesh=mesh, in_specs=P("seq"), out_specs=P())(logits[0, 0])


@pytest.mark.parametrize(
    ("fault", "kind"),
    [(gathered_cache, "all-gather"), (summed_once_more, "all-reduce")],
    ids=["cache", "sum"],
)
def test_the_count_sees_planted_collectives(fault, kind):
    model = model_on((1, 2, 2))
    expected = step_collectives(model.config, model.sharding, B, 1)
    found = collectives(step_hlo(model, after=fault))
    more = [x for x in found if found.count(x) > expected.count(x)]
    assert kind in {name for name, _ in more}
    largest = max(size for _, size in more)
    assert (largest >= math.prod(layer_shape(model))) == (fault is gathered_cache)


@pytest.mark.parametrize("sizes", [ONE, (1, 2, 2)], ids=size_name)
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_the_search_sees_the_copies_of_a_cache_that_is_kept(sizes):
    model = model_on(sizes)
    hlo = step_hlo(model, donate=False)
    assert len(copies(hlo, layer_shape(model))) >= 2 * model.config.num_layers


# The loop over tokens
STEPS = 4


def loop_hlo(model: Llama, num_logprobs: int) -> str:
    split = SplitModel(model)
    state = start_state(model, model.init_cache(B, CAPACITY), np.full(B, 30, np.int32))
    sampling = SamplingArrays.create(SamplingParams(), 0, [0] * B)
    return decode.lower(
        split.static, split.leaves, state, sampling, np.full(16, -1, np.int32),
        num_steps=STEPS, num_logprobs=num_logprobs, implementation=None,
    ).compile().as_text()  # fmt: skip


@pytest.mark.parametrize("num_logprobs", [0, 3])
@pytest.mark.parametrize("sizes", [(1, 2, 2), (2, 2, 2)], ids=size_name)
def test_generating_adds_one_exchange_of_logits(sizes, num_logprobs):
    model = model_on(sizes)
    hlo = loop_hlo(model, num_logprobs)
    expected = step_collectives(model.config, model.sharding, B, 1)
    expected += [("all-gather", B // sizes[0] * model.config.vocab_size)]
    if sizes[0] > 1:  # once, for the host: tokens made and the likeliest, and log-probabilities
        expected += [("all-gather", STEPS * B * 2 * (1 + num_logprobs))]
    assert collectives(hlo) == sorted(expected)
    assert copies(hlo, layer_shape(model)) == []
