"""The split-KV kernels, interpreted on the CPU with race detection.

conftest.py leaves this file out where jax has no interpreter for them (before 0.11.2).
"""

from __future__ import annotations

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from kernel_runs import accumulate, inputs, lowered_for_cuda
from reference import assert_close, low_precision_attention, reference_attention

from jaxdecode.pallas_kernels import (
    chunk_kernel,
    combine_partials,
    decode_attention,
    explain_attention,
    flash_decode,
    xla,
)
from jaxdecode.pallas_kernels.combine_kernel import combine_planned
from jaxdecode.pallas_kernels.decode_attention import visible_ranges
from jaxdecode.pallas_kernels.split_config import (
    blocks_to_merge_in_one,
    choose_num_splits,
    split_config,
)
from jaxdecode.pallas_kernels.split_plan import ToCombine

# (B, T, S, N, K, options): every grouping, row blocks over tokens and heads, and each option; few
# rows and, from "24 rows" on, so many that two warpgroups share the tiles.
CASES = {
    "grouped": (1, 1, 256, 8, 2, {}),
    "multi-head": (1, 1, 128, 2, 2, {"scale": 0.2}),
    "three heads a group": (2, 1, 256, 6, 2, {"softcap": 5.0}),
    "tokens": (2, 4, 256, 4, 2, {"window": 70}),
    "row blocks of tokens": (1, 9, 128, 16, 2, {}),
    "row blocks of heads": (1, 2, 128, 72, 1, {}),
    "sinks": (2, 2, 256, 4, 2, {"sinks": True, "softcap": 30.0, "window": 200}),
    "24 rows": (1, 3, 320, 16, 2, {"window": 70}),
    "27 rows": (1, 3, 256, 9, 1, {"sinks": True, "softcap": 30.0, "window": 200}),
    "32 rows": (1, 4, 192, 8, 1, {"softcap": 5.0}),
    "40 rows": (1, 1, 128, 40, 1, {"sinks": True}),
    "64 rows": (1, 1, 256, 64, 1, {}),
}


@pytest.fixture
def interpreter(monkeypatch, interpreter):
    """Mosaic's interpreter, which lacks the product with an operand in registers."""
    monkeypatch.setattr(chunk_kernel, "accumulate", accumulate)


def attend(q, k, v, kv_len, *, num_splits=None, window=None, **options):
    lo, hi = visible_ranges(jnp.asarray(kv_len), q.shape[1], k.shape[1], window=window)
    options = {"scale": q.shape[-1] ** -0.5} | options
    return flash_decode.attend(q, k, v, lo, hi, num_splits=num_splits, **options)


def check(
    shape, options, num_splits, dtype=jnp.bfloat16, H=128, kv_len=None, out_dtype=jnp.float32
):
    q, k, v, kv_len = inputs(*shape, H, dtype, kv_len, options.get("window"))
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = jnp.asarray(np.random.default_rng(1).normal(size=shape[3]), jnp.float32)
    out, lse = attend(q, k, v, kv_len, num_splits=num_splits, out_dtype=out_dtype, **options)
    assert out.dtype == out_dtype
    case = [np.asarray(x) for x in (q, k, v)]
    ref, ref_lse = reference_attention(*case, kv_len, **options)
    low = low_precision_attention(*case, kv_len, **options, out_dtype=out_dtype)
    assert_close(np.asarray(out), ref, low, q.dtype, lse=np.asarray(lse), ref_lse=ref_lse)


@pytest.fixture
def few_blocks(monkeypatch):
    """Plans for three multiprocessors, so that each goes through several chunks."""
    monkeypatch.setattr(flash_decode, "NUM_SMS", 3)


@pytest.mark.parametrize(
    ("name", "num_splits"),
    [("grouped", 1), ("64 rows", 1), *((name, 3) for name in CASES)],
)
def test_interpreted_against_the_reference(interpreter, name, num_splits):
    *shape, options = CASES[name]
    check(shape, options, num_splits)


