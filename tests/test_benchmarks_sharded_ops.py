"""The operations that benchmarks/sharded.py times by themselves, on virtual devices."""

from __future__ import annotations

import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdecode.device_model import DEVICES

H200 = DEVICES["h200"]


@pytest.fixture
def ops(script):
    return script("sharded_ops")


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 16])
def test_sums_of_shares_have_no_error(ops, n):
    shares = ops.shares_of(n)
    assert (len(shares), shares.sum()) == (n, -1)
    assert (shares < 0).all()
    for total in (1, 2, 3):
        parts = total * shares.astype(jnp.bfloat16)
        added = np.cumsum(parts, dtype=jnp.bfloat16)
        assert added[-1] == -total


@pytest.mark.parametrize(
    ("collective", "n", "num_bytes"),
    [
        *[(name, n, 768) for name in ("all_reduce", "all_gather", "all_to_all") for n in (3, 4)],
        ("merge_columns", 2, 3072),
        ("merge_columns", 4, 512),
    ],
)
def test_a_collective_is_timed(ops, script, collective, n, num_bytes):
    name, *others = ops.implementations()[collective]
    assert others in ([], ["peer"])
    case = script("sharded_cases").CollectiveCase(collective, name, n, num_bytes)
    assert ops.obstacle(case, jax.devices()) is None
    row = ops.collective_row(case, jax.devices(), H200.speeds, rounds=2)
    assert (row["collective"], row["devices"], row["implementation"]) == (collective, n, name)
    assert row["bytes"] == num_bytes
    assert row["chain_us"] > 0
    assert row["us"] < row["chain_us"]
    times = {
        "all_reduce": 2 * (n - 1) / n, "all_gather": n - 1, "all_to_all": (n - 1) / n,
        "merge_columns": (n - 1) / n * (128 + n) / 128,
    }  # fmt: skip
    link = 1e6 * times[collective] * num_bytes / (H200.speeds.link_gb_s * 1e9)
    assert row["predicted_us"] == pytest.approx(H200.speeds.collective_us + link)
    json.dumps(row)


def forgetful(x, axis):
    """A sum without what the last device has."""

    def exchange(x):
        last = jax.lax.axis_index(axis) == jax.lax.axis_size(axis) - 1
        return jax.lax.psum(jnp.where(last, 0, x).astype(x.dtype), axis)

    return exchange


def swapped(x, axis):
    """Merged columns, each device's on the other device."""
    n = jax.lax.axis_size(axis)
    merge = importlib.import_module("sharded_ops").COLLECTIVES["merge_columns"]
    right = merge.implementations["all_to_all"](x, axis)
    return lambda x: jax.lax.ppermute(right(x), axis, [(i, (i + 1) % n) for i in range(n)])


def alike(x, axis):
    """A merge in which all devices count the same."""

    def exchange(x):
        rows = jax.lax.pmean(x, axis).reshape(1, 1, -1, 2, 64)
        return jnp.take(rows, jax.lax.axis_index(axis), axis=3)

    return exchange


@pytest.mark.parametrize(
    ("collective", "faulty"),
    [("all_reduce", forgetful), ("merge_columns", swapped), ("merge_columns", alike)],
    ids=["forgetful", "swapped", "alike"],
)
def test_a_collective_that_loses_something_gets_no_time(
    ops, script, monkeypatch, collective, faulty
):
    monkeypatch.setitem(ops.COLLECTIVES[collective].implementations, "faulty", faulty)
    case = script("sharded_cases").CollectiveCase(collective, "faulty", 2, 1024)
    with pytest.raises(RuntimeError, match=r"by faulty.* are not what they were"):
        ops.collective_row(case, jax.devices(), None, rounds=1)


