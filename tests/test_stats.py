"""Counts, times, and compilation apart from them."""

from __future__ import annotations

import concurrent.futures
import time

import jax
import jax.numpy as jnp
import pytest

from jaxdecode.stats import Stats, Stopwatch


def test_rates_are_tokens_per_second():
    stats = Stats(100, 20, prompt_seconds=0.5, generation_seconds=4.0, compile_seconds=1.0)
    assert stats.prompt_tps == 200
    assert stats.generation_tps == 5


def test_no_time_gives_no_rate():
    stats = Stats(100, 20, prompt_seconds=0.0, generation_seconds=0.0, compile_seconds=1.0)
    assert stats.prompt_tps is None
    assert stats.generation_tps is None


def test_phases_add_up():
    watch = Stopwatch()
    for _ in range(2):
        with watch.phase("prompt"):
            time.sleep(0.02)
        with watch.phase("generation"):
            time.sleep(0.01)
    stats = watch.stats(prompt_tokens=7, generated_tokens=3)
    assert (stats.prompt_tokens, stats.generated_tokens) == (7, 3)
    assert 0.04 <= stats.prompt_seconds < 2
    assert 0.02 <= stats.generation_seconds < 2
    assert stats.compile_seconds == 0


def test_a_phase_may_begin_where_the_last_one_ended():
    watch = Stopwatch()
    with watch.phase("generation"):
        pass
    time.sleep(0.05)
    with watch.phase("generation", since_last=True):
        pass
    assert 0.05 <= watch.stats(0, 0).generation_seconds < 2
    time.sleep(0.05)
    with watch.phase("prompt"):
        pass
    assert watch.stats(0, 0).prompt_seconds < 0.05


def test_compilation_is_counted_apart_and_once():
    watch = Stopwatch()
    compiled = jax.jit(lambda x: jnp.sort(jnp.tanh(x @ x), axis=-1).sum())
    x = jnp.ones((8, 8))
    start = time.perf_counter()
    with watch.phase("generation"):
        compiled(x).block_until_ready()
    elapsed = time.perf_counter() - start
    cold = watch.stats(0, 0)
    assert cold.compile_seconds > 0.5 * elapsed
    assert cold.compile_seconds + cold.generation_seconds == pytest.approx(elapsed, rel=0.2)
    with watch.phase("generation"):
        compiled(x).block_until_ready()
    assert watch.stats(0, 0).compile_seconds == cold.compile_seconds


def test_a_phase_that_fails_is_timed_and_stops_listening(monkeypatch):
    listening = set()
    register = "register_event_duration_secs_listener"
    monkeypatch.setattr(jax.monitoring, register, listening.add)
    monkeypatch.setattr(jax.monitoring, "unregister_event_duration_listener", listening.remove)
    watch = Stopwatch()

    def fail():
        with watch.phase("prompt"):
            assert len(listening) == 1
            time.sleep(0.01)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert watch.stats(0, 0).prompt_seconds >= 0.01
    assert listening == set()


def test_watches_in_threads_do_not_disturb_each_other():
    def work(_):
        for _ in range(200):
            watch = Stopwatch()
            with watch.phase("prompt"):
                pass
        return watch.stats(0, 0).compile_seconds

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [0.0] * 8
