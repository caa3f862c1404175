"""Sums through the peers' memory, lowered for CUDA on the CPU: no interpreter has peers.

conftest.py leaves this file out where jax cannot lower them (before 0.11.2). What they compute is
tested on GPUs, in test_peer_gpu.py.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from meshes import make_mesh, sharded_model
from naive_llama import CONFIG

from jaxdecode.decode_loop import SplitModel, decode, start_state
from jaxdecode.models.llama import Llama
from jaxdecode.pallas_kernels import merge_columns, peer
from jaxdecode.sampling import SamplingArrays, SamplingParams

AXES = ("data", "tensor", "seq")


def lowered(function, mesh, *shapes) -> str:
    """What is compiled for CUDA of a function of each device's arrays, where there is no GPU."""
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P())
    return jax.jit(mapped).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def summed_twice(axes):
    def function(x):
        mailbox = peer.open_mailbox(x.shape, x.dtype, axes)
        return peer.all_reduce(peer.all_reduce(x, axes, mailbox) * 2, axes, mailbox)

    return function


@pytest.mark.parametrize("dtype", peer.DTYPES)
@pytest.mark.parametrize(
    ("sizes", "axes"),
    [
        ((1, 2, 1), ("tensor",)),
        ((1, 8, 1), ("tensor",)),
        ((2, 2, 2), ("seq",)),
        ((2, 2, 2), ("tensor", "seq")),
        ((4, 1, 2), ("data", "seq")),
    ],
    ids=str,
)
def test_lowers_for_cuda(sizes, axes, dtype):
    text = lowered(summed_twice(axes), make_mesh(sizes), jax.ShapeDtypeStruct((3, 2, 512), dtype))
    # One kernel waits for all devices of the mesh, in their order; the two sums share the other.
    assert text.count("custom_call @mosaic_gpu") == 2
    assert text.count("skip_device_barrier = false") == 1
    ids = ",".join(map(str, range(math.prod(sizes))))
    assert text.count(f'xla_replica_ids = "{ids}"') == 2
    assert text.count("call @_sum") == 3
    # Slots and turns stay where they are.
    assert text.count("output_operand_alias<") == 4
    assert "all_reduce" not in text


@pytest.mark.parametrize("num_bytes", [1024, 39 * 1024, 67 * 1024, peer.MAX_BYTES])
def test_every_size_lowers_for_eight_devices(num_bytes):
    assert num_bytes <= peer.MAX_BYTES
    shape = jax.ShapeDtypeStruct((num_bytes // 2,), jnp.bfloat16)
    text = lowered(summed_twice(("tensor",)), make_mesh((1, 8, 1)), shape)
    assert text.count("custom_call @mosaic_gpu") == 2


def test_a_mailbox_serves_a_loop():
    def function(x):
        mailbox = peer.open_mailbox(x.shape, x.dtype, ("tensor",))
        turn = lambda i, x: peer.all_reduce(x, ("tensor",), mailbox)  # noqa: E731
        return lax.fori_loop(0, 10, turn, x)

    text = lowered(function, make_mesh((1, 2, 1)), jax.ShapeDtypeStruct((512,), jnp.bfloat16))
    assert text.count("call @_sum") == 2
    assert "stablehlo.while" in text


@pytest.mark.parametrize(
    ("collective", "width", "dtype"),
    [("all_reduce", 8192, jnp.bfloat16), ("merge_columns", 64 * 128, jnp.float32)],
)
def test_the_chains_of_the_benchmark_open_one_mailbox(script, collective, width, dtype):
    ops = script("sharded_ops")
    kind, mesh = ops.COLLECTIVES[collective], Mesh(np.array(jax.devices()[:2]), ("seq",))
    run = ops.chained(kind, kind.implementations["peer"], mesh)
    operands = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, width), (2,)))
    text = run.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("skip_device_barrier = false") == 1
    assert text.count("skip_device_barrier = true") == 1
    links = {"all_reduce": "call @_sum", "merge_columns": "call @_merge"}[collective]
    assert text.count(links) == 32 + (collective == "all_reduce")
    assert "stablehlo.while" in text
    assert "stablehlo.all_" not in text


