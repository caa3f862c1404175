"""The wide-query kernel: interpreted on the CPU with race detection, and lowered for CUDA.

conftest.py leaves this file out where jax has no interpreter for it (before 0.11.2).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from kernel_runs import accumulate, input_shapes, inputs, interpreted, lowered_for_cuda
from reference import assert_close, low_precision_attention, reference_attention

from jaxdecode.pallas_kernels import (
    decode_attention,
    explain_attention,
    flash_decode,
    prefill,
    prefill_kernel,
    xla,
)
from jaxdecode.pallas_kernels.crossover import wide_is_faster
from jaxdecode.pallas_kernels.decode_attention import visible_ranges

# (B, T, S, N, K, H, options): both shares of a block, tiles skipped and masked at both ends, a ring
# that comes round, rows past T and rows that see nothing, and each option.
CASES = {
    "two heads a block": (1, 64, 512, 2, 1, 128, {}),
    "one head a block": (1, 130, 256, 3, 1, 64, {"scale": 0.2}),
    "padding rows": (2, 20, 128, 2, 2, 64, {}),
    "window": (1, 72, 512, 2, 1, 64, {"window": 70}),
    "chunk after the first": (
        2, 40, 384, 4, 2, 64, {"kv_len": [240, 60], "q_start": [200, 20], "softcap": 5.0},
    ),
    "more queries than keys": (
        1, 72, 128, 2, 1, 64, {"kv_len": [20], "sinks": True, "scale": -0.1},
    ),
    "everything": (
        2, 72, 512, 2, 2, 64,
        {"kv_len": [500, 128], "window": 300, "softcap": 30.0, "sinks": True, "scale": 0.1},
    ),
    "narrow tiles": (1, 24, 72, 2, 2, 80, {}),
    "wide heads": (1, 24, 256, 2, 1, 256, {}),
}  # fmt: skip


@pytest.fixture
def interpreter(monkeypatch, interpreter):
    """Mosaic's interpreter, which lacks the product with an operand in registers."""
    monkeypatch.setattr(prefill_kernel, "accumulate", accumulate)


def attend(q, k, v, kv_len, *, q_start=None, window=None, **options):
    q_start = None if q_start is None else jnp.asarray(q_start)
    T, S = q.shape[1], k.shape[1]
    lo, hi = visible_ranges(jnp.asarray(kv_len), T, S, q_start=q_start, window=window)
    return prefill.attend(q, k, v, lo, hi, **({"scale": q.shape[-1] ** -0.5} | options))


def check(B, T, S, N, K, H, options, dtype=jnp.bfloat16, out_dtype=jnp.float32):
    options = dict(options)
    q, k, v, kv_len = inputs(B, T, S, N, K, H, dtype, options.pop("kv_len", None))
    if options.pop("sinks", False):
        options["sinks"] = jnp.asarray(np.random.default_rng(1).normal(size=N), jnp.float32)
    out, lse = attend(q, k, v, kv_len, **options, out_dtype=out_dtype)
    case = [np.asarray(x) for x in (q, k, v)]
    ref, ref_lse = reference_attention(*case, kv_len, **options)
    low = low_precision_attention(*case, kv_len, **options, out_dtype=out_dtype)
    assert_close(np.asarray(out), ref, low, q.dtype, lse=np.asarray(lse), ref_lse=ref_lse)


@pytest.mark.parametrize("name", CASES)
def test_interpreted_against_the_reference(interpreter, name):
    check(*CASES[name])


def test_interpreted_float16(interpreter):
    check(1, 24, 128, 2, 1, 64, {}, jnp.float16, jnp.float16)


def test_the_check_notices_a_lost_slot(interpreter):
    q, k, v, kv_len = inputs(1, 24, 128, 2, 1, 64)
    shifted, _ = attend(q, k, v, kv_len, q_start=kv_len - 25)
    case = [np.asarray(x) for x in (q, k, v)]
    ref, _ = reference_attention(*case, kv_len)
    low = low_precision_attention(*case, kv_len, out_dtype=jnp.float32)
    with pytest.raises(AssertionError):
        assert_close(np.asarray(shifted), ref, low, q.dtype)


