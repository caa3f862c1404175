"""combine_partials: any split of the keys, in any order, merges to attention over all of them."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from meshes import collectives
from reference import DTYPES, reference_attention

from jaxdecode.pallas_kernels.combine import combine_partials

SPLITS = [1, 2, 3, 5, 17, 32, 55, 97, 133]
ROWS, H = (2, 3, 4), 8  # [B, T, N]


def parts(C, seed=0, dtype=np.float32, rows=ROWS):
    """out [C, *rows, H] and lse [C, *rows] of parts that differ in weight by many orders."""
    rng = np.random.default_rng(seed)
    out = rng.standard_normal((C, *rows, H)).astype(dtype)
    return out, (10 * rng.standard_normal((C, *rows))).astype(np.float32)


def merge64(out, lse):
    """The definition in float64, over axis 0. Parts with lse = -inf are not there."""
    out, lse = np.asarray(out, np.float64), np.asarray(lse, np.float64)
    merged, total = np.zeros(out.shape[1:]), np.full(lse.shape[1:], -np.inf)
    for row in np.ndindex(lse.shape[1:]):
        here = [c for c in range(len(lse)) if lse[(c, *row)] > -np.inf]
        if here:
            weights = np.exp([lse[(c, *row)] - max(lse[(d, *row)] for d in here) for c in here])
            merged[row] = sum(w * out[(c, *row)] for w, c in zip(weights, here, strict=True))
            merged[row] /= weights.sum()
            total[row] = max(lse[(c, *row)] for c in here) + np.log(weights.sum())
    return merged, total


def assert_equal(got, expected, atol=1e-6):
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(x).astype(np.float64), y, atol=atol, rtol=1e-6)


@pytest.mark.parametrize("C", SPLITS)
def test_random_splits_of_attention(C):
    rng = np.random.default_rng(C)
    S, N, K = 150, 4, 2
    q = rng.standard_normal((1, 1, N, H))
    k, v = rng.standard_normal((2, 1, S, K, H))
    cuts = [0, *np.sort(rng.integers(0, S, C - 1)), S]  # two equal cuts: a part without keys
    results = [
        reference_attention(q, k[:, low:high], v[:, low:high], high - low)
        for low, high in itertools.pairwise(cuts)
    ]
    out, lse = (np.stack(x).astype(np.float32) for x in zip(*results, strict=True))
    assert_equal(combine_partials(out, lse), reference_attention(q, k, v, S))


@pytest.mark.parametrize("C", SPLITS)
def test_definition_with_half_of_the_parts_empty(C):
    out, lse = parts(C)
    empty = np.random.default_rng(1).random(lse.shape) < 0.5
    lse[empty], out[empty] = -np.inf, np.nan
    expected = merge64(out, lse)
    got = combine_partials(out, lse)
    assert np.isfinite(got[0]).all()
    assert_equal(got, expected, atol=5e-6)
    out[empty] = np.inf
    jax.tree.map(np.testing.assert_array_equal, combine_partials(out, lse), got)


@pytest.mark.parametrize("fill", [0.0, np.nan, np.inf])
def test_nothing_anywhere(fill):
    out, lse = combine_partials(
        np.full((5, *ROWS, H), fill, np.float32), np.full((5, *ROWS), -np.inf, np.float32)
    )
    assert not np.asarray(out).any()
    assert np.isneginf(lse).all()


def test_nan_in_a_part_that_counts_stays_in_its_row():
    out, lse = parts(3)
    clean, _ = combine_partials(out, lse)
    out[1, 0, 0, 0] = np.nan
    spoilt = np.array(combine_partials(out, lse)[0])
    assert np.isnan(spoilt[0, 0, 0]).all()
    spoilt[0, 0, 0] = clean[0, 0, 0]
    np.testing.assert_array_equal(spoilt, clean)


@settings(max_examples=15)
@given(st.permutations(range(7)), st.integers(1, 6))
def test_order_and_grouping(order, cut):
    out, lse = parts(7)
    lse[2], out[2] = -np.inf, np.nan
    whole = combine_partials(out, lse)
    assert_equal(combine_partials(out[order], lse[order]), whole)
    pair = [combine_partials(out[i], lse[i]) for i in (order[:cut], order[cut:])]
    assert_equal(combine_partials(*(jnp.stack(x) for x in zip(*pair, strict=True))), whole)


def test_merging_with_itself_adds_log_2():
    out, lse = parts(1)
    merged, total = combine_partials(np.repeat(out, 2, axis=0), np.repeat(lse, 2, axis=0))
    assert_equal((merged, total), (out[0], lse[0] + np.log(2)))


def test_one_part_is_itself():
    out, lse = parts(1)
    assert_equal(combine_partials(out, lse), (out[0], lse[0]))


@pytest.mark.parametrize("shift", [-3e4, -200.0, 200.0, 3e4])
def test_weights_that_overflow_alone(shift):
    out, lse = parts(4)
    lse = (lse / 10).astype(np.float32) + np.float32(shift)
    merged, total = combine_partials(out, lse)
    expected = merge64(out, lse)
    np.testing.assert_allclose(merged, expected[0], atol=2e-6)
    np.testing.assert_allclose(total, expected[1], rtol=1e-6)


@pytest.mark.parametrize("axis", [-4, -3, -2, -1, 0, 1, 2, 3])
def test_axis_counts_the_dimensions_of_lse(axis):
    out, lse = parts(5)
    moved = np.moveaxis(out, 0, axis if axis >= 0 else axis - 1), np.moveaxis(lse, 0, axis)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-6),
        combine_partials(*moved, axis=axis), combine_partials(out, lse),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dtype_is_kept_and_sums_are_float32(dtype):
    out, lse = parts(97, dtype=dtype)
    merged, total = combine_partials(out, lse)
    assert merged.dtype == dtype
    assert total.dtype == np.float32
    expected = merge64(out, lse)
    rounded = np.asarray(expected[0]).astype(dtype).astype(np.float64)
    # As good as rounding the exact answer once: half a unit, and float32 noise at ties.
    error = abs(np.asarray(merged).astype(np.float64) - expected[0])
    assert (error <= abs(rounded - expected[0]) + 1e-6).all()


def test_shapes_that_do_not_fit():
    out, lse = parts(5)
    with pytest.raises(
        ValueError, match=r"out must have lse's shape plus head_dim.*\(5, 2, 3, 4, 8\)"
    ):
        combine_partials(out, lse[:, 0])
    for axis in (4, -5):
        with pytest.raises(
            ValueError, match=rf"axis={axis} is not a dimension of lse \(5, 2, 3, 4\)"
        ):
            combine_partials(out, lse, axis=axis)
    with pytest.raises(ValueError, match="axis=1 or axis_name='seq', not both"):
        combine_partials(out, lse, axis=1, axis_name="seq")


def test_numeric_gradient():
    out, lse = parts(3, rows=(2,))
    args = jnp.asarray(out), jnp.asarray(lse / 10)
    check_grads(jax.jit(combine_partials), args, 1, ["rev"], atol=3e-3, rtol=3e-3, eps=1e-2)


def total_of(merged):
    out, lse = merged
    return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(jnp.where(lse == -jnp.inf, 0.0, lse))


def test_gradient_of_empty_parts_is_zero():
    out, lse = parts(6)
    lse[1:3], out[1:3] = -np.inf, np.nan
    lse[:, 0, 0, 0], out[:, 0, 0, 0] = -np.inf, np.nan  # and one row without any part
    gradient = jax.jit(jax.grad(lambda *x: total_of(combine_partials(*x)), (0, 1)))
    empty = np.isneginf(lse)
    for grad in map(np.asarray, gradient(out, lse)):
        assert np.isfinite(grad).all()
        assert not grad[empty].any()
        assert grad[~empty].any()


def test_gradient_equals_that_of_softmax():
    out, lse = map(jnp.asarray, parts(6))

    def plain(out, lse):
        weights = jax.nn.softmax(lse, axis=0)
        return total_of(((weights[..., None] * out).sum(0), jax.nn.logsumexp(lse, axis=0)))

    got = jax.grad(lambda *x: total_of(combine_partials(*x)), (0, 1))(out, lse)
    assert_equal(got, jax.grad(plain, (0, 1))(out, lse), atol=3e-6)


def over_devices(function, out, lse, axes=("seq",), sizes=(8,), out_spec=None, check_vma=True):
    """Runs function(out, lse) on one part per device, axis 0 of both spread over the mesh.

    Results are the same everywhere, or spread by `out_spec`."""
    out_spec = P() if out_spec is None else out_spec
    mesh = jax.make_mesh(sizes, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes))

    def one_part(out, lse):
        return function(out[0], lse[0])

    mapped = jax.shard_map(
        one_part, mesh=mesh, in_specs=(P(axes), P(axes)), out_specs=(out_spec, out_spec),
        check_vma=check_vma,
    )  # fmt: skip
    return jax.jit(mapped)(out, lse)


@pytest.mark.parametrize(("axes", "sizes"), [(("seq",), (8,)), (("host", "seq"), (2, 4))])
def test_over_a_mesh_axis(axes, sizes):
    out, lse = parts(8)
    lse[3], out[3] = -np.inf, np.nan
    lse[:, 0, 0, 0] = -np.inf
    name = axes[0] if len(axes) == 1 else axes
    merge = functools.partial(combine_partials, axis_name=name)
    got = over_devices(merge, out, lse, axes, sizes)
    assert_equal(got, combine_partials(out, lse))
    assert not np.asarray(got[0][0, 0, 0]).any()


def test_over_one_of_two_mesh_axes():
    out, lse = parts(8)
    merge = functools.partial(combine_partials, axis_name="seq")

    def keep_hosts_apart(out, lse):
        return jax.tree.map(lambda x: x[None], merge(out, lse))

    got = over_devices(keep_hosts_apart, out, lse, ("host", "seq"), (2, 4), out_spec=P("host"))
    for host in range(2):
        mine = slice(4 * host, 4 * host + 4)
        assert_equal([x[host] for x in got], combine_partials(out[mine], lse[mine]))


def test_mesh_result_keeps_its_dtype():
    out, lse = parts(8, dtype=DTYPES["bfloat16"])
    merged, _ = over_devices(functools.partial(combine_partials, axis_name="seq"), out, lse)
    assert merged.dtype == DTYPES["bfloat16"]
    np.testing.assert_array_equal(merged, combine_partials(out, lse)[0])


def test_gradient_over_a_mesh_axis():
    out, lse = parts(8)
    lse[3], out[3] = -np.inf, np.nan
    merge = functools.partial(combine_partials, axis_name="seq")
    got = jax.grad(lambda *x: total_of(over_devices(merge, *x)), (0, 1))(
        *map(jnp.asarray, (out, lse))
    )
    expected = jax.grad(lambda *x: total_of(combine_partials(*x)), (0, 1))(
        *map(jnp.asarray, (out, lse))
    )
    assert_equal(got, expected, atol=3e-6)
    assert not any(np.asarray(grad[3]).any() for grad in got)


@pytest.mark.parametrize(("axes", "sizes"), [(("seq",), (8,)), (("host", "seq"), (2, 4))])
def test_a_mesh_is_merged_over_with_one_collective(axes, sizes):
    out, lse = parts(8)
    merge = functools.partial(combine_partials, axis_name=axes)
    lowered = jax.jit(functools.partial(over_devices, merge, axes=axes, sizes=sizes)).lower(
        out, lse
    )
    assert collectives(lowered.compile().as_text()) == [("all-gather", out.size + lse.size)]

    def twice(out, lse):
        return merge(*merge(out, lse))

    # Merging what has been merged: the count sees the second one.
    lowered = jax.jit(functools.partial(over_devices, twice, axes=axes, sizes=sizes)).lower(
        out, lse
    )
    assert len(collectives(lowered.compile().as_text())) == 2


def test_the_order_of_axes_and_unchecked_types_change_nothing():
    out, lse = parts(8)
    expected = combine_partials(out, lse)
    for axis_name, checked in ((("seq", "host"), True), (("host", "seq"), False)):
        merge = functools.partial(combine_partials, axis_name=axis_name)
        got = over_devices(merge, out, lse, ("host", "seq"), (2, 4), check_vma=checked)
        assert_equal(got, expected)


def test_parts_of_16_bits_are_merged_in_float32_over_a_mesh():
    """The weights of eight equal parts, and their sum, would be rounded in bfloat16."""
    out, _ = parts(8, dtype=DTYPES["bfloat16"])
    lse = np.full(out.shape[:-1], 300.123, np.float32)
    merged, total = over_devices(functools.partial(combine_partials, axis_name="seq"), out, lse)
    expected, expected_lse = merge64(out, lse)
    np.testing.assert_array_equal(merged, expected.astype(DTYPES["bfloat16"]))
    np.testing.assert_allclose(total, expected_lse, rtol=1e-6)
