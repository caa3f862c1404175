"""Random weights: as random as they need to be, and no memory beside the result."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from test_decode_loop import compilations

from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.params import param_letters, param_shapes
from jaxdecode.models.random_model import random_array, random_model

CONFIG = LlamaConfig(
    vocab_size=212, embed_dim=96, ffw_dim=160, num_layers=2, num_q_heads=6, num_kv_heads=2
)


def test_weights_have_the_shapes_and_the_dtype_and_are_the_same_each_time():
    params = random_model(CONFIG).params()
    assert {name: x.shape for name, x in params.items()} == param_shapes(CONFIG)
    assert {str(x.dtype) for x in params.values()} == {"bfloat16"}
    again = random_model(CONFIG, "float32").params()
    for name, x in params.items():
        np.testing.assert_array_equal(x, again[name].astype(jnp.bfloat16))


def test_seeds_give_different_weights():
    one, two = (random_model(CONFIG, seed=seed).params() for seed in (1, 2))
    assert all((one[name] != two[name]).any() for name in one if "scale" not in name)


def test_no_two_weights_are_equal():
    params = random_model(CONFIG, "float32").params()
    first = [np.asarray(x).ravel()[:64] for name, x in params.items() if "scale" not in name]
    assert len({x.tobytes() for x in first}) == len(first)
    assert all((x == 1).all() for name, x in params.items() if "scale" in name)


def test_values_are_spread_evenly_and_do_not_follow_each_other():
    x, y = (np.asarray(random_array(np.uint32(i), (1 << 20,), "float32", 0.5)) for i in (3, 4))
    assert abs(x.mean()) < 2e-3
    assert abs(x.std() - 0.5) < 2e-3
    assert abs(x).max() <= 0.5 * 3**0.5
    counts, _ = np.histogram(x, bins=16)
    assert counts.max() < 1.02 * counts.min()
    for other in (y[1:], x[:-1]):
        assert abs(np.corrcoef(x[1:], other)[0, 1]) < 5e-3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_logits_are_finite_and_differ(dtype):
    model = random_model(CONFIG, dtype)
    call = jax.jit(lambda tokens, cache: model(tokens, cache)[0])
    logits = call(jnp.array([[1, 2, 3]]), model.init_cache(1, 3))
    assert jnp.isfinite(logits).all()
    assert jnp.std(logits) > 0.01


def test_making_a_weight_needs_no_memory_beside_it():
    lowered = random_array.lower(np.uint32(1), (4096, 2, 2048), jnp.dtype("bfloat16"), 0.1)
    assert lowered.compile().memory_analysis().temp_size_in_bytes == 0
    # jax.random, which this is not, does need some.
    other = jax.jit(lambda key: jax.random.normal(key, (4096, 2, 2048), jnp.bfloat16))
    analysis = other.lower(jax.random.key(0)).compile().memory_analysis()
    assert analysis.temp_size_in_bytes > 2**24


def test_each_device_makes_its_own_part_and_no_mesh_changes_a_value():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "tensor", "seq"))
    model, single = random_model(CONFIG, mesh=mesh, seed=5), random_model(CONFIG, seed=5)
    letters, expected = param_letters(CONFIG), single.params()
    for name, x in model.params().items():
        assert x.sharding.is_equivalent_to(model.sharding.named(letters[name]), x.ndim)
        np.testing.assert_array_equal(x, expected[name])
    place = model.sharding.named("D2F")
    lowered = random_array.lower(np.uint32(1), (256, 2, 512), jnp.dtype("bfloat16"), 0.1, place)
    program = lowered.compile()
    analysis = program.memory_analysis()
    assert analysis.output_size_in_bytes == 256 * 2 * 512 * 2 / 4
    assert analysis.temp_size_in_bytes < 100
    assert "all-" not in program.as_text()


def test_one_program_per_shape_is_compiled():
    config = LlamaConfig(
        vocab_size=223, embed_dim=88, ffw_dim=168, num_layers=5, num_q_heads=4, num_kv_heads=2
    )
    with compilations() as counts:
        random_model(config)
    # embed, q, kv, o, gate_up, down, head
    assert counts["jit(random_array)"] == 7