@pytest.mark.parametrize(
    ("collective", "implementation", "n", "num_bytes", "reason"),
    [
        ("all_reduce", "psum", 2, 2**23, None),
        ("all_reduce", "peer", 2, 2**14, None),
        ("all_reduce", "peer", 2, 2**19, "at most 262144 bytes, not 524288"),
        ("all_reduce", "peer", 2, 256, "multiples of 1024 bytes, not 256"),
        ("merge_columns", "peer", 2, 2**15, None),
        ("merge_columns", "peer", 2, 1024, "multiples of 1024 bytes, not 512"),
        ("merge_columns", "peer", 3, 2**15, "3 devices do not divide the 128 columns"),
        ("merge_columns", "all_to_all", 3, 2**15, "3 devices do not divide the 128 columns"),
    ],
)
def test_what_an_implementation_does_not_take(
    ops, script, monkeypatch, collective, implementation, n, num_bytes, reason
):
    case = script("sharded_cases").CollectiveCase(collective, implementation, n, num_bytes)
    if implementation == "peer" and reason is None:
        assert "the mesh is of cpu" in ops.obstacle(case, jax.devices())
    monkeypatch.setattr(ops.peer, "why_not_here", lambda mesh: None)
    found = ops.obstacle(case, jax.devices())
    assert (found is None) == (reason is None)
    assert (reason or "") in (found or "")


@pytest.mark.parametrize("collective", ["all_reduce", "merge_columns"])
def test_peers_have_a_mailbox_for_the_whole_chain(ops, script, monkeypatch, collective):
    """Their results are those of XLA, which stands in for the kernels here."""
    opened = []

    def open_mailbox(shape, dtype, axes, *, arrays=1):
        assert ops.peer.why_not(shape, dtype) is None
        opened.append((shape, jnp.dtype(dtype).name, arrays))
        return ops.peer.Mailbox(shape, jnp.dtype(dtype), arrays, tuple((a, 2) for a in axes), 0, 0)

    def all_reduce(x, axes, mailbox):
        assert (x.shape, x.dtype, axes) == (mailbox.shape, mailbox.dtype, mailbox.axes)
        return jax.lax.psum(x, axes)

    def merge_columns(out, lse, axes, mailbox):
        assert (*out.shape[:3], out.shape[3] // 2) == mailbox.shape
        return by_xla(out, lse, axes)

    by_xla = ops.merge_columns
    monkeypatch.setattr(ops.peer, "open_mailbox", open_mailbox)
    monkeypatch.setattr(ops.peer, "all_reduce", all_reduce)
    monkeypatch.setattr(ops.peer, "merge_columns", merge_columns)
    case = script("sharded_cases").CollectiveCase(collective, "peer", 2, 2**15)
    row = ops.collective_row(case, jax.devices(), None, rounds=1)
    assert (row["collective"], row["implementation"]) == (collective, "peer")
    expected = {
        "all_reduce": ((2**14,), "bfloat16", 1),
        "merge_columns": ((1, 1, 64, 64), "float32", 2),
    }
    assert opened == [expected[collective]]


@pytest.fixture
def attention(ops, script, monkeypatch):
    """(times attention with few heads, a case of it)"""
    monkeypatch.setattr(ops, "_CALLS", 2)
    config = dataclasses.replace(
        script("sharded_cases").setup_mqa(1).config, num_q_heads=4, head_dim=16
    )
    timer = ops.AttentionTimer(config, jax.devices()[:4], 1e12, H200.speeds, cold_bytes=1e6)
    return timer, script("sharded_cases").AttentionCase


def test_attention_over_more_and_more_devices(attention):
    timer, case = attention
    alone, both = (timer.row(case(n, 2, 1000)) for n in (1, 2))
    assert [(row["mesh"], row["devices"]) for row in (alone, both)] == [("", 1), ("seq=2", 2)]
    num_bytes = 2 * 2 * 1000 * 16 * 2
    assert (alone["bytes"], both["bytes"]) == (num_bytes, num_bytes // 2)
    for row in (alone, both):
        assert row["S"] == 1024
        assert row["us"] > 0
        assert row["bound_us"] == pytest.approx(row["bytes"] / 1e6)
        assert row["fraction_of_bound"] == pytest.approx(row["bound_us"] / row["us"])
        json.dumps(row)
    assert alone["predicted_us"] == pytest.approx(num_bytes / 4.6e6)
    assert both["predicted_us"] > alone["predicted_us"] / 2 + H200.speeds.collective_us


def test_attention_that_loses_a_part_gets_no_time(attention, ops, monkeypatch):
    timer, case = attention
    timer.row(case(1, 1, 1000))
    whole = ops.jd.sharded_decode_attention

    def half(q, k, v, kv_len, **options):
        return whole(q, k, v, kv_len // 2, **options)

    monkeypatch.setattr(ops.jd, "sharded_decode_attention", half)
    with pytest.raises(RuntimeError, match=r"seq=2, batch 1.* differs from another mesh's by"):
        timer.row(case(2, 1, 1000))
