"""Sums through the peers' memory on several GPUs: the right bits, again and again, whoever lags.

With one GPU there is nothing to sum: conftest.py then leaves this file out.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxdecode.pallas_kernels import combine_partials, merge_columns, norm, peer

pytestmark = pytest.mark.gpu

COUNTS = [n for n in range(2, jax.device_count() + 1) if jax.device_count() % n == 0]
SHAPES = [(1, 1, 512), (1, 1, 8192), (3, 1, 6656), (2, 4, 8192)]
TOKEN = (1, 1, 8192)


def tensor_mesh(count: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:count]), ("tensor",))


def on_each(mesh: Mesh, function, *, donate=()):
    """function of each device's own row of arrays [devices, ...]; so are its results."""
    rows = P(mesh.axis_names)

    def one(*args):
        return jax.tree.map(lambda x: x[None], function(*(x[0] for x in args)))

    mapped = jax.shard_map(one, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return jax.jit(mapped, donate_argnums=donate)


def random_rows(count: int, shape, dtype, seed=0) -> jax.Array:
    rows = np.random.default_rng(seed).standard_normal((count, *shape), np.float32)
    return jnp.asarray(rows, dtype)


def expected_sum(rows: jax.Array) -> np.ndarray:
    """Over the first axis, from its first row on, in float32."""
    return np.asarray(functools.reduce(jnp.add, list(rows.astype(jnp.float32))).astype(rows.dtype))


def summed(x, mailbox):
    return peer.all_reduce(x, ("tensor",), mailbox)


def opened(x) -> peer.Mailbox:
    return peer.open_mailbox(x.shape, x.dtype, ("tensor",))


@pytest.mark.parametrize("dtype", peer.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_every_rank_gets_the_sum_in_the_order_of_ranks(count, shape, dtype):
    x = random_rows(count, shape, dtype)
    mesh = tensor_mesh(count)
    total = on_each(mesh, lambda x: summed(x, opened(x)))(x)
    np.testing.assert_array_equal(total, np.broadcast_to(expected_sum(x), x.shape))
    of_nccl = on_each(mesh, lambda x: lax.psum(x.astype(jnp.float32), "tensor"))(x)
    tolerance = 2 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(total.astype(jnp.float32), of_nccl, rtol=tolerance, atol=tolerance)


def numbers(i, rank, shape):
    """Whole numbers below 251 that differ from turn to turn, rank to rank and place to place."""
    place = lax.broadcasted_iota(jnp.int32, shape, 2)
    return ((place * 31 + i * 7 + rank * 101) % 251).astype(jnp.float32)


def faults_in(turns: int, count: int, shape, *, delay=lambda i, x: x, dtype=jnp.float32):
    """How many elements were wrong in so many turns; for each rank."""

    def run(rank):
        mailbox = peer.open_mailbox(shape, dtype, ("tensor",))

        def turn(i, faults):
            x = delay(i, numbers(i, rank, shape)).astype(dtype)
            expected = sum(numbers(i, r, shape) for r in range(count))
            return faults + jnp.sum((summed(x, mailbox) != expected).astype(jnp.int32))

        return lax.fori_loop(0, turns, turn, jnp.int32(0))

    return on_each(tensor_mesh(count), run)(jnp.arange(count, dtype=jnp.int32))


def lagging(count: int, i, x):
    """x, later by a few matrix products on one rank, and not always the same one."""
    rounds = jnp.where(lax.axis_index("tensor") == i % count, 20, 0)
    a = jnp.full((1024, 1024), x[0, 0, 0] * 1e-9)
    a = lax.fori_loop(0, rounds, lambda _, a: jnp.tanh(a @ a), a)
    return x + 0 * a[0, 0].astype(x.dtype)


@pytest.mark.parametrize("shape", [(1, 1, 512), TOKEN, (2, 8, 4096)], ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_ten_thousand_turns(count, shape):
    np.testing.assert_array_equal(faults_in(10_000, count, shape), 0)


@pytest.mark.parametrize("count", COUNTS)
def test_one_rank_or_another_lags(count):
    faults = faults_in(300, count, TOKEN, delay=functools.partial(lagging, count))
    np.testing.assert_array_equal(faults, 0)


@pytest.mark.parametrize("count", COUNTS)
def test_ten_thousand_turns_have_the_same_bits_on_every_rank_and_in_every_run(count):
    def run(x):
        mailbox = opened(x)
        own = x.astype(jnp.float32) * 0.01

        def turn(i, carry):
            mixed = (carry.astype(jnp.float32) * 0.3 + jnp.roll(own, i, axis=-1)).astype(x.dtype)
            return summed(mixed, mailbox)

        return lax.fori_loop(0, 10_000, turn, summed(x, mailbox))

    x = random_rows(count, TOKEN, jnp.bfloat16)
    jitted = on_each(tensor_mesh(count), run)
    first, second = (np.asarray(jitted(x)) for _ in range(2))
    assert np.isfinite(first.astype(np.float32)).all()
    np.testing.assert_array_equal(first, np.broadcast_to(first[:1], first.shape))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("count", COUNTS)
def test_a_scan_with_a_donated_carry_dispatched_without_waiting(count):
    """Each call has a mailbox of its own in memory that earlier calls may still be using."""

    def run(x, step):
        mailbox = opened(x)

        def turn(x, i):
            total = summed(x, mailbox)
            return (total + step * i) / count, jnp.max(total)

        return lax.scan(turn, x, jnp.arange(20, dtype=jnp.float32))

    jitted = on_each(tensor_mesh(count), run, donate=0)
    x, expected = jnp.zeros((count, *TOKEN)), 0.0
    for step in range(50):
        x, _ = jitted(x, jnp.full(count, step, jnp.float32))
        expected += sum(step * i / count for i in range(20))
    np.testing.assert_allclose(np.asarray(x), expected, rtol=1e-5)


@pytest.mark.parametrize("count", COUNTS)
def test_two_mailboxes_by_turns(count):
    def run(x):
        first, second = opened(x), opened(x[:, :, :512])
        small = x[:, :, :512]
        for _ in range(5):
            x = summed(x, first) / count
            small = summed(small, second) / count
        return x, small

    rows = random_rows(count, TOKEN, jnp.float32)
    x, small = on_each(tensor_mesh(count), run)(rows)
    mean = np.mean(np.asarray(rows, np.float64), axis=0)
    np.testing.assert_allclose(x[-1], mean, atol=1e-5)
    np.testing.assert_allclose(small[0], mean[:, :, :512], atol=1e-5)


EPS = 1e-5
NORM_SHAPES = [(1, 1, 512), (1, 1, 5120), (1, 1, 6656), TOKEN, (3, 1, 1024), (2, 8, 4096)]


def normed(x, delta, scale, mailbox):
    return peer.add_and_norm(x, delta, scale, EPS, ("tensor",), mailbox)


@pytest.mark.parametrize("dtype", peer.DTYPES)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_every_rank_gets_the_same_sum_and_norm(count, shape, dtype):
    """The sum to the bit, and a norm that differs by the order of its squares only."""
    delta, x = random_rows(count, shape, dtype), random_rows(1, shape, dtype, seed=1)
    scale = random_rows(1, shape[-1:], dtype, seed=2)
    x, scale = (jnp.broadcast_to(each, (count, *each.shape[1:])) for each in (x, scale))
    run = on_each(tensor_mesh(count), lambda x, delta, s: normed(x, delta, s, opened(delta)))
    total, found = (np.asarray(each.astype(jnp.float32)) for each in run(x, delta, scale))
    summed = jnp.asarray(expected_sum(delta))
    expected, expected_norm = norm.plain(x[0], summed, scale[0], eps=EPS)
    np.testing.assert_array_equal(total, np.broadcast_to(expected.astype(jnp.float32), x.shape))
    np.testing.assert_array_equal(found, np.broadcast_to(found[:1], found.shape))
    # Two roundings may go the other way.
    tolerance = max(2 * float(jnp.finfo(dtype).eps), 2e-6)
    np.testing.assert_allclose(
        found[0], expected_norm.astype(jnp.float32), rtol=tolerance, atol=tolerance
    )


def faulty_norms(turns: int, count: int, shape, *, delay=lambda i, x: x):
    """How many elements of the sums and of the norms were wrong in so many turns; for each rank.

    Small whole numbers, times a power of two: their squares add up to the same in any order, and to
    something else by far in the turn before."""

    def run(rank):
        mailbox = peer.open_mailbox(shape, jnp.float32, ("tensor",))
        scale = numbers(3, 2, (1, 1, shape[-1]))[0, 0]

        def turn(i, faults):
            size = lax.shift_left(jnp.int32(1), i % 3).astype(jnp.float32)
            x, own, *deltas = (
                numbers(i, r, shape) % 5 * size for r in (count, rank, *range(count))
            )
            found = normed(x, delay(i, own), scale, mailbox)
            expected = norm.plain(x, functools.reduce(jnp.add, deltas), scale, eps=EPS)
            apart = jnp.abs(found[1] - expected[1]) > 1e-6 * jnp.abs(expected[1])
            wrong = (found[0] != expected[0]) | apart
            return faults + jnp.sum(wrong.astype(jnp.int32))

        return lax.fori_loop(0, turns, turn, jnp.int32(0))

    return on_each(tensor_mesh(count), run)(jnp.arange(count, dtype=jnp.int32))


@pytest.mark.parametrize("shape", [(1, 1, 512), (1, 1, 4096), (4, 2, 1024)], ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_ten_thousand_norms(count, shape):
    np.testing.assert_array_equal(faulty_norms(10_000, count, shape), 0)


@pytest.mark.parametrize("count", COUNTS)
def test_one_rank_or_another_lags_at_a_norm(count):
    faults = faulty_norms(300, count, TOKEN, delay=functools.partial(lagging, count))
    np.testing.assert_array_equal(faults, 0)


@pytest.mark.parametrize("count", COUNTS)
def test_sums_and_norms_by_turns_through_one_mailbox(count):
    """Ten thousand of each: the same bits on every rank and in every run."""

    def run(x, delta):
        mailbox, scale = opened(delta), jnp.ones(delta.shape[-1:], delta.dtype)
        own = delta

        def turn(i, carry):
            x, delta = carry
            x, delta = normed(x, delta * 0.5 + own, scale, mailbox)
            return x * 0.5, summed(delta * 0.5, mailbox)

        return lax.fori_loop(0, 10_000, turn, (x, delta))

    delta = random_rows(count, TOKEN, jnp.bfloat16)
    jitted = on_each(tensor_mesh(count), run)
    operands = jnp.zeros_like(delta), delta
    first, second = (jax.tree.map(np.asarray, jitted(*operands)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert np.isfinite(one.astype(np.float32)).all()
        np.testing.assert_array_equal(one, np.broadcast_to(one[:1], one.shape))
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("count", COUNTS)
def test_merging_gives_each_rank_its_columns(count):
    """A thousand times, of other parts each time; one is empty, and one row of all."""
    B, T, N, H = 2, 1, 16, 128
    rng = np.random.default_rng(0)
    out = rng.standard_normal((count, B, T, N, H)).astype(np.float32)
    lse = (3 * rng.standard_normal((count, B, T, N))).astype(np.float32)
    lse[1, 0], out[1, 0] = -np.inf, np.nan
    lse[:, 1, 0, 3] = -np.inf
    axes = ("tensor",)

    def run(out, lse):
        mailbox = peer.open_mailbox((B, T, N, H // count), jnp.float32, axes, arrays=2)

        def turn(i, worst):
            parts = out * jnp.where(i % 3 == 0, 1.0, -2.0), jnp.roll(lse, i, axis=2)
            found = merge_columns(*parts, axes, mailbox)
            return jnp.maximum(worst, jnp.max(jnp.abs(found - merge_columns(*parts, axes))))

        return merge_columns(out, lse, axes, mailbox), lax.fori_loop(0, 1000, turn, 0.0)

    columns, worst = on_each(tensor_mesh(count), run)(out, lse)
    expected, _ = combine_partials(jnp.asarray(out), jnp.asarray(lse))
    found = np.concatenate(list(np.asarray(columns)), axis=-1)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert not found[1, 0, 3].any()
    assert np.asarray(worst).max() < 1e-5


AXES = ("data", "tensor", "seq")
# Every way to lay all devices out, and the axes of more than one device to sum over.
GROUPS = [
    (sizes, axes)
    for sizes in itertools.product((1, 2, 4, 8), repeat=3)
    if math.prod(sizes) == jax.device_count()
    for axes in [("tensor",), ("seq",), ("tensor", "seq"), ("data", "seq")]
    if all(sizes[AXES.index(axis)] > 1 for axis in axes)
]


@pytest.mark.parametrize(("sizes", "axes"), GROUPS, ids=str)
def test_axes_of_any_mesh(sizes, axes):
    """Each device has the sum over the devices that differ from it in these axes only."""
    mesh = Mesh(np.array(jax.devices()).reshape(sizes), AXES)

    def run(x):
        mailbox = peer.open_mailbox(x.shape, x.dtype, axes)
        return peer.all_reduce(x, axes, mailbox), lax.psum(x, axes)

    found, expected = on_each(mesh, run)(random_rows(mesh.size, TOKEN, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_mesh_in_another_order_is_left_to_nccl(monkeypatch):
    from jaxdecode.models import sharding

    monkeypatch.setattr(sharding, "VERIFIED_KIND", jax.devices()[0].device_kind)
    monkeypatch.setattr(sharding, "VERIFIED_DEVICES", jax.device_count())
    devices = np.array(jax.devices())
    kind, reason = sharding.choose_collectives(Mesh(devices[::-1], ("tensor",)))
    assert kind == "xla"
    assert "in this order" in reason
    assert sharding.choose_collectives(Mesh(devices, ("tensor",)))[0] == "peer"