def normed_twice(x, delta, scale):
    mailbox = peer.open_mailbox(delta.shape, delta.dtype, ("tensor",))
    for _ in range(2):
        x, delta = peer.add_and_norm(x, delta, scale, 1e-5, ("tensor",), mailbox)
    return x, delta


# (rows, width): clusters of 1 block and more, and of blocks of 1 warpgroup and more.
NORM_SHAPES = [(1, 512), (1, 5120), (1, 8192), (3, 1024), (8, 8192), (16, 8192)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
@pytest.mark.parametrize("count", [2, 8])
def test_sum_residual_and_norm_lower_for_cuda(count, shape, dtype):
    rows, D = shape
    if peer.why_not(shape, dtype) is not None:
        rows //= 2
    x = jax.ShapeDtypeStruct((rows, 1, D), dtype)
    scale = jax.ShapeDtypeStruct((D,), dtype)
    text = lowered(normed_twice, make_mesh((1, count, 1)), x, x, scale)
    assert text.count("custom_call @mosaic_gpu") == 2
    assert text.count("skip_device_barrier = false") == 1
    assert text.count("call @_norm") == 2
    assert text.count("call @_sum") == 1
    assert text.count("output_operand_alias<") == 4


def test_rows_that_no_cluster_has_are_summed_first():
    x = jax.ShapeDtypeStruct((1, 1, 6656), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((6656,), jnp.bfloat16)
    text = lowered(normed_twice, make_mesh((1, 2, 1)), x, x, scale)
    assert text.count("call @_norm") == 0
    assert text.count("call @_sum") == 3


@pytest.mark.parametrize(("out", "fits"), [(P("data"), True), (P(), False)])
def test_a_norm_varies_over_the_other_axes_only(out, fits):
    rows, x = P(("data", "tensor")), jax.ShapeDtypeStruct((4, 1, 512), jnp.bfloat16)
    mapped = jax.shard_map(
        normed_twice, mesh=make_mesh((2, 2, 1)), in_specs=(P("data"), rows, P()), out_specs=out
    )
    operands = jax.ShapeDtypeStruct((2, 1, 512), x.dtype), x, jax.ShapeDtypeStruct((512,), x.dtype)
    # The second delta is the first norm, which all of the group have.
    if fits:
        jax.jit(mapped).trace(*operands)
    else:
        with pytest.raises(ValueError, match="out_specs"):
            jax.jit(mapped).trace(*operands)


def merged_twice(out, lse):
    """Over seq; the second merge is of the first one's columns, as all have them."""
    B, T, N, H = out.shape
    n = lax.axis_size("seq")
    mailbox = peer.open_mailbox((B, T, N, H // n), jnp.float32, ("seq",), arrays=2)
    columns = merge_columns(out, lse, ("seq",), mailbox)
    return merge_columns(jnp.concatenate([columns] * n, axis=-1), lse, ("seq",), mailbox)


@pytest.mark.parametrize("sizes", [(1, 1, 2), (1, 1, 8), (2, 2, 2)], ids=str)
def test_merging_lowers_for_cuda(sizes):
    out = jax.ShapeDtypeStruct((2, 3, 16, 128), jnp.float32)
    lse = jax.ShapeDtypeStruct(out.shape[:3], jnp.float32)
    mapped = jax.shard_map(
        merged_twice, mesh=make_mesh(sizes), in_specs=P(), out_specs=P(None, None, None, "seq")
    )
    text = jax.jit(mapped).trace(out, lse).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("skip_device_barrier = false") == 1
    assert text.count("call @_merge") == 2
    assert "all_to_all" not in text
    whole = jax.shard_map(merged_twice, mesh=make_mesh(sizes), in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(whole).trace(out, lse)


def test_jax_refuses_a_mesh_in_another_order():
    x = jax.ShapeDtypeStruct((512,), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="row-major"):
        lowered(summed_twice(("tensor",)), make_mesh((1, 4, 1), backwards=True), x)


@pytest.mark.parametrize(
    ("out", "fits"), [(P("data"), True), (P(("data", "tensor")), True), (P(), False)]
)
def test_a_sum_varies_over_the_other_axes_only(out, fits):
    mesh = make_mesh((2, 2, 1))
    mapped = jax.shard_map(
        summed_twice(("tensor",)), mesh=mesh, in_specs=P(("data", "tensor")), out_specs=out
    )
    x = jax.ShapeDtypeStruct((4, 512), jnp.bfloat16)
    if fits:
        jax.jit(mapped).trace(x)
    else:
        with pytest.raises(ValueError, match="out_specs"):
            jax.jit(mapped).trace(x)


WIDE = dataclasses.replace(CONFIG, embed_dim=256, num_q_heads=16, num_kv_heads=4, head_dim=64)


def step_text(model: Llama, B: int, T: int) -> str:
    graph, state = nnx.split(model)

    def step(state, tokens, cache):
        return nnx.merge(graph, state)(tokens, cache, implementation="xla")

    operands = (
        state,
        model.sharding.place(np.zeros((B, T), np.int32), "BT"),
        model.init_cache(B, 128),
    )
    return jax.jit(step).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("sizes", "B", "T"), [((1, 2, 1), 1, 1), ((2, 2, 2), 4, 1), ((1, 1, 4), 2, 3)], ids=str
)
def test_what_a_decoding_step_exchanges_through_mailboxes(sizes, B, T):
    model = sharded_model(WIDE, make_mesh(sizes))
    sums, merges = 2 * WIDE.num_layers + 1, WIDE.num_layers * (sizes[2] > 1)
    text = step_text(model, B, T)
    assert text.count('"stablehlo.all_reduce"') == sums
    assert text.count('"stablehlo.all_to_all"') == merges
    model.sharding = dataclasses.replace(model.sharding, collectives="peer")
    text = step_text(model, B, T)
    assert "all_reduce" not in text
    assert "all_to_all" not in text
    opened = 1 + (merges > 0)
    assert text.count("call @_sum") == opened
    assert text.count("call @_norm") == sums
    assert text.count("call @_merge") == merges
    assert text.count("skip_device_barrier = false") == opened


def test_a_long_prompt_is_summed_by_xla():
    model = sharded_model(WIDE, make_mesh((1, 2, 1)))
    model.sharding = dataclasses.replace(model.sharding, collectives="peer")
    text = step_text(model, 3, 100)
    assert "mosaic_gpu" not in text
    assert '"stablehlo.all_reduce"' in text


def dispatch_text(model: Llama, B: int) -> str:
    """Of five tokens per sequence."""
    split, state = (
        SplitModel(model),
        start_state(model, model.init_cache(B, 128), np.full(B, 5, np.int32)),
    )
    sampling = SamplingArrays.create(SamplingParams(), 0, [0] * B)
    traced = decode.trace(
        split.static, split.leaves, state, sampling, np.full(16, -1, np.int32),
        num_steps=5, num_logprobs=0, implementation="xla",
    )  # fmt: skip
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def bare_loop_text(model: Llama, B: int) -> str:
    """Of five calls in a loop, which know nothing of each other."""
    graph, state = nnx.split(model)

    def run(state, tokens, cache):
        call = lambda i, cache: nnx.merge(graph, state)(tokens, cache)[1]  # noqa: E731
        return lax.fori_loop(0, 5, call, cache)

    operands = state, model.sharding.place(np.zeros((B, 1), np.int32), "BT")
    traced = jax.jit(run).trace(*operands, model.init_cache(B, 128))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("loop", "around"), [(dispatch_text, True), (bare_loop_text, False)])
@pytest.mark.parametrize("sizes", [(1, 2, 1), (1, 1, 4), (2, 2, 2)], ids=str)
def test_a_dispatch_opens_its_mailboxes_once_before_its_loop(sizes, loop, around):
    model = sharded_model(WIDE, make_mesh(sizes))
    model.sharding = dataclasses.replace(model.sharding, collectives="peer")
    text = loop(model, 2)
    main = text[text.index("func.func public @main") :]
    opened = 1 + (sizes[2] > 1)
    assert text.count("skip_device_barrier = false") == opened
    assert main[: main.index("stablehlo.while")].count("call @_sum") == opened * around
