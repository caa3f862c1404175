"""Attention to a cache cut over devices: parts against counting, results against the oracle."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_runs import count_compiles
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import collectives, dealt, make_mesh, seq_mesh
from reference import (
    DTYPES,
    Case,
    assert_close,
    low_precision_attention,
    make_case,
    reference_attention,
)

from jaxdecode.pallas_kernels import (
    Part,
    combine_partials,
    decode_attention,
    merge_columns,
    sharded_decode_attention,
)

SINKS = np.array([-1.0, 0.5, 2.0, 6.0], np.float32)
S = 64


# Parts
def hands(count: int, block: int, positions: int) -> list[list[int]]:
    """The positions that each part holds, in the order of its slots."""
    dealt_to = [[] for _ in range(count)]
    for position in range(positions):
        dealt_to[position // block % count].append(position)
    return dealt_to


@given(st.integers(1, 9), st.integers(1, 17), st.integers(1, 4), st.data())
def test_parts_deal_positions_like_cards(count, block, rounds, data):
    capacity = count * block * rounds
    held = hands(count, block, capacity)
    assert sorted(itertools.chain(*held)) == list(range(capacity))
    lengths = np.array(data.draw(st.lists(st.integers(0, capacity), min_size=1)), np.int32)
    positions = np.arange(capacity, dtype=np.int32)
    for index, mine in enumerate(held):
        part = Part(index, count, block)
        slot, is_mine = part.slot(positions)
        assert positions[np.asarray(is_mine)].tolist() == mine
        assert np.asarray(slot)[mine].tolist() == list(range(len(mine)))
        expected = [sum(p < length for p in mine) for length in lengths]
        assert np.asarray(part.length(lengths)).tolist() == expected


@given(st.integers(1, 8), st.integers(1, 200))
def test_one_block_per_part_is_contiguous(count, slots):
    for index in range(count):
        part = Part(index, count, slots)
        _, mine = part.slot(np.arange(count * slots, dtype=np.int32))
        assert np.flatnonzero(mine).tolist() == list(range(index * slots, (index + 1) * slots))


def test_parts_of_a_million_positions():
    part = Part(3, 8, 128)
    lengths = np.array([2**20, 2**20 - 1, 2**20 + 3 * 128 + 5, 2**31 - 1], np.int32)
    assert np.asarray(part.length(lengths)).tolist() == [2**17, 2**17, 2**17 + 5, 2**28]
    slot, mine = part.slot(np.array([2**20 + 3 * 128 + 5, 2**31 - 1], np.int32))
    assert (slot.tolist(), np.asarray(mine).tolist()) == ([2**17 + 5, 2**28 - 1], [True, False])


# Against the oracle
def run(case: Case, count: int, block: int | None = None, *, mesh=None, dealt_by=None, **options):
    """(out, lse) of the case, its keys dealt by `block`, or wrongly by `dealt_by`."""
    mesh = seq_mesh(count) if mesh is None else mesh
    size = dealt_by or block or case.k.shape[1] // count
    k, v = (dealt(x, count, size) for x in (case.k, case.v))
    results = sharded_decode_attention(
        *(jnp.asarray(x) for x in (case.q, k, v, case.kv_len)),
        mesh=mesh, block=block, return_lse=True, **options,
    )  # fmt: skip
    return jax.tree.map(np.asarray, results)


def check(case: Case, count: int, block: int | None = None, *, out_dtype=None, how=None, **options):
    """Runs the case and fails unless out and lse are as good as the tolerance demands.

    `how` are the arguments of `run` and of the call that change no result."""
    out, lse = run(case, count, block, out_dtype=out_dtype, **(how or {}), **options)
    inputs = (case.q, case.k, case.v, case.kv_len)
    ref, ref_lse = reference_attention(*inputs, **options)
    low = low_precision_attention(*inputs, **options, out_dtype=out_dtype)
    assert_close(out, ref, low, case.q.dtype, lse=lse, ref_lse=ref_lse)
    return out, lse


RAGGED = [0, 5, S]


@pytest.mark.parametrize(
    ("count", "block", "K"),
    [
        (1, None, 2), (2, None, 4), (2, None, 1), (4, 8, 2), (4, 8, 1),
        (8, None, 4), (8, 2, 2), (8, 2, 1),
    ],
)  # fmt: skip
def test_any_number_of_devices_and_kv_heads(count, block, K):
    # Needles at both sides of every border between devices.
    case = make_case(RAGGED, 1, 4, K, 16, S=S, edge=block or S // count)
    out, lse = check(case, count, block)
    # Five tokens leave most devices without any, and none leave all of them so.
    assert not out[0].any()
    assert np.isneginf(lse[0]).all()


OPTIONS = {
    "several queries": (dict(), 4, 8),
    "queries before the end": (dict(q_start=np.array([0, 2, 30], np.int32)), 4, 8),
    "queries before the start": (dict(q_start=np.array([-2, -1, 3], np.int32)), 4, 8),
    "window": (dict(window=7), 4, 8),
    "queries past the end": (dict(q_start=np.array([5, 64, 100], np.int32), window=7), 4, 8),
    "window of one": (dict(window=1), 8, None),
    "window, contiguous": (dict(window=20), 4, None),
    "softcap, scale": (dict(softcap=8.0, scale=0.3), 2, 4),
    "sinks": (dict(sinks=SINKS), 4, 8),
    "all": (dict(window=40, softcap=8.0, sinks=SINKS, scale=0.3), 8, 4),
}


@pytest.mark.parametrize(("options", "count", "block"), OPTIONS.values(), ids=OPTIONS)
def test_options(options, count, block):
    case = make_case(RAGGED, 3, 4, 2, 16, S=S, edge=block or S // count)
    check(case, count, block, **options)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_16_bits(name):
    case = make_case(RAGGED, 2, 4, 2, 16, S=S, edge=8, dtype=name)
    out, _ = check(case, 4, 8)
    assert out.dtype == DTYPES[name]


def test_the_merge_is_in_float32_whatever_the_inputs():
    case = make_case(RAGGED, 2, 4, 2, 16, S=S, edge=8, dtype="bfloat16")
    exact, _ = check(case, 4, 8, out_dtype=np.float32)
    rounded, _ = run(case, 4, 8)
    np.testing.assert_array_equal(exact.astype(rounded.dtype), rounded)
    assert (exact != rounded.astype(np.float32)).any()


def test_sinks_count_once_whatever_the_number_of_devices():
    """Of eight devices each adding them, an empty row would have log 8 more."""
    case = make_case([0, 0, 0], 1, S=S, H=16)
    _, lse = run(case, 8, sinks=jnp.asarray(SINKS))
    np.testing.assert_allclose(lse, np.broadcast_to(SINKS, lse.shape), rtol=1e-6)


@pytest.mark.parametrize(("count", "block"), [(4, None), (8, 2)])
def test_dead_slots_never_matter(count, block):
    case = make_case(RAGGED, 3, 4, 2, 16, S=S)
    expected = run(case, count, block)
    for bad in (np.nan, np.inf):
        got = run(case.with_dead_slots(bad, bad), count, block)
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_the_oracle_sees_another_way_of_dealing():
    """The planted fault: keys dealt by other blocks than the call says."""
    case = make_case(RAGGED, 1, 4, 2, 16, S=S, edge=4)
    with pytest.raises(AssertionError, match="sequence 1"):
        check(case, 4, 8, how=dict(dealt_by=4))
    check(case, 4, 8)


# More axes
AXES = {
    "heads": (dict(tensor=2), dict(head_axis="tensor")),
    "both": (dict(data=2, tensor=2), dict(batch_axis="data", head_axis="tensor")),
    "batch over two": (dict(host=2, data=2), dict(batch_axis=("host", "data"))),
    "an unused axis": (dict(other=2), dict()),
}


@pytest.mark.parametrize(("sizes", "axes"), AXES.values(), ids=AXES)
def test_batch_and_heads_may_be_cut_too(sizes, axes):
    case = make_case([0, 5, 33, S], 2, 4, 2, 16, S=S, edge=8)
    check(case, 2, 8, how=dict(mesh=seq_mesh(2, **sizes), **axes), sinks=SINKS)


def placed(mesh, x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_results_lie_as_the_queries_and_arrays_are_moved_where_they_belong(kind):
    case = make_case([5, S], 1, 4, 2, 16, S=S)
    mesh = seq_mesh(2, kind, data=2, tensor=2)
    call = functools.partial(
        sharded_decode_attention, mesh=mesh, batch_axis="data", head_axis="tensor", return_lse=True
    )
    inputs = [jnp.asarray(x) for x in (case.q, case.k, case.v, case.kv_len)]
    elsewhere = [placed(mesh, x, *[None] * (x.ndim - 1), "data") for x in inputs[:3]]
    expected = decode_attention(*inputs, return_lse=True)
    for function, operands in (
        (call, inputs), (jax.jit(call), [*elsewhere, inputs[3]])
    ):  # fmt: skip
        for x, y in zip(function(*operands), expected, strict=True):
            np.testing.assert_allclose(x, y, atol=5e-6)
            lies = NamedSharding(mesh, P("data", None, "tensor"))
            assert x.sharding.is_equivalent_to(lies, x.ndim)


@pytest.mark.parametrize("explicit", ["data", "seq"])
def test_axes_of_both_kinds(explicit):
    case = make_case([5, S], 1, 4, 2, 16, S=S)
    kinds = tuple(
        AxisType.Explicit if axis == explicit else AxisType.Auto for axis in ("data", "seq")
    )
    mesh = jax.make_mesh((2, 2), ("data", "seq"), axis_types=kinds)
    inputs = [jnp.asarray(x) for x in (case.q, case.k, case.v, case.kv_len)]
    for batch_axis in (None, "data"):
        got = sharded_decode_attention(*inputs, mesh=mesh, batch_axis=batch_axis)
        np.testing.assert_allclose(got, decode_attention(*inputs), atol=5e-6)


# Invariance
@functools.cache
def jitted(count: int, block: int | None, window: int | None):
    def call(q, k, v, kv_len, q_start):
        return sharded_decode_attention(
            q, k, v, kv_len, mesh=seq_mesh(count), block=block, q_start=q_start, window=window,
            return_lse=True,
        )  # fmt: skip

    return jax.jit(call)


@functools.cache
def jitted_whole(window: int | None):
    def call(q, k, v, kv_len, q_start):
        return decode_attention(q, k, v, kv_len, q_start=q_start, window=window, return_lse=True)

    return jax.jit(call)


LONG = make_case([S, S], 3, 4, 2, 16, S=S, edge=8)


@settings(max_examples=30)
@given(
    st.sampled_from([(2, 32, None), (4, 8, 9), (8, 1, None), (8, 8, 9)]),
    st.lists(st.integers(-3, S + 3), min_size=2, max_size=2),
    st.lists(st.integers(-5, S + 5), min_size=2, max_size=2),
)
def test_any_lengths_on_any_devices_equal_one_device(layout, kv_len, q_start):
    count, block, window = layout
    lengths = jnp.asarray(kv_len, jnp.int32), jnp.asarray(q_start, jnp.int32)
    k, v = (dealt(x, count, block) for x in (LONG.k, LONG.v))
    got = jitted(count, block, window)(LONG.q, k, v, *lengths)
    out, lse = jitted_whole(window)(LONG.q, LONG.k, LONG.v, *lengths)
    np.testing.assert_allclose(got[0], out, atol=1e-5)
    np.testing.assert_allclose(got[1], lse, rtol=1e-5, atol=1e-5)


def test_scalars_wide_integers_and_numpy_are_taken():
    case = make_case([20, 20], 2, 4, 2, 16, S=S)
    k, v = dealt(case.k, 4, 16), dealt(case.v, 4, 16)
    expected = sharded_decode_attention(case.q, k, v, case.kv_len, mesh=seq_mesh(4))
    for kv_len in (20, np.int64(20), jnp.asarray(20), np.array([20, 20], np.uint8)):
        got = sharded_decode_attention(case.q, k, v, kv_len, mesh=seq_mesh(4), q_start=18)
        np.testing.assert_array_equal(got, expected)


def test_calls_with_equal_shapes_share_one_program():
    """Also outside of jit, where shard_map alone would compile each operation at each call."""
    case, mesh = make_case([5, 9], 1, 4, 2, 16, S=S), seq_mesh(2)
    inputs = [jnp.asarray(x) for x in (case.q, case.k, case.v, case.kv_len)]

    def call():
        sharded_decode_attention(*inputs, mesh=mesh, softcap=3.5)

    assert count_compiles(call) >= 1
    assert count_compiles(call) == 0


def test_one_collective_merges_the_parts():
    case, mesh = make_case([5, 9], 3, 4, 2, 16, S=S), seq_mesh(4)
    call = functools.partial(sharded_decode_attention, mesh=mesh, block=4)
    k, v = (placed(mesh, x, None, "seq") for x in (case.k, case.v))
    q, kv_len = placed(mesh, case.q), placed(mesh, case.kv_len)
    hlo = jax.jit(call).lower(q, k, v, kv_len).compile().as_text()
    B, T, N, H = q.shape
    assert collectives(hlo) == [("all-gather", 4 * B * T * N * (H + 1))]
    # The count would see keys that are not where they belong.
    moved = placed(mesh, case.k, None, None, None, "seq")
    hlo = jax.jit(call).lower(q, moved, v, kv_len).compile().as_text()
    assert len(collectives(hlo)) > 1


# Merging
def test_merge_columns_leaves_each_device_its_share_of_what_combine_gives():
    rng = np.random.default_rng(0)
    out = rng.standard_normal((8, 2, 3, 4, 16)).astype(np.float32)
    lse = (10 * rng.standard_normal((8, 2, 3, 4))).astype(np.float32)
    lse[3], out[3] = -np.inf, np.nan
    lse[:, 0, 0, 0] = -np.inf
    expected, _ = combine_partials(out, lse)
    for sizes, axes in (((8,), "seq"), ((8,), ("seq",)), ((2, 4), ("host", "seq"))):
        names = (axes,) if isinstance(axes, str) else axes
        mapped = jax.shard_map(
            lambda out, lse, axes=axes: merge_columns(out[0], lse[0], axes),
            mesh=make_mesh(sizes, names), in_specs=(P(names), P(names)),
            out_specs=P(None, None, None, names),
        )  # fmt: skip
        merged = jax.jit(mapped)(out, lse)
        assert merged.addressable_data(0).shape == (2, 3, 4, 2)
        np.testing.assert_allclose(merged, expected, atol=1e-6)
    assert not np.asarray(merged)[0, 0, 0].any()
