"""The read ceiling: what is counted, what really moves, and what cannot be measured."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from jaxdecode import read_bandwidth
from jaxdecode.errors import DecodeError, RequestError
from jaxdecode.models.random_model import random_array
from jaxdecode.read_bandwidth import measure_read_ceiling

SMALL = 2**22


def test_the_ceiling_is_the_best_of_its_methods():
    ceiling = measure_read_ceiling(num_bytes=SMALL + 1, seconds=1e-3)
    assert list(ceiling.methods) == ["copy", "sum", "matvec"]
    assert ceiling.bytes_per_second == max(ceiling.methods.values())
    assert ceiling.methods[ceiling.method] == ceiling.bytes_per_second
    assert 1e7 < ceiling.bytes_per_second < 1e13
    assert ceiling.num_bytes == SMALL
    assert str(ceiling).startswith(f"{ceiling.bytes_per_second / 1e9:.0f} GB/s by ")


def test_a_copy_counts_reading_and_writing_the_others_reading(monkeypatch):
    monkeypatch.setattr(read_bandwidth, "_best_seconds", lambda read, seconds: 0.5)
    rates = measure_read_ceiling(num_bytes=SMALL).methods
    assert rates == {"copy": 4 * SMALL, "sum": 2 * SMALL, "matvec": 2 * SMALL}


def test_the_copy_copies_into_the_same_second_array():
    x = random_array(np.uint32(0), (8192, 128), "float32")
    ((_, _, copy),) = read_bandwidth._readers("copy", x)
    places = set()
    for _ in range(3):
        copied = copy()
        np.testing.assert_array_equal(copied, x)
        places.add(copied.unsafe_buffer_pointer())
    assert len(places) == 1
    assert x.unsafe_buffer_pointer() not in places


def test_sum_and_matvec_read_every_element():
    x = random_array(np.uint32(0), (2 * 8192, 128), "float32")
    ((_, _, total),) = read_bandwidth._readers("sum", x)
    ((_, _, product),) = read_bandwidth._readers("matvec", x)
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(total(), exact.sum(), atol=0.1)
    np.testing.assert_allclose(product(), exact.reshape(8192, -1).sum(axis=0), atol=1e-2)


def test_time_is_that_of_one_call_of_many_and_the_best_of_rounds(monkeypatch):
    clock = iter(np.cumsum([0, 0.1, 0, 1.5, 0, 0.6, 0, 0.9]))
    monkeypatch.setattr(read_bandwidth.time, "perf_counter", lambda: next(clock))
    calls = []
    seconds = read_bandwidth._best_seconds(lambda: calls.append(1), 0.31)
    assert seconds == pytest.approx(0.6 / 3)
    assert len(calls) == 1 + 1 + 3 * 3


@pytest.mark.parametrize(
    ("stats", "expected"),
    [
        ({"bytes_limit": 100 * 10**9, "bytes_in_use": 10**9}, 4_100_000_000),
        ({"bytes_limit": 100 * 10**9, "bytes_in_use": 97 * 10**9}, 10**9),
        ({"bytes_limit": 3 * 10**9}, 10**9),
    ],
    ids=["room", "little room", "small"],
)
def test_the_array_fits_into_what_is_free(monkeypatch, stats, expected):
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert read_bandwidth._fitting_bytes() == expected


def test_the_array_takes_a_small_part_of_a_small_machine(monkeypatch):
    monkeypatch.setattr(read_bandwidth.os, "sysconf", lambda name: 2**16)
    assert read_bandwidth._fitting_bytes() == 2**28
    monkeypatch.setattr(read_bandwidth.os, "sysconf", lambda name: 2**20)
    assert read_bandwidth._fitting_bytes() == 2**29


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_bytes": 100}, "num_bytes must be at least 4194304, found 100"),
        ({"methods": ["memcpy"]}, "one of copy, sum, matvec, tma, found 'memcpy'"),
        ({"methods": ["tma"]}, "'tma' does not run here: the kernels need an NVIDIA Hopper GPU"),
        ({"methods": []}, "give at least one method"),
    ],
    ids=["small", "unknown", "tma", "none"],
)
def test_what_cannot_be_measured_is_an_error(options, message):
    with pytest.raises(RequestError, match=message) as caught:
        measure_read_ceiling(**{"num_bytes": SMALL} | options)
    assert isinstance(caught.value, DecodeError)
