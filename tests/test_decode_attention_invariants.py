"""What must not change decode_attention's answer, and what must not cost memory or compilation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_runs import IMPLEMENTATIONS, count_compiles, run
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Case, make_case, visible_slots

from jaxdecode.pallas_kernels.combine import combine_partials
from jaxdecode.pallas_kernels.decode_attention import decode_attention, visible_ranges

pytestmark = [
    pytest.mark.contract,
    pytest.mark.parametrize("implementation", IMPLEMENTATIONS),
]

B, T, N, K, H, S = 3, 4, 6, 2, 16, 600
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
SINKS = np.array([-2.0, 0.5, 3.0, 30.0, 7.0, -40.0], np.float32)

seeds = st.integers(0, 2**32 - 1)
lengths = st.lists(st.integers(0, S), min_size=B, max_size=B)
few = settings(max_examples=12)


def case_of(kv_len, seed, capacity=S):
    return make_case(kv_len, T, N, K, H, S=capacity, seed=seed, edge=128)


def same(got, expected, atol=5e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=2e-6), got, expected)


def bit_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@few
@given(kv_len=st.lists(st.integers(0, 100), min_size=B, max_size=B), seed=seeds)
def test_capacity(implementation, kv_len, seed):
    case = case_of(kv_len, seed, capacity=100)
    expected = run(case, implementation)
    for capacity in (101, 200, 1600):
        pad = [(0, 0), (0, capacity - 100), (0, 0), (0, 0)]
        k, v = (np.pad(x, pad, constant_values=np.nan) for x in (case.k, case.v))
        same(run(dataclasses.replace(case, k=k, v=v), implementation), expected)


@few
@given(kv_len=lengths, seed=seeds, dead=st.tuples(st.floats(width=32), st.floats(width=32)))
def test_content_past_kv_len(implementation, kv_len, seed, dead):
    case = case_of(kv_len, seed)
    bit_equal(run(case.with_dead_slots(*dead), implementation), run(case, implementation))


@few
@given(kv_len=lengths, seed=seeds, order=st.permutations(range(B)))
def test_batch_order(implementation, kv_len, seed, order):
    case = case_of(kv_len, seed)
    moved = Case(*(x[order] for x in dataclasses.astuple(case)))
    expected = [x[order] for x in run(case, implementation)]
    bit_equal(run(moved, implementation), tuple(expected))


@few
@given(kv_len=lengths, seed=seeds)
def test_a_batch_equals_its_rows(implementation, kv_len, seed):
    case = case_of(kv_len, seed)
    rows = [
        run(Case(*(x[[b]] for x in dataclasses.astuple(case))), implementation) for b in range(B)
    ]
    same(run(case, implementation), tuple(np.concatenate(x) for x in zip(*rows, strict=True)))


@few
@given(kv_len=lengths, seed=seeds)
def test_kv_head_order(implementation, kv_len, seed):
    case = case_of(kv_len, seed)
    q = case.q.reshape(B, T, K, N // K, H)[:, :, ::-1].reshape(case.q.shape)
    moved = Case(q, case.k[:, :, ::-1], case.v[:, :, ::-1], case.kv_len)
    out, lse = run(case, implementation)
    expected = [x.reshape(B, T, K, N // K, -1)[:, :, ::-1].reshape(x.shape) for x in (out, lse)]
    same(run(moved, implementation), tuple(expected))


@few
@given(kv_len=lengths, seed=seeds, window=st.sampled_from([None, 3, 200]))
def test_tokens_at_once_equal_one_by_one(implementation, kv_len, seed, window):
    case = case_of(kv_len, seed)
    steps = []
    for t in range(T):
        written = np.maximum(case.kv_len - T + t + 1, 0)
        step = Case(case.q[:, [t]], case.k, case.v, written).with_dead_slots(np.nan, np.nan)
        steps.append(run(step, implementation, window=window))
    steps = tuple(np.concatenate(x, axis=1) for x in zip(*steps, strict=True))
    same(run(case, implementation, window=window), steps)


@few
@given(
    kv_len=lengths, seed=seeds, cut=st.sampled_from([1, 300]), window=st.sampled_from([None, 150])
)
def test_parts_merge_to_the_whole(implementation, kv_len, seed, cut, window):
    case = case_of(kv_len, seed)

    def part(first, last):
        held = np.clip(case.kv_len - first, 0, last - first)
        keys = Case(case.q, case.k[:, first:last], case.v[:, first:last], held)
        return run(keys, implementation, q_start=case.kv_len - T - first, window=window)

    parts = [jnp.stack(x) for x in zip(part(0, cut), part(cut, S), strict=True)]
    same(combine_partials(*parts), run(case, implementation, window=window))


int32 = st.integers(INT_MIN, INT_MAX)
near = st.integers(-5, 30)


@settings(max_examples=200)
@given(
    kv_len=near | int32,
    q_start=st.none() | near | st.integers(INT_MIN, INT_MAX - T),
    window=st.none() | st.integers(1, 30) | st.integers(1, INT_MAX) | st.just(2**40),
)
def test_visible_ranges_are_the_definition(implementation, kv_len, q_start, window):
    capacity = 20
    start = None if q_start is None else np.array([q_start], np.int32)
    lo, hi = visible_ranges(np.array([kv_len], np.int32), T, capacity, q_start=start, window=window)
    lo, hi = np.asarray(lo), np.asarray(hi)
    assert lo.shape == hi.shape == (1, T)
    assert min(lo.min(), hi.min()) >= 0
    assert max(lo.max(), hi.max()) <= capacity
    for t in range(T):
        expected = visible_slots(0, t, T, capacity, kv_len, q_start, window)
        np.testing.assert_array_equal(np.arange(lo[0, t], hi[0, t]), expected)


def test_jit_equals_no_jit(implementation):
    case = make_case([0, 5, 700], T=3, N=6, K=2)
    options = dict(window=300, softcap=15.0, sinks=SINKS)
    jitted, plain = (run(case, implementation, jit=jit, **options) for jit in (True, False))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6, rtol=2e-6), jitted, plain)


def test_vmap_equals_loop(implementation):
    cases = [make_case([0, 9, 40], T=2, S=40, seed=seed) for seed in range(3)]
    lengths = [[0, 9, 40], [1, 2, 3], [39, 40, 8]]
    cases = [
        dataclasses.replace(case, kv_len=np.array(kv_len, np.int32))
        for case, kv_len in zip(cases, lengths, strict=True)
    ]
    expected = [run(case, implementation, window=20)[0] for case in cases]
    stacked = [np.stack(x) for x in zip(*map(dataclasses.astuple, cases), strict=True)]

    def call(q, k, v, kv_len):
        return decode_attention(q, k, v, kv_len, window=20, implementation=implementation)

    np.testing.assert_allclose(jax.vmap(call)(*stacked), expected, atol=2e-6)
    one_cache = jax.vmap(call, in_axes=(0, None, None, None))
    q, k, v, kv_len = stacked
    each = [call(x, k[0], v[0], kv_len[0]) for x in q]
    np.testing.assert_allclose(one_cache(q, k[0], v[0], kv_len[0]), np.stack(each), atol=2e-6)


# The second is a prefill against a long cache, the last a batch that shares no prefix.
BIG = {
    "B1-T1-S131072-N64-K8-H128": (1, 1, 131072, 64, 8, 128),
    "B1-T512-S131072-N32-K8-H128": (1, 512, 131072, 32, 8, 128),
    "B4-T17-S65536-N28-K4-H128": (4, 17, 65536, 28, 4, 128),
    "B64-T1-S8192-N9-K3-H64": (64, 1, 8192, 9, 3, 64),
}


def temporary_bytes(function, sizes, dtype):
    B, T, S, N, K, H = sizes
    q, kv = jax.ShapeDtypeStruct((B, T, N, H), dtype), jax.ShapeDtypeStruct((B, S, K, H), dtype)
    compiled = jax.jit(function).lower(q, kv, kv, jax.ShapeDtypeStruct((B,), jnp.int32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "bfloat16") for name in BIG), (next(iter(BIG)), "float32")]
)
def test_temporaries_are_bounded(implementation, name, dtype):
    def call(q, k, v, kv_len):
        return decode_attention(q, k, v, kv_len, implementation=implementation, return_lse=True)

    assert temporary_bytes(call, BIG[name], dtype) <= 256e6


def test_repeated_heads_would_be_noticed(implementation):
    def repeating(q, k, v, kv_len):
        k, v = (jnp.repeat(x, 8, axis=2) for x in (k, v))
        return jnp.einsum("btns,bsnh->btnh", jnp.einsum("btnh,bsnh->btns", q, k), v)

    assert temporary_bytes(repeating, BIG["B1-T1-S131072-N64-K8-H128"], jnp.float32) > 256e6


def test_second_call_compiles_nothing(implementation):
    case = make_case([5, 700], T=2, S=700)

    def call():
        decode_attention(*dataclasses.astuple(case), implementation=implementation)

    call()
    assert count_compiles(call) == 0
    assert count_compiles(lambda: jax.jit(lambda x: x + 1)(jnp.zeros(3))) >= 1
