"""Which steps attend inside the layers' kernel: what is told beforehand is what a step does."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from meshes import make_mesh
from test_fused_model import CONFIG, WHOLE

from jaxdecode.models import llama
from jaxdecode.models.config import PRESETS
from jaxdecode.models.inner_attention import attends_in_layers
from jaxdecode.models.random_model import random_model
from jaxdecode.models.sharding import fit_mesh
from jaxdecode.pallas_kernels import fused_layer


class Ran(Exception):
    """Raised in place of the layers' kernel, with whether it would attend."""


@pytest.fixture
def on_gpu(monkeypatch):
    """As on a GPU that has the layers' kernel. No other kernel is traced."""
    monkeypatch.setattr(fused_layer, "why_not_here", lambda: None)


@pytest.fixture
def steps(monkeypatch, on_gpu):
    """steps(config, dtype, batch): whether a decode step attends in the layers' kernel."""

    def run(attention, *_, **__):
        raise Ran(isinstance(attention, fused_layer.Attend))

    monkeypatch.setattr(fused_layer, "run", run)
    monkeypatch.setattr(llama, "decode_attention", lambda q, *_, **__: q)

    def attends(config, dtype, batch):
        model = random_model(config, dtype)
        tokens = jnp.zeros((batch, 1), jnp.int32)
        try:
            jax.eval_shape(lambda x, cache: model(x, cache), tokens, model.init_cache(batch, 128))
        except Ran as ran:
            return ran.args[0]
        return False

    return attends


# The configuration, the weights' dtype, how many sequences, and whether their step attends there.
STEPS = {
    "inside": (WHOLE, "bfloat16", 1, True),
    "inside, float16": (WHOLE, "float16", 1, True),
    "two layers": (dataclasses.replace(WHOLE, num_layers=2), "bfloat16", 1, True),
    "one layer": (dataclasses.replace(WHOLE, num_layers=1), "bfloat16", 1, False),
    "two sequences": (WHOLE, "bfloat16", 2, False),
    "float32": (WHOLE, "float32", 1, False),
    "few heads": (CONFIG, "bfloat16", 1, False),
    "many heads a group": (dataclasses.replace(WHOLE, num_q_heads=16, num_kv_heads=1),
                           "bfloat16", 1, False),
    "narrow heads": (dataclasses.replace(WHOLE, num_q_heads=16, head_dim=64), "bfloat16", 1, False),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_what_is_told_is_what_a_step_does(steps, name):
    config, dtype, batch, expected = STEPS[name]
    assert attends_in_layers(config, dtype, batch=batch) == expected
    assert steps(config, dtype, batch) == expected


def test_not_on_a_mesh(on_gpu):
    assert not attends_in_layers(WHOLE, "bfloat16", fit_mesh(WHOLE, make_mesh((1, 2, 1))))


@pytest.mark.parametrize("name", ["llama-3.1-8b", "codellama-34b", "llama-2-7b"])
def test_large_models_attend_there_on_a_gpu_and_not_here(monkeypatch, name):
    assert not attends_in_layers(PRESETS[name], "bfloat16")
    monkeypatch.setattr(fused_layer, "why_not_here", lambda: None)
    assert attends_in_layers(PRESETS[name], "bfloat16")