def test_tiles_that_no_query_sees_are_skipped(monkeypatch):
    """With equal logits and a sink, whose weight is 1, `acc` counts the tiles."""
    monkeypatch.setattr(prefill_kernel, "accumulate", lambda acc, p, v_tile: acc + 1.0)
    q, k, v, _ = inputs(1, 56, 1024, 2, 1, 64, kv_len=[1024])
    for q_start, tiles in [(0, 1), (300, 3), (711, 2), (1000, 2), (2000, 0)]:
        with interpreted():
            options = {"q_start": [q_start], "window": 200, "sinks": jnp.zeros(2)}
            out, lse = attend(0 * q, k, v, np.array([1000], np.int32), **options)
        np.testing.assert_allclose(out * jnp.exp(lse)[..., None], tiles, rtol=1e-5)


def test_a_race_would_be_noticed(monkeypatch):
    """Tiles are read out of order with the TMA that then fills their slots again."""

    def hasty(acc, p, v_tile):
        return acc + jnp.dot(p, v_tile[...], preferred_element_type=jnp.float32)

    monkeypatch.setattr(prefill_kernel, "accumulate", hasty)
    with pytest.raises(Exception, match="RACE DETECTED"), interpreted():
        attend(*inputs(1, 32, 1024, 2, 1, 64))


def test_gradient_is_that_of_the_portable_implementation(interpreter):
    q, k, v, _ = inputs(1, 24, 128, 2, 1, 64, kv_len=[128])
    lo, hi = visible_ranges(jnp.array([100]), 24, 128, window=50)
    sinks = jnp.array([0.1, -0.3])

    def loss(implementation, q, k, v, sinks):
        out, lse = implementation(q, k, v, lo, hi, scale=0.1, sinks=sinks)
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse**2)

    arguments = (0, 1, 2, 3)
    found = jax.grad(functools.partial(loss, prefill.attend), arguments)(q, k, v, sinks)
    expected = jax.grad(functools.partial(loss, xla.attend), arguments)(q, k, v, sinks)
    for x, y in zip(found, expected, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=0.05, atol=0.02)


def test_vmap_is_one_call_of_a_larger_batch(interpreter):
    q, k, v, kv_len = inputs(2, 24, 128, 2, 1, 64, kv_len=[100, 64])
    rows = jax.vmap(lambda *x: attend(*x)[0])(*(x[:, None] for x in (q, k, v, kv_len)))
    np.testing.assert_array_equal(rows[:, 0], attend(q, k, v, kv_len)[0])


def test_inside_shard_map_results_vary_as_their_operands():
    """Or else out_specs=P() would pass with other data on each device."""
    q, k, v, kv_len = (jnp.asarray(x) for x in inputs(2, 24, 128, 2, 1, 64))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert "mosaic_gpu" in lowered_for_cuda(sharded, q, k, v, kv_len)
    equal = jax.shard_map(attend, mesh=mesh, in_specs=P("data"), out_specs=P())
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(equal).trace(q, k, v, kv_len)


@pytest.mark.parametrize("H", flash_decode.HEAD_DIMS)
@pytest.mark.parametrize(
    ("shape", "dtype", "out_dtype"),
    [
        ((1, 2048, 65536, 64, 8), jnp.bfloat16, jnp.bfloat16),
        ((2, 17, 72, 9, 3), jnp.float16, jnp.float32),
    ],
    ids=["long", "odd"],
)
def test_lowers_for_cuda(shape, dtype, out_dtype, H):
    call = functools.partial(prefill.attend, scale=0.1, softcap=20.0, out_dtype=out_dtype)
    text = lowered_for_cuda(call, *input_shapes(*shape, H, dtype))
    assert text.count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("shape", [(8, 512, 8192, 32, 32), (1, 1, 64, 2, 1)], ids=["wide", "one"])
def test_lowers_for_cuda_with_sinks(shape):
    def call(q, k, v, lo, hi):
        return prefill.attend(q, k, v, lo, hi, scale=0.1, sinks=jnp.zeros(q.shape[2]))

    text = lowered_for_cuda(call, *input_shapes(*shape, 128))
    assert text.count("custom_call @mosaic_gpu") == 1


