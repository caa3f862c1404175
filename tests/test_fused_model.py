"""A decoder with fused layers: that it says the same as without them, and which steps are fused."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
from naive_llama import naive_logits
from test_fused_layer import distance, kernels_in, pretend_gpu, traced, with_kernels

from jaxdecode.models import fused_layers
from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.llama import Llama
from jaxdecode.models.random_model import random_model
from jaxdecode.models.sharding import Sharding, fit_mesh
from jaxdecode.pallas_kernels import fused_layer

__all__ = ["pretend_gpu", "traced"]  # fixtures

CONFIG = LlamaConfig(
    vocab_size=64, embed_dim=512, num_layers=3, num_q_heads=4, num_kv_heads=2, head_dim=128,
    ffw_dim=768, dtype="bfloat16",
)  # fmt: skip
# To whose caches the layers' kernel attends too.
WHOLE = dataclasses.replace(CONFIG, num_q_heads=8, num_kv_heads=4)


def make_model(config: LlamaConfig = CONFIG) -> Llama:
    """With other scales in each norm."""
    rng, model = np.random.default_rng(0), random_model(config)
    params = {
        name: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype) if name.endswith("scale") else x
        for name, x in model.params().items()
    }
    return Llama.from_params(config, params)


TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def step_by_step(model: Llama):
    """Logits [tokens, V] of TOKENS one after the other, and the cache with them."""
    graph, state = nnx.split(model)
    step = jax.jit(lambda state, token, cache: nnx.merge(graph, state)(token, cache))
    cache, rows = model.init_cache(1, 16), []
    for token in TOKENS:
        logits, cache = step(state, jnp.full((1, 1), token, jnp.int32), cache)
        rows.append(np.asarray(logits[0, 0]))
    return np.stack(rows), cache


def assert_close(found, rival, exact):
    """The tolerance of the project, for a decoder: its errors are at most twice those of the same
    one without fused layers."""
    error, allowed = abs(found - exact), abs(rival - exact)
    assert error.max() <= 2 * allowed.max() + 1e-5
    assert error.mean() <= 1.5 * allowed.mean() + 1e-6


@pytest.mark.parametrize("config", [CONFIG, WHOLE], ids=["layers", "whole"])
def test_a_model_says_the_same_with_and_without(monkeypatch, traced, config):
    model, calls = make_model(config), []
    run = fused_layer.run

    def counted(attention, *args, **options):
        calls.append((args[3], isinstance(attention, fused_layer.Attend)))
        return run(attention, *args, **options)

    monkeypatch.setattr(fused_layer, "run", counted)
    expected, cache = step_by_step(model)
    assert calls == []
    monkeypatch.setattr(fused_layers, "why_not", lambda *_: None)
    found, filled = step_by_step(model)
    assert calls == [(turn, config is WHOLE) for turn in (1, 2, 3)]
    exact = naive_logits(model.params(), config, TOKENS)
    assert_close(found, expected, exact)
    assert abs(found - expected).max() <= 1e-2 * abs(exact).max()
    assert filled.lengths.tolist() == cache.lengths.tolist() == [len(TOKENS)]
    jax.tree.map(lambda x, y: np.testing.assert_equal(x.dtype, y.dtype), filled, cache)
    assert max(map(distance, (*filled.keys, *filled.values), (*cache.keys, *cache.values))) <= 1e-2


def test_the_comparison_of_models_sees_weights_of_another_layer(monkeypatch, traced):
    model = make_model()
    expected, _ = step_by_step(model)
    between = fused_layers._weights_between
    monkeypatch.setattr(fused_layers, "_weights_between", lambda block, _: between(block, block))
    monkeypatch.setattr(fused_layers, "why_not", lambda *_: None)
    found, _ = step_by_step(model)
    with pytest.raises(AssertionError):
        assert_close(found, expected, naive_logits(model.params(), CONFIG, TOKENS))


def test_which_steps_are_fused(pretend_gpu):
    model, one = make_model(), jnp.zeros((1, 1, CONFIG.embed_dim), jnp.bfloat16)
    step = types.SimpleNamespace(sharding=Sharding(), num_tokens=jnp.ones(1, jnp.int32))
    assert fused_layers.why_not(model.layers, one, step) is None
    for five in (jnp.tile(one, (1, 5, 1)), jnp.tile(one, (5, 1, 1))):
        assert "one token, not 5" in fused_layers.why_not(model.layers, five, step)
    assert "one layer" in fused_layers.why_not(model.layers[:1], one, step)
    sharded = types.SimpleNamespace(sharding=fit_mesh(CONFIG, make_mesh((1, 2, 1))))
    assert "on a mesh" in fused_layers.why_not(model.layers, one, sharded)
    wide = random_model(CONFIG, "float32")
    assert "embedding is bfloat16" in fused_layers.why_not(wide.layers, one, step)
    assert "['float32']" in fused_layers.why_not(wide.layers, one.astype("float32"), step)


def test_rows_dealt_by_shard_map_are_not_fused():
    """The kernel's slots belong to one device."""
    model = make_model()
    graph, state = nnx.split(model)
    mesh = make_mesh((2, 1, 1))

    def step(state, token, cache):
        return nnx.merge(graph, state)(token, cache, implementation="xla")[0]

    specs = P(), P("data"), P("data")
    dealt = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P("data"))
    tokens = jnp.array([[3], [5]], jnp.int32)
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        why_not = fused_layers.why_not
        patch.setattr(
            fused_layers, "why_not", lambda *args: (seen.append(why_not(*args)), seen[-1])[1]
        )
        jax.jit(dealt).trace(state, tokens, model.init_cache(2, 128))
    assert seen == ["the step is inside shard_map and differs between devices"]


def kernels_of_a_step(model: Llama, implementation: str | None = "xla") -> tuple[int, int]:
    graph, state = nnx.split(model)

    def step(state, token, cache):
        return nnx.merge(graph, state)(token, cache, implementation=implementation)

    one = jnp.zeros((1, 1), jnp.int32)
    return kernels_in(step, state, one, model.init_cache(1, 128))


@with_kernels
def test_layers_share_a_lowering(monkeypatch, pretend_gpu):
    monkeypatch.setattr(fused_layers, "why_not", lambda *_: None)
    model, deeper = (make_model(dataclasses.replace(CONFIG, num_layers=n)) for n in (3, 5))
    count, layers = kernels_of_a_step(model)
    assert layers == 1
    assert kernels_of_a_step(deeper) == (count, 1)
    # The count sees a layer of another kind, and that there is none.
    model.layers[0].mlp_norm.eps = 1e-3
    assert kernels_of_a_step(model)[1] == 2
    monkeypatch.setattr(fused_layers, "why_not", lambda *_: "not here")
    assert kernels_of_a_step(model)[1] == 0


@with_kernels
def test_a_step_has_no_kernels_that_only_attend(pretend_gpu):
    """Beside the layers' there are the first layer's norm and what rotates and appends. Where the
    layers' kernel cannot attend, two more split the cache and combine the parts."""
    assert kernels_of_a_step(make_model(WHOLE), None) == (3, 1)
    assert kernels_of_a_step(make_model(CONFIG), None) == (5, 1)