@pytest.mark.parametrize(
    ("shape", "H", "options"),
    [
        ((4, 1, 384, 4, 2), 128, {}),
        ((3, 3, 256, 4, 2), 128, {"sinks": True, "softcap": 30.0, "window": 70}),
        ((2, 2, 128, 40, 1), 128, {"scale": 0.2}),
        ((3, 1, 128, 3, 1), 80, {"sinks": True}),
        ((2, 2, 192, 2, 1), 256, {}),
        ((3, 1, 448, 64, 1), 128, {}),
        ((3, 3, 192, 9, 1), 80, {"sinks": True, "softcap": 30.0, "window": 100}),
        ((3, 4, 128, 8, 1), 256, {"window": 100}),
    ],
    ids=[
        "long", "options", "row blocks", "head_dim 80", "head_dim 256",
        "64 rows", "27 rows", "32 rows",
    ],
)  # fmt: skip
def test_interpreted_by_plan(interpreter, few_blocks, shape, H, options):
    check(shape, options, None, H=H)


# (B, T, S, N, K), H, blocks, lengths, (items that are cut, all items), options, dtypes.
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
WHOLE_AND_CUT = {
    "all whole": ((4, 1, 128, 4, 2), 128, 4, [128, 100, 1, 128], (0, 8), {}, BF16, BF16),
    "none whole": ((2, 1, 512, 3, 1), 64, 4, [512, 400], (2, 2), {}, F16, F16),
    "ragged and idle": (
        (5, 1, 384, 6, 2), 128, 4, [384, 0, 100, 0, 384], (2, 6), {"sinks": True}, BF16, BF16,
    ),
    "more idle than cut": ((9, 1, 128, 2, 1), 96, 3, [0] * 7 + [128, 9], (0, 2), {}, BF16, F32),
    "half a block of tokens": (
        (2, 5, 128, 32, 2), 128, 3, [128, 60], (1, 8), {"window": 70}, BF16, BF16,
    ),
    "half a block of heads": (
        (2, 1, 128, 142, 2), 80, 3, [128, 60], (1, 8), {"sinks": True}, BF16, F32,
    ),
    "256 columns": ((2, 3, 64, 7, 1), 256, 3, [64, 60], (0, 2), {}, BF16, BF16),
    "few rows of 80 columns": (
        (2, 2, 256, 6, 2), 80, 3, [256, 90], (1, 4), {"sinks": True}, BF16, F32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE_AND_CUT)
def test_interpreted_items_that_are_whole_and_that_are_cut(interpreter, monkeypatch, name):
    """Each row is written once: what nobody writes is NaN, what two do is a race."""
    shape, H, blocks, lengths, expected, options, *dtypes = WHOLE_AND_CUT[name]
    monkeypatch.setattr(flash_decode, "NUM_SMS", blocks)
    assert items_of_plan(shape, H, lengths, options.get("window")) == expected
    check(shape, options, None, dtypes[0], H, lengths, dtypes[1])


def items_of_plan(shape, H, lengths, window):
    """How many items are cut, and how many there are with those that are not."""
    B, T, S, N, K = shape
    config = split_config((B, T, N, H), (B, S, K, H), None, 0.1, None)
    ranges = visible_ranges(jnp.asarray(lengths), T, S, window=window)
    plan = jax.tree.map(np.asarray, flash_decode._plan(*ranges, (B, S, K, H), config))
    chunks = [x for first, n, *_ in plan.blocks for x in plan.chunks[first : first + n]]
    parts = [parts for *_, part, parts in chunks if part == 0]
    return sum(x > 1 for x in parts), len(parts)


def test_interpreted_twice_gives_equal_bits(interpreter, few_blocks):
    q, k, v, _ = inputs(2, 1, 256, 2, 1, 128)
    first, second = (attend(q, k, v, np.array([256, 130])) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("num_splits", [1, 17])
def test_interpreted_rows_do_not_depend_on_the_batch(interpreter, num_splits):
    """With a fixed number of chunks, of which some may be empty: alone, and in other places."""
    whole = inputs(2, 2, 256, 3, 1, 64, jnp.float16, [65, 256])
    expected = attend(*whole, num_splits=num_splits)
    for rows in (np.array([1]), np.array([1, 0])):
        some = attend(*(x[rows] for x in whole), num_splits=num_splits)
        for x, y in zip(some, expected, strict=True):
            np.testing.assert_array_equal(x, y[rows])


def test_interpreted_merge_of_many_chunks(interpreter):
    """More chunks than are loaded together, of which the largest logits come late; a row that is
    finished already; and idle sequences, more than there are blocks."""
    rng = np.random.default_rng(0)
    out, lse = rng.normal(size=(40, 8, 128)), rng.normal(size=(40, 8)) + np.arange(40)[:, None]
    out, lse = (jnp.asarray(x, jnp.float32) for x in (out, lse))
    # Sequence, place, first chunk, chunks; and of two blocks and five sequences, which are idle.
    left = jnp.array([[0, 0, 0, 37, 0, 1, 1], [1, 0, 38, 1, 0, 1, 0]])
    config = split_config((5, 1, 2, 128), (5, 8192, 1, 128), None, 0.1, None)
    merged_ref = jax.new_ref(jnp.full((5, 1, 1, 2, 128), 7.0))
    lse_ref = jax.new_ref(jnp.full((5, 1, 1, 8), 7.0))
    combine_planned(ToCombine(out, lse, left), None, merged_ref, lse_ref, config)
    merged, merged_lse = jax.freeze(merged_ref)[:, 0, 0], jax.freeze(lse_ref)[:, 0, 0, :2]
    expected, expected_lse = combine_partials(out[:37, :2], lse[:37, :2] / np.log2(np.e))
    np.testing.assert_allclose(merged[0], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(merged_lse[0], expected_lse, rtol=1e-6)
    for found, nothing in ((merged, 0.0), (merged_lse, -np.inf)):
        np.testing.assert_array_equal(found[1], jnp.full_like(found[1], 7.0))
        np.testing.assert_array_equal(found[2:], jnp.full_like(found[2:], nothing))


@pytest.mark.parametrize("num_splits", [1, 3, 7])
@pytest.mark.parametrize("T", [2, 24])
def test_interpreted_window_far_into_the_cache(interpreter, T, num_splits):
    """Only the last three of five tiles are seen, or six of ten; chunks may be more than those."""
    check((1, T, 640, 2, 1), {"window": 300}, num_splits, kv_len=[630])


@pytest.mark.parametrize("num_splits", [1, 3, 5])
@pytest.mark.parametrize("N", [2, 24])
def test_interpreted_tiles_left_of_a_window_are_not_loaded(interpreter, monkeypatch, N, num_splits):
    """What is loaded and not seen gets weight 0, and without being zeroed a value of NaN stays.
    The scale is this test's own: no other may have compiled these kernels."""
    monkeypatch.setattr(chunk_kernel, "zero_unseen", lambda *_: None)
    shape = (1, 1, 512, N, 1)
    check(shape, {"window": 256, "scale": 0.123}, num_splits, kv_len=[512])
    with pytest.raises(AssertionError, match="not finite"):
        check(shape, {"window": 255, "scale": 0.123}, num_splits, kv_len=[512])


@pytest.mark.parametrize("num_splits", [1, 2, 3, 9, 20])
def test_chunks_share_the_tiles_that_some_query_sees(num_splits):
    config = split_config((1, 2, 2, 128), (1, 65536, 1, 128), num_splits, 0.1, None)
    for kv_len, tiles in ((60_000, range(460, 469)), (0, range(0))):
        ranges = visible_ranges(jnp.array([kv_len]), 2, 65536, window=1000)
        slots = chunk_kernel.Slots(*(list(x[0]) for x in ranges))
        chunks = [
            range(*chunk_kernel.tiles_of_chunk(slots, jnp.int32(c), config))
            for c in range(num_splits)
        ]
        assert list(itertools.chain(*chunks)) == list(tiles)
        assert {len(x) for x in chunks} <= {len(tiles) // num_splits, -(-len(tiles) // num_splits)}


def test_the_check_notices_a_lost_chunk(interpreter):
    q, k, v, kv_len = inputs(1, 1, 256, 2, 1, 128)
    out, _ = attend(q, k, v, kv_len, num_splits=2)
    short, _ = attend(q, k, v, kv_len - 64, num_splits=2)
    ref, _ = reference_attention(*(np.asarray(x) for x in (q, k, v)), kv_len)
    low = low_precision_attention(
        *(np.asarray(x) for x in (q, k, v)), kv_len, out_dtype=jnp.float32
    )
    assert_close(np.asarray(out), ref, low, q.dtype)
    with pytest.raises(AssertionError):
        assert_close(np.asarray(short), ref, low, q.dtype)


def test_interpreted_float16(interpreter):
    check((1, 1, 128, 4, 2), {}, 2, jnp.float16)


@pytest.mark.parametrize("H", [H for H in flash_decode.HEAD_DIMS if H != 128])
def test_interpreted_head_dims(interpreter, H):
    check((1, 3, 128, 3, 1), {"sinks": True, "window": 70}, 2, H=H)


def test_gradient_is_that_of_the_portable_implementation(interpreter, few_blocks):
    q, k, v, _ = inputs(2, 1, 128, 4, 2, 128)
    k, v = jnp.nan_to_num(k), jnp.nan_to_num(v)
    lo, hi = visible_ranges(jnp.array([100, 40]), 1, 128)
    sinks = jnp.array([0.1, -0.3, 0.5, 1.0])

    def loss(implementation, q, k, v, sinks):
        out, lse = implementation(q, k, v, lo, hi, scale=0.1, sinks=sinks)
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse**2)

    gradient = functools.partial(jax.grad(loss, argnums=(1, 2, 3, 4)))
    found = gradient(flash_decode.attend, q, k, v, sinks)
    expected = gradient(xla.attend, q, k, v, sinks)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=0.05, atol=0.02
        )
    in_equal_chunks = functools.partial(flash_decode.attend, num_splits=2)
    shapes = jax.eval_shape(functools.partial(gradient, in_equal_chunks), q, k, v, sinks)
    assert [x.shape for x in shapes] == [x.shape for x in expected]


@pytest.mark.parametrize("num_splits", [2, None])
def test_vmap_is_one_call_of_a_larger_batch(interpreter, few_blocks, num_splits):
    whole = [jnp.asarray(x) for x in inputs(4, 1, 128, 2, 1, 128)]
    pairs = [x.reshape(2, 2, *x.shape[1:]) for x in whole]
    call = functools.partial(attend, num_splits=num_splits)
    together = jax.vmap(lambda *x: call(*x)[0])(*pairs)
    np.testing.assert_array_equal(together.reshape(-1, *together.shape[2:]), call(*whole)[0])


@pytest.mark.parametrize("num_splits", [1, None])
def test_inside_shard_map_results_vary_as_their_operands(num_splits):
    """Or else out_specs=P() would pass with other data on each device."""
    q, k, v, kv_len = (jnp.asarray(x) for x in inputs(4, 1, 128, 2, 1, 128))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    call = functools.partial(attend, num_splits=num_splits)
    sharded = jax.shard_map(call, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert "mosaic_gpu" in lowered_for_cuda(sharded, q, k, v, kv_len)
    equal = jax.shard_map(call, mesh=mesh, in_specs=P("data"), out_specs=P())
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(equal).trace(q, k, v, kv_len)


@pytest.mark.parametrize("H", flash_decode.HEAD_DIMS)
def test_shared_memory_is_enough(H):
    for T, G, S in itertools.product(range(1, 17), range(1, 73), (64, 128)):
        config = split_config((1, T, G, H), (1, S, 1, H), 1, 0.1, None)
        assert config.shared_bytes <= 227 * 1024
        assert config.stages >= 2 * config.consumers
        assert config.stages % config.consumers == 0
        assert config.block_t * config.row_blocks_t >= T
        assert config.block_g * config.row_blocks_g >= G


def test_number_of_splits_fills_the_multiprocessors():
    def choose(B, K, S, G=8):
        return choose_num_splits((B, 1, G * K, 128), (B, S, K, 128), num_sms=132)

    assert choose(1, 2, 512) == 4  # not more than there are tiles
    assert choose(1, 2, 512, G=24) == 8  # which many rows have half as tall
    assert choose(1, 2, 65536) == 64
    assert choose(1, 8, 65536) == 16
    assert choose(1, 10, 4096) == 12  # no power of two is within 10 % of the best
    assert choose(64, 2, 8192) == 1
    assert choose(1, 132, 8192) == 1


# B, T, N, K, S and the thread blocks that have to run at the same time.
IN_ONE = {
    "one sequence": ((1, 1, 16, 2, 65536), 128),
    "row blocks": ((1, 9, 16, 2, 128), None),
    "more than 16 rows": ((1, 3, 16, 2, 65536), None),
    "short": ((1, 1, 16, 2, 512), 8),
    "one tile": ((1, 1, 16, 2, 64), None),
    "one chunk": ((1, 1, 132, 132, 8192), None),
    "many items": ((64, 1, 16, 2, 1024), 132),
    "few items": ((32, 1, 16, 2, 1024), None),
    "many items of many rows": ((64, 3, 16, 2, 1024), None),
    "more than 32 bits count": ((2**20, 1, 16, 2, 64), None),
}


@pytest.mark.parametrize("name", IN_ONE)
def test_both_steps_are_one_launch_where_that_is_faster_and_all_blocks_run(monkeypatch, name):
    (B, T, N, K, S), blocks = IN_ONE[name]
    shapes = (B, T, N, 128), (B, S, K, 128)
    assert blocks_to_merge_in_one(*shapes) == blocks

    def on(*core_counts):
        devices = [types.SimpleNamespace(platform="gpu", core_count=n) for n in core_counts]
        monkeypatch.setattr(jax, "local_devices", lambda: devices)
        return flash_decode.merges_in_one(*shapes)

    assert not flash_decode.merges_in_one(*shapes), "nobody knows where it will run"
    assert on(132, 132) is (blocks is not None)
    assert on(7) is False
    assert on(132, 7) is False


# dtype, S, H and what is said of them, whether the queries are few or many.
NOT_SERVED = [
    (jnp.float32, 128, 64, "bfloat16 and float16, not float32"),
    (jnp.bfloat16, 128, 72, "head_dim 64, 80, 96, 128, 192, 256, not 72"),
    (jnp.bfloat16, 124, 64, "a multiple of 8 and at least 64, not 124"),
    (jnp.bfloat16, 56, 64, "a multiple of 8 and at least 64, not 56"),
]


def test_what_the_kernels_cannot_do_is_said(monkeypatch):
    q, k, v, _ = inputs(1, 1, 128, 2, 1, 128)
    with pytest.raises(NotImplementedError, match="need an NVIDIA Hopper GPU, and JAX runs on cpu"):
        decode_attention(q, k, v, 5, implementation="flash_decode")
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: None)
    assert str(explain_attention(q, k, v, 5)).startswith("flash_decode: the kernels for this GPU; ")
    for T, (dtype, S, H, words) in itertools.product((1, 17), NOT_SERVED):
        x, y, _, _ = inputs(1, T, S, 2, 1, H, dtype)
        choice = explain_attention(x, y, y, 20)
        assert choice.implementation == "xla"
        assert words in choice.reason
        with pytest.raises(NotImplementedError, match=words):
            decode_attention(x, y, y, 20, implementation="flash_decode")


def test_a_call_lowered_for_the_cpu_runs_there_though_a_gpu_is_chosen(monkeypatch):
    q, k, v, kv_len = inputs(2, 1, 128, 4, 2, 128)
    expected = decode_attention(q, k, v, kv_len, implementation="xla")
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: None)
    np.testing.assert_array_equal(jax.jit(decode_attention)(q, k, v, kv_len), expected)