def test_queries_are_copied_only_to_fill_up_to_eight():
    call = functools.partial(prefill.attend, scale=0.1)
    even, odd = (lowered_for_cuda(call, *input_shapes(1, T, 512, 2, 1, 128)) for T in (256, 72))
    assert "stablehlo.pad" not in even
    padded = [
        line
        for line in odd.splitlines()
        if "stablehlo.pad" in line or "stablehlo.concatenate" in line
    ]
    assert padded
    assert not [line for line in padded if "xbf16>" in line]


def test_equal_layers_share_one_lowering():
    def layers(q, k, v, lo, hi):
        for _ in range(8):
            q, _ = prefill.attend(q, k, v, lo, hi, scale=0.1, out_dtype=q.dtype)
        return q

    text = lowered_for_cuda(layers, *input_shapes(1, 128, 1024, 16, 2, 128))
    assert text.count("custom_call @mosaic_gpu") == 1


def test_ranges_never_decrease_along_the_queries():
    """The kernel finds what a block sees at its first and its last row."""
    far = np.iinfo(np.int32).max
    for q_start in (None, 0, 90, 128, far - 1, far, -far):
        for window in (None, 1, 40, far):
            q_start_row = None if q_start is None else jnp.array([q_start], jnp.int32)
            ranges = visible_ranges(jnp.array([100]), 64, 128, q_start=q_start_row, window=window)
            for x in ranges:
                assert (np.diff(x) >= 0).all(), (q_start, window)
                assert 0 <= x.min() <= x.max() <= 128


def kernels_called(monkeypatch, T, heads=(64, 8), **options):
    """How many kernels the door's call launches: two that split the keys, or one for prompts."""
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: None)

    def call(q, k, v, kv_len, _):
        return decode_attention(q, k, v, kv_len[:, 0], **options)

    text = lowered_for_cuda(call, *input_shapes(1, T, 512, *heads, 128))
    return text.count("custom_call @mosaic_gpu")


def test_the_door_takes_the_faster_kernels(monkeypatch):
    assert kernels_called(monkeypatch, 16) == 2
    assert kernels_called(monkeypatch, 128) == 2
    assert kernels_called(monkeypatch, 256) == 1
    assert kernels_called(monkeypatch, 256, num_splits=2) == 2
    assert kernels_called(monkeypatch, 256, implementation="flash_decode") == 1
    assert kernels_called(monkeypatch, 256, implementation="xla") == 0
    # Few heads leave most multiprocessors without a block of the wide-query kernel.
    assert kernels_called(monkeypatch, 256, heads=(16, 2)) == 2


def test_which_kernels_is_explained(monkeypatch):
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: None)
    for T, kind in ((128, "split-KV kernels"), (256, "wide-query kernel")):
        q, k, v, _ = inputs(1, T, 512, 64, 8, 64)
        choice = explain_attention(q, k, v, 200)
        assert str(choice).startswith("flash_decode: the kernels for this GPU; ")
        assert kind in choice.how
        asked = explain_attention(q, k, v, 200, implementation="flash_decode")
        assert (asked.reason, asked.how) == ("asked for", choice.how)


# Microseconds of both kernels on an H200, 32768 tokens in the cache: (T, heads, wide, split).
MEASURED = [
    (17, (64, 8), 415.9, 66.9), (32, (64, 8), 414.7, 82.0), (64, (64, 8), 415.2, 153.1),
    (96, (64, 8), 421.3, 232.9), (128, (64, 8), 421.8, 292.1), (256, (64, 8), 424.5, 576.9),
    (17, (16, 2), 415.0, 23.3), (64, (16, 2), 414.1, 44.3), (128, (16, 2), 416.5, 79.8),
    (256, (16, 2), 417.4, 151.7),
]  # fmt: skip


@pytest.mark.parametrize(("T", "heads", "wide", "split"), MEASURED)
def test_the_rule_tells_which_was_faster(T, heads, wide, split):
    N, K = heads
    assert wide_is_faster((1, T, N, 128), (1, 32768, K, 128)) == (wide < split)
