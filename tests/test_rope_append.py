"""Rotating and appending in one kernel: interpreted on the CPU with race detection, and lowered.

conftest.py leaves this file out where jax has no interpreter for it (before 0.11.2).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from kernel_runs import interpreted, lowered_for_cuda

from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.llama import Llama
from jaxdecode.models.sharding import fit_mesh
from jaxdecode.pallas_kernels import flash_decode, rope_append
from jaxdecode.pallas_kernels.rope_append import plainly, rotate_and_append, why_not

KERNEL = "custom_call @mosaic_gpu"
S = 128
# Full rows, the last slots and those past the end, padding, and none at all.
SLOTS = np.array([[5, 6, 7, 8], [S - 2, S - 1, S, S + 1], [-1, 9, S + 9, -7], [-1, S, -3, S + 3]])
CONFIG = LlamaConfig(
    vocab_size=64, embed_dim=64, num_layers=2, num_q_heads=4, num_kv_heads=2, head_dim=128,
    ffw_dim=64, dtype="bfloat16",
)  # fmt: skip


@pytest.fixture(autouse=True)
def pretend_gpu(monkeypatch):
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: None)


@pytest.fixture
def through_kernel(monkeypatch):
    """As when it is compiled for a GPU: on the CPU for the interpreter."""
    monkeypatch.setattr(rope_append, "_by_platform", rope_append._with_kernel)


def operands(B=2, T=3, N=4, K=2, H=128, dtype=jnp.bfloat16, cache_dtype=jnp.bfloat16, slots=SLOTS):
    """Of `rotate_and_append`, with NaN in every slot of the caches that is not written."""
    rng = np.random.default_rng(0)
    q, kv = (jnp.asarray(rng.normal(size=(B, T, *x, H)), dtype) for x in ((N,), (2, K)))
    angle = 100 * rng.normal(size=(B, T, 1, H // 2)).astype(np.float32)
    caches = (jnp.full((B, S, K, H), jnp.nan, cache_dtype) for _ in range(2))
    return q, kv, np.cos(angle), np.sin(angle), jnp.asarray(slots[:B, :T], jnp.int32), *caches


def shapes(*args):
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands(*args)]


def assert_same(found, expected, dtype):
    """The same but where a multiplication and an addition in one operation, or not, decided how a
    value was rounded."""
    for x, y in zip(found, expected, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert np.mean(x != y, where=~np.isnan(y)) < 0.01
        np.testing.assert_allclose(x, y, rtol=float(jnp.finfo(dtype).eps), atol=1e-6)


def assert_same_bits(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_array_equal(*(np.asarray(z).view(f"u{z.dtype.itemsize}") for z in (x, y)))


@pytest.mark.parametrize(
    ("B", "T", "N", "K", "H", "dtype", "cache_dtype"),
    [
        (1, 1, 4, 4, 128, "bfloat16", "bfloat16"),
        (4, 2, 8, 1, 256, "float16", "float16"),
        (2, 4, 9, 3, 128, "bfloat16", "float32"),
        (4, 3, 16, 8, 128, "float16", "bfloat16"),
        (4, 4, 2, 2, 384, "bfloat16", "float16"),
    ],
)
def test_interpreted_it_rounds_as_the_plain_formula(
    interpreter, through_kernel, B, T, N, K, H, dtype, cache_dtype
):
    arguments = operands(B, T, N, K, H, dtype, cache_dtype)
    found, expected = rotate_and_append(*arguments), plainly(*arguments)
    assert_same(found, expected, dtype)
    assert_same_bits(found[2:], expected[2:])


def test_only_real_slots_are_written(interpreter, through_kernel):
    _, keys, values = rotate_and_append(*operands(4, 4))
    for cache in (keys, values):
        written = np.isfinite(np.asarray(cache, np.float32)).all(axis=(2, 3))
        assert [np.flatnonzero(row).tolist() for row in written] == [
            [5, 6, 7, 8], [S - 2, S - 1], [9], [],
        ]  # fmt: skip


def test_gradient_is_that_of_the_plain_formula(through_kernel):
    q, kv, cos, sin, slots, keys, values = operands(cache_dtype=jnp.float32)
    arrays = q, kv, jnp.asarray(cos), jnp.asarray(sin), *(jnp.ones_like(x) for x in (keys, values))

    def loss(append, q, kv, cos, sin, keys, values):
        results = append(q, kv, cos, sin, slots, keys, values)
        return sum(jnp.sum(jnp.sin(x.astype(jnp.float32) * (i + 1))) for i, x in enumerate(results))

    def gradient(append):
        return jax.grad(loss, argnums=range(1, 7))(append, *arrays)

    with interpreted():
        found = gradient(rotate_and_append)
    assert_same_bits(found, gradient(jax.jit(plainly)))
    assert all(np.any(np.asarray(x, np.float32)) for x in found)


def test_vmap_is_the_plain_formula_of_each():
    q, kv, cos, sin, slots, keys, values = operands()
    axes = (0, 0, None, None, 0, None, 0)
    many = [
        x if axis is None else jnp.stack([jnp.asarray(x)] * 2)
        for x, axis in zip((q, kv, cos, sin, slots, keys, values), axes, strict=True)
    ]
    call = jax.vmap(rotate_and_append, axes)
    assert "mosaic_gpu" not in lowered_for_cuda(call, *many)
    wanted = [jnp.stack([x] * 2) for x in plainly(q, kv, cos, sin, slots, keys, values)]
    assert_same_bits(call(*many), wanted)


@pytest.mark.parametrize("H", [128, 256, 384])
@pytest.mark.parametrize("heads", [(64, 8), (9, 3), (8, 1), (6, 6)], ids=str)
@pytest.mark.parametrize("tokens", [(1, 1), (8, 4)], ids=str)
def test_lowers_for_cuda_with_the_caches_in_place(tokens, heads, H):
    dtype, cache_dtype = ("bfloat16", "float16") if H % 256 else ("float16", "float32")
    args = shapes(*tokens, *heads, H, dtype, cache_dtype, np.zeros(tokens))
    (kernel,) = [x for x in lowered_for_cuda(rotate_and_append, *args).splitlines() if KERNEL in x]
    for operand, output in ((4, 1), (5, 2)):
        assert f"output_tuple_indices = [{output}], operand_index = {operand}" in kernel


def test_inside_shard_map_results_vary_as_their_operands():
    """Or else out_specs=P() would pass with other data on each device."""
    arguments = [jnp.asarray(x) for x in operands()]
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    # The angles are the same for all.
    specs = (P("data"), P("data"), P(), P(), P("data"), P("data"), P("data"))

    def call(q, kv, cos, sin, *rest):
        return rotate_and_append(q, kv, cos[:1], sin[:1], *rest)

    def total(*arguments):
        sharded = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=P("data"))
        return sum(jnp.sum(x.astype(jnp.float32)) for x in sharded(*arguments))

    assert KERNEL in lowered_for_cuda(total, *arguments)
    assert KERNEL in lowered_for_cuda(jax.value_and_grad(total, (0, 1, 2, 3, 5, 6)), *arguments)
    equal = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=P())
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(equal).trace(*arguments)

    many = [jnp.stack([x] * 2, 1) for x in arguments]
    options = {"mesh": mesh, "in_specs": P("data")}
    inside = jax.shard_map(jax.vmap(rotate_and_append, 1), **options, out_specs=P(None, "data"))
    around = jax.vmap(jax.shard_map(rotate_and_append, **options, out_specs=P("data")), 1)
    wanted = [jnp.stack([x] * 2) for x in plainly(*arguments)]
    for mapped in (inside, around):
        assert_same_bits(jax.jit(mapped)(*many), wanted)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((1, 1, 4, 2, 128, "float32"), "takes bfloat16 and float16"),
        ((1, 1, 4, 2, 128, "bfloat16", "int8"), "not bfloat16 for int8"),
        ((1, 1, 4, 2, 64), "multiple of 128, not 64"),
        ((1, 65), "up to 64 tokens in a step, not 65"),
        ((5, 13), "up to 64 tokens in a step, not 65"),
    ],
)
def test_what_the_kernel_is_not_for_goes_plainly(arguments, reason):
    def placeholder(*shape, dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    B, T, N, K, H, dtype, cache_dtype = (
        *arguments,
        *(1, 1, 4, 2, 128, "bfloat16", "bfloat16")[len(arguments) :],
    )
    q, keys = placeholder(B, T, N, H, dtype=dtype), placeholder(B, S, K, H, dtype=cache_dtype)
    assert reason in why_not(q, keys)
    args = (
        q, placeholder(B, T, 2, K, H, dtype=dtype),
        *[placeholder(B, T, 1, H // 2, dtype="float32")] * 2, placeholder(B, T, dtype="int32"),
        keys, keys,
    )  # fmt: skip
    assert KERNEL not in lowered_for_cuda(rotate_and_append, *args)


def test_without_a_hopper_gpu_it_says_so(monkeypatch):
    monkeypatch.undo()
    assert "Hopper" in why_not(*operands()[::5])


def model_step(model, tokens, cache):
    num_tokens = jnp.array([tokens.shape[1], 1], jnp.int32)
    return model(tokens, cache, num_tokens=num_tokens, implementation="xla")


def test_a_model_says_the_same_with_and_without(monkeypatch, through_kernel):
    model = Llama(CONFIG, nnx.Rngs(0))
    tokens = jnp.array([[1, 2, 3], [4, 5, 6]], jnp.int32)
    cache = dataclasses.replace(model.init_cache(2, S), lengths=jnp.array([9, S - 1], jnp.int32))
    with interpreted():
        found = jax.tree.leaves(model_step(model, tokens, cache))
    monkeypatch.setattr(rope_append, "why_not", lambda q, keys: "not here")
    assert_same_bits(found, jax.tree.leaves(model_step(model, tokens, cache)))


def test_a_process_with_a_gpu_may_decode_on_its_cpu(monkeypatch):
    model, tokens = Llama(CONFIG, nnx.Rngs(0)), jnp.array([[1], [4]], jnp.int32)
    graph, state = nnx.split(model)

    def step(state, tokens, cache):
        return model_step(nnx.merge(graph, state), tokens, cache)

    found = jax.tree.leaves(jax.jit(step)(state, tokens, model.init_cache(2, S)))
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: "no GPU")
    expected = jax.tree.leaves(jax.jit(step)(state, tokens, model.init_cache(2, S)))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=0.02, atol=0.02
        )


@pytest.mark.parametrize("axes", [("tensor", "seq"), ("data", "seq"), ("data", "tensor")], ids=str)
def test_a_model_over_several_devices_runs_the_kernel(axes):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), axes)
    graph, state = nnx.split(Llama(CONFIG, nnx.Rngs(0)))

    def step(state, tokens, cache):
        model = nnx.merge(graph, state)
        model.sharding = fit_mesh(CONFIG, mesh)
        return model_step(model, tokens, cache)

    model = nnx.merge(graph, state)
    model.sharding = fit_mesh(CONFIG, mesh)
    text = lowered_for_cuda(step, state, jnp.zeros((2, 1), jnp.int32), model.init_cache(2, 256))
    assert text.count(KERNEL) == 1  # which the layers share
