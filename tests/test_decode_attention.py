"""The contract of decode_attention, for every implementation, against the float64 oracle."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_runs import IMPLEMENTATIONS, check, run
from reference import (
    DTYPES,
    assert_close,
    assert_lse_close,
    low_precision_attention,
    make_case,
    reference_attention,
)

from jaxdecode.pallas_kernels.decode_attention import decode_attention

HEADS = [(8, 8), (8, 1), (9, 3), (28, 4), (64, 8)]
HEAD_DIMS = [64, 80, 96, 128, 192, 256]
# Empty, one slot, and both sides of every edge that a block of a power of two can have; S = 1100.
EDGES = [0, 1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 1100]
INT_MIN, INT_MAX = -(2**31), 2**31 - 1

pytestmark = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.mark.parametrize("H", HEAD_DIMS)
@pytest.mark.parametrize("heads", HEADS, ids="N{0[0]}-K{0[1]}".format)
def test_heads_and_head_dims(implementation, heads, H):
    N, K = heads
    # A Latin arrangement: every dtype and every T meets every head layout and every head_dim.
    row, column = HEADS.index(heads), HEAD_DIMS.index(H)
    dtype = list(DTYPES)[(row + column) % 3]
    T = [1, 5, 1, 2, 1, 17][(2 * row + column) % 6]
    case = make_case([0, 1, 17, 128, 129, 200], T, N, K, H, S=200, dtype=dtype, edge=64)
    check(case, implementation)


@pytest.mark.parametrize(
    ("T", "dtype"), [(1, x) for x in DTYPES] + list(zip([17, 2, 5], DTYPES, strict=True))
)
def test_ragged_lengths_at_every_edge(implementation, T, dtype):
    check(make_case(EDGES, T, N=6, K=2, S=1100, dtype=dtype, edge=128), implementation)


def test_many_queries(implementation):
    # So many that the rows of one block of logits no longer fit a block of the usual length.
    case = make_case([0, 700, 611], T=700, N=32, K=2, H=32, S=700, dtype="bfloat16", edge=128)
    check(case, implementation)


SINKS = np.array([-2.0, 0.5, 3.0, 30.0, 7.0, -40.0], np.float32)
OPTIONS = {
    "window1": dict(window=1),
    "window7": dict(window=7),
    "window600": dict(window=600),
    "window_longer_than_cache": dict(window=5000),
    "window_int_max": dict(window=INT_MAX),
    "softcap": dict(softcap=12.0),
    "scale": dict(scale=0.3),
    "scale_negative": dict(scale=-0.1, softcap=9.0),
    "scale_zero": dict(scale=0.0),
    "sinks": dict(sinks=SINKS),
    "sinks_in_bfloat16": dict(sinks=SINKS.astype(DTYPES["bfloat16"])),
    "all": dict(window=100, softcap=20.0, scale=0.2, sinks=SINKS, q_start=[0, -4, 90, 300, 1090]),
    "q_start_array": dict(q_start=[0, -1, 2, 131, 800]),
    "q_start_scalar": dict(q_start=np.int32(40)),
    "q_start_past_the_end": dict(q_start=[3, 400, 1000, 1024, 1500]),
    "q_start_far": dict(q_start=[INT_MAX - 8, INT_MIN, -(2**30), 2**30, 0], window=1200),
}


# One shape for those that only differ in q_start, which is traced: they share a compilation.
MIXES = [(1, "bfloat16"), (5, "float32"), (2, "float16"), (5, "bfloat16")]


@pytest.mark.parametrize("name", OPTIONS)
def test_options(implementation, name):
    options = OPTIONS[name]
    only_q_start = options.keys() == {"q_start"}
    T, dtype = MIXES[1 if only_q_start else list(OPTIONS).index(name) % 4]
    scale, window = options.get("scale") or None, options.get("window", 1)
    # The last slot that the window hides and the first that it shows are needles too.
    needles = [length - window - back for length in (140, 1024) for back in (0, 1)]
    lengths = [0, 3, 140, 1024, 1100]
    case = make_case(lengths, T, 6, 2, S=1100, dtype=dtype, scale=scale, needles=needles)
    check(case, implementation, **options)


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("bfloat16", "float16"),
    ],
)
def test_out_dtype(implementation, dtype, out_dtype):
    case = make_case([9, 70, 0], T=2, dtype=dtype)
    check(case, implementation, out_dtype=np.dtype(DTYPES[out_dtype]))


def test_lse_only_when_asked(implementation):
    case = make_case([9, 70, 0], T=2)
    alone = jax.jit(lambda *x: decode_attention(*x, implementation=implementation))
    out = alone(*dataclasses.astuple(case))
    assert isinstance(out, jax.Array)
    np.testing.assert_array_equal(out, run(case, implementation)[0])


def test_forms_of_kv_len_agree(implementation):
    q, k, v, _ = dataclasses.astuple(make_case([70, 70, 70], T=2, S=80))

    def call(kv_len):
        return decode_attention(q, k, v, kv_len, implementation=implementation)

    expected = call(np.full(3, 70, np.int32))
    for kv_len in [
        70, np.int64(70), jnp.asarray(70), jnp.asarray(70, jnp.uint32),
        np.full(3, 70), np.full(3, 70, np.uint64), np.full(3, 70, np.int8),
    ]:  # fmt: skip
        np.testing.assert_array_equal(call(kv_len), expected)


def test_default_q_start_puts_the_last_query_last(implementation):
    case = make_case([3, 20, 33], T=5, S=40)
    expected = run(case, implementation)
    given_start = run(case, implementation, q_start=case.kv_len - 5)
    jax.tree.map(np.testing.assert_array_equal, given_start, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_empty_rows_are_exact(implementation, dtype):
    case = make_case([0, 2, 40], T=3, N=6, K=2, dtype=dtype)
    out, lse = run(case.with_dead_slots(np.nan, np.inf), implementation)
    assert not out[0].any()
    assert not out[1, 0].any()  # kv_len 2, three queries: the first stands before slot 0
    assert out[1, 1:].all()
    np.testing.assert_array_equal(np.isneginf(lse[:, :, 0]), [[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    sunk_out, sunk_lse = run(case, implementation, sinks=SINKS)
    assert not sunk_out[0].any()
    np.testing.assert_array_equal(sunk_lse[0], np.tile(SINKS, (3, 1)))


@pytest.mark.parametrize(
    ("T", "dtype"), [(1, "float32"), (1, "bfloat16"), (4, "float16"), (4, "bfloat16")]
)
def test_dead_slots_never_matter(implementation, T, dtype):
    case = make_case([0, 1, 64, 513, 600], T, S=600, dtype=dtype)
    expected = run(case.with_dead_slots(0, 0), implementation)
    largest = float(jnp.finfo(dtype).max)
    for dead in [(np.nan, np.nan), (np.nan, np.inf), (np.inf, -np.inf), (largest, largest)]:
        got = run(case.with_dead_slots(*dead), implementation)
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_slots_left_of_the_window_never_matter(implementation):
    case = make_case([600, 90], T=3, S=600)
    expected = run(case, implementation, window=50)
    for b, length in enumerate(case.kv_len):
        case.k[b, : length - 52], case.v[b, : length - 52] = np.nan, np.inf
    jax.tree.map(np.testing.assert_array_equal, run(case, implementation, window=50), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_reaches_only_the_queries_that_see_it(implementation, bad):
    case = make_case([40, 40], T=4)
    clean, clean_lse = run(case, implementation)
    case.v[0, 38] = bad  # seen by the last two of the four queries of sequence 0
    out, lse = run(case, implementation)
    assert not np.isfinite(out[0, 2:]).any()
    np.testing.assert_allclose(out[0, :2], clean[0, :2], atol=1e-6, rtol=1e-6)
    np.testing.assert_array_equal(out[1], clean[1])
    case.k[0, 38] = np.nan
    out, lse = run(case, implementation)
    np.testing.assert_allclose(out[0, :2], clean[0, :2], atol=1e-6, rtol=1e-6)
    np.testing.assert_array_equal(lse[0, :2], clean_lse[0, :2])
    assert np.isnan(lse[0, 2:]).all()


def test_traced_kv_len_is_clamped(implementation):
    case = make_case([60] * 5, T=2, S=60)
    case.k[1::2], case.v[1::2] = np.nan, np.nan  # canaries: what lies behind sequences 0 and 2
    wild = np.array([1000, 0, INT_MAX, -7, INT_MIN], np.int32)
    out, lse = run(dataclasses.replace(case, kv_len=wild), implementation)
    everything = dataclasses.replace(case, kv_len=np.array([60, 0, 60, 0, 0], np.int32))
    # The queries stand at the end of the length that was given, past every slot there is.
    expected, expected_lse = run(everything, implementation, q_start=[60, 0, 60, 0, 0])
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)
    assert not out[[1, 3, 4]].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_64k_slots_with_needles(implementation, dtype):
    check(make_case([65535], T=1, N=4, K=2, S=65536, dtype=dtype, edge=512), implementation)


def swapped(case):
    return dataclasses.replace(case, k=case.v, v=case.k)


def longer(case):
    return dataclasses.replace(case, kv_len=case.kv_len + 1)


def shorter(case):
    return dataclasses.replace(case, kv_len=case.kv_len - 1)


def without_block(case):
    k = case.k.copy()
    k[:, 4096:4224] = 0  # next to the needles, a logit of zero weighs nothing
    return dataclasses.replace(case, k=k)


def without_needle(case):
    k = case.k.copy()
    k[:, 8191] = 0
    return dataclasses.replace(case, k=k)


def heads_crossed(case):
    return dataclasses.replace(case, k=case.k[:, :, ::-1], v=case.v[:, :, ::-1])


def rows_crossed(case):
    return dataclasses.replace(case, k=case.k[::-1], v=case.v[::-1])


@functools.cache
def long_case(dtype):
    case = make_case([16000, 15999], T=1, S=16384, dtype=dtype, edge=512)
    inputs = dataclasses.astuple(case)
    return case, *reference_attention(*inputs), low_precision_attention(*inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "wrong",
    [swapped, longer, shorter, without_block, without_needle, heads_crossed, rows_crossed],
)
def test_the_comparison_rejects(implementation, wrong, dtype):
    case, ref, ref_lse, low = long_case(dtype)
    out, lse = run(case, implementation)
    assert_close(out, ref, low, case.q.dtype, lse=lse, ref_lse=ref_lse)
    out, lse = run(wrong(case), implementation)
    with pytest.raises(AssertionError, match="error"):
        assert_close(out, ref, low, case.q.dtype)
    with pytest.raises(AssertionError, match="error"):
        assert_lse_close(lse, ref_lse)


def test_repeated_calls_are_bit_equal(implementation):
    case = make_case([700, 3], T=2, dtype="bfloat16")
    first = run(case, implementation)
    for _ in range(10):
        jax.tree.map(np.testing.assert_array_equal, run(case, implementation), first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["huge", "equal", "one_hot", "denormal"])
def test_extreme_logits(implementation, kind, dtype):
    case = make_case([40, 600, 2], T=2, N=4, K=2, H=64, dtype=dtype)
    if kind == "huge":  # thousands and tens of thousands, where exp overflows any type
        q, k = case.q * 0 + case.q.dtype.type(100), np.sign(case.k) * case.k.dtype.type(62)
    elif kind == "equal":
        q, k = case.q, case.k * 0
    elif kind == "one_hot":
        q, k = case.q * 0 + case.q.dtype.type(32), case.k * 0
        k[:, 0] = 100
    else:
        tiny = case.k.dtype.type(jnp.finfo(dtype).smallest_normal / 4)
        q, k = case.q, np.sign(case.k) * tiny
    case = dataclasses.replace(case, q=q, k=k)
    out, lse = run(case, implementation)
    ref, ref_lse = reference_attention(*dataclasses.astuple(case))
    assert np.isfinite(lse).all()
    assert_close(out, ref, low_precision_attention(*dataclasses.astuple(case)), q.dtype)
    np.testing.assert_allclose(lse, ref_lse, rtol=1e-5, atol=1e-5)
