"""Measuring: what is timed, from which depth on, which bytes count, and what cannot be measured."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from naive_llama import CONFIG, random_model
from test_decode_loop import compilations

from jaxdecode import bench, decode_loop
from jaxdecode.bench import NAMES, NO_SPLIT, Bench
from jaxdecode.errors import DeviceError, RequestError
from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.random_model import random_model as random_weights
from jaxdecode.models.sharding import fit
from jaxdecode.pallas_kernels import AttentionChoice

CEILING = 1e9
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)


def timer(model=None, tokens=4, repetitions=2, ceiling=CEILING) -> Bench:
    return Bench(model or random_model(), "tiny", ceiling, tokens, repetitions)


@pytest.fixture
def dispatches(monkeypatch):
    """What each call of the decode step was given: the lengths and the keyword arguments."""
    seen = []

    def spy(static, leaves, state, *rest, **options):
        seen.append((np.asarray(state.cache.lengths).tolist(), options))
        return decode_loop.decode(static, leaves, state, *rest, **options)

    spy.lower = decode_loop.decode.lower
    monkeypatch.setattr(bench, "decode", spy)
    return seen


# Bytes


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_a_step_reads_every_weight_but_an_untied_embedding(config):
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.embed_dim
    expected = config.num_parameters - embedding
    assert bench.weight_bytes(random_weights(config, "float32")) == 4 * expected
    assert bench.weight_bytes(random_weights(config, "bfloat16")) == 2 * expected


@pytest.mark.parametrize(
    ("lengths", "window", "seen"),
    [
        ([0], None, (1 + 2 + 3 + 4) / 4),
        ([512], None, 512 + 2.5),
        ([512, 0, 100], None, 612 + 3 * 2.5),
        ([512, 0, 100], 102, 102 + 2.5 + (101 + 3 * 102) / 4),
    ],
    ids=["empty", "one", "ragged", "window"],
)
def test_a_step_reads_what_its_sequences_see(lengths, window, seen):
    config = dataclasses.replace(CONFIG, window=window)
    # Keys and values, 2 layers of 2 KV heads of 8 numbers, 2 bytes each.
    assert bench.cache_bytes(config, lengths, 4, 2) == seen * 2 * 2 * 2 * 8 * 2


def test_the_bound_of_a_large_model_is_what_the_article_draws():
    """CodeLlama-34B on an A100 (2 TB/s): 67 GB of weights, 0.197 MB per token."""
    config = LlamaConfig.preset("codellama-34b")
    weights = 2 * (config.num_parameters - config.vocab_size * config.embed_dim)
    assert weights == pytest.approx(67e9, rel=0.01)
    short, long = (bench.cache_bytes(config, [d], 128, 2) for d in (512, 65536))
    assert 2e12 / (weights + short) == pytest.approx(29.9, abs=0.2)
    assert 2e12 / (weights + long) == pytest.approx(25.1, abs=0.2)


# Decoding


def test_every_repetition_starts_at_the_depth(dispatches):
    row = timer(repetitions=3).decode([5, 20])
    assert [lengths for lengths, _ in dispatches] == [[5, 20]] * 5  # two of them warm up
    assert all(options["num_steps"] == 4 for _, options in dispatches)
    assert (row.repetitions, row.tokens, row.batch) == (3, 4, 2)


def test_a_row_follows_from_its_own_numbers():
    row = timer().decode([20, 20])
    assert dataclasses.replace(row, tok_s=0, tok_s_std=0, seconds=0, compile_s=0, gb_s=0) == (
        dataclasses.replace(
            row, model="tiny", mesh="", dtype="float32", test="tg4 @ d20", batch=2, depth=20,
            capacity=128, implementation="xla", tokens=4, repetitions=2,
            tok_s=0, tok_s_std=0, seconds=0, compile_s=0, gb_s=0,
        )
    )  # fmt: skip
    expected = bench.weight_bytes(random_model()) + 2 * 22.5 * CONFIG.kv_bytes_per_token(4)
    assert row.bytes_per_step == expected
    assert row.bound_tok_s == pytest.approx(2 * CEILING / row.bytes_per_step)
    assert row.fraction_of_bound == pytest.approx(row.tok_s / row.bound_tok_s)
    assert row.gb_s == pytest.approx(row.tok_s / 2 * row.bytes_per_step / 1e9)
    # The harmonic mean of rates is not above their mean.
    assert 2 * 4 / row.seconds <= row.tok_s * 1.0001
    assert row.tok_s_std >= 0
    assert row.compile_s >= 0
    json.dumps(dataclasses.asdict(row), allow_nan=False)


def test_a_ragged_batch_keeps_its_lengths():
    row = timer(repetitions=1).decode([30, 7], capacity=100)
    assert (row.test, row.depth, row.capacity) == ("tg4 @ d7..30", [30, 7], 128)
    assert row.tok_s_std is None


@pytest.mark.parametrize(
    ("lengths", "capacity", "test", "slots"),
    [
        ([0, 0], None, "tg4", 128),
        ([125], None, "tg4 @ d125", 256),
        ([124, 0], 128, "tg4 @ d0..124", 128),
        ([0], 1000, "tg4", 1024),
    ],
    ids=["empty", "next block", "full", "given"],
)
def test_names_and_capacities(lengths, capacity, test, slots):
    assert bench._test_name(4, lengths) == test
    assert bench.slots_for(lengths, 4, capacity) == slots


def test_nothing_is_compiled_while_the_clock_runs():
    """Neither from one repetition to the next nor from one depth to the next."""
    shallow = random_weights(dataclasses.replace(CONFIG, num_layers=1))
    timer(shallow, repetitions=1).decode([9], capacity=128)
    with compilations() as counts:
        timer(shallow, repetitions=3).decode([9], capacity=128)
        timer(shallow, repetitions=3).decode([100], capacity=128)
    assert counts == {}
    with compilations() as counts:
        timer(shallow, tokens=5).decode([9], capacity=128)
    assert counts["jit(decode)"] == 1


@pytest.mark.parametrize("mesh", [None, ("tensor", "seq")], ids=["one device", "mesh"])
def test_a_dispatch_by_itself(dispatches, mesh):
    """Each call starts at the same lengths, and what it runs can be read without compiling it."""
    model = random_weights(CONFIG, mesh=mesh and jax.make_mesh((2, 2), mesh))
    dispatch = timer(model, tokens=3).dispatch([5, 20], capacity=300)
    assert (dispatch.choice.implementation, dispatch.capacity) == ("xla", 512 if mesh else 384)
    assert all(dispatch() > 0 for _ in range(3))
    assert [lengths for lengths, _ in dispatches] == [[5, 20]] * 3
    with compilations() as counts:
        hlo = dispatch.hlo()
    assert counts == {}
    assert hlo.startswith("HloModule jit_decode")
    assert ("all-reduce" in hlo) == (mesh is not None)


def test_the_cache_holds_random_numbers_and_the_lengths():
    cache = bench.filled_cache(random_model(), [3, 128], 128)
    assert np.asarray(cache.lengths).tolist() == [3, 128]
    arrays = [np.asarray(x) for x in (*cache.keys, *cache.values)]
    assert [x.shape for x in arrays] == [(2, 128, 2, 8)] * 4
    assert len({x.tobytes() for x in arrays}) == 4
    for x in arrays:
        assert np.count_nonzero(x) > 0.99 * x.size
        assert abs(x.std() - 1) < 0.05


def test_the_cache_is_filled_in_place():
    empty = random_model().init_cache(1, 128).keys[0]
    place = empty.unsafe_buffer_pointer()
    assert bench._randomised(empty, np.uint32(1), None).unsafe_buffer_pointer() == place


def test_over_a_mesh_rows_count_what_one_device_reads():
    mesh = jax.make_mesh((2, 2, 2), ("data", "tensor", "seq"))
    sharded = random_weights(CONFIG, mesh=mesh)
    row = timer(model=sharded, tokens=2, repetitions=1).decode([100, 30])
    alone = timer(model=random_weights(CONFIG), tokens=2, repetitions=1).decode([100, 30])
    assert (row.mesh, alone.mesh) == ("data=2,tensor=2,seq=2", "")
    cache = bench.cache_bytes(CONFIG, [100, 30], 2, 4)
    assert row.bytes_per_step == round(bench.weight_bytes(sharded) + cache / 8)
    norms = 4 * CONFIG.embed_dim * (2 * CONFIG.num_layers + 1)  # whole on each device
    cut = (alone.bytes_per_step - cache - norms) / 4
    assert bench.weight_bytes(sharded) == norms + cut
    assert row.tok_s > 0


# Attention


def test_not_splitting_reaches_attention(monkeypatch):
    """As num_splits=1 of flash_decode, in every layer; here XLA stands in for it."""
    seen = []
    door = decode_loop.Llama.__call__.__globals__["decode_attention"]

    def spy(*arrays, implementation, num_splits, **options):
        seen.append((implementation, num_splits))
        return door(*arrays, implementation="xla", **options)

    monkeypatch.setitem(decode_loop.Llama.__call__.__globals__, "decode_attention", spy)
    monkeypatch.setattr(
        bench, "explain_attention", lambda *_, **__: AttentionChoice("flash_decode", "asked for")
    )
    config = dataclasses.replace(CONFIG, num_layers=1, ffw_dim=40)
    row = timer(random_weights(config), repetitions=1).decode([5], NO_SPLIT)
    assert row.implementation == NO_SPLIT
    assert seen == [("flash_decode", 1)] * config.num_layers
    seen.clear()
    row = timer(random_weights(config), repetitions=1).decode([5], "flash_decode")
    assert row.implementation == "flash_decode"
    assert seen == [("flash_decode", None)] * config.num_layers


def test_auto_is_named_after_what_runs():
    choice = bench.choose_attention(CONFIG, "float32", "auto")
    assert choice.implementation == "xla"
    assert "JAX runs on cpu" in choice.reason


def test_attention_is_chosen_for_what_each_device_has(monkeypatch):
    def shapes(q, k, *_, **__):
        return q.shape, k.shape

    monkeypatch.setattr(bench, "explain_attention", shapes)
    config = dataclasses.replace(CONFIG, head_dim=64, ffw_dim=64)
    for sizes, q, k in [
        ({}, (1, 1, 4, 64), (1, 1024, 2, 64)),
        ({"tensor": 2, "seq": 4}, (1, 1, 2, 64), (1, 256, 1, 64)),
        ({"seq": 32}, (1, 1, 4, 64), (1, 128, 2, 64)),  # at least one block of slots
        ({"data": 4}, (1, 1, 4, 64), (1, 1024, 2, 64)),
    ]:
        assert bench.choose_attention(config, "bfloat16", "auto", fit(config, sizes)) == (q, k)


@pytest.mark.parametrize("name", ["flash_decode", NO_SPLIT])
def test_what_does_not_run_here_says_why(name):
    assert name in NAMES
    with pytest.raises(DeviceError, match=f"attention {name}: .*need an NVIDIA Hopper GPU"):
        timer().decode([5], name)
    with pytest.raises(RequestError, match=r"one of auto, .*, found 'fast'"):
        timer().decode([5], "fast")


# Prompts


def test_a_prompt_is_timed_to_its_first_token():
    row = timer(repetitions=2).prefill(20, 2)
    assert (row.test, row.batch, row.depth, row.tokens) == ("pp20", 2, 0, 20)
    assert (row.implementation, row.capacity, row.repetitions) == ("xla", 128, 2)
    assert 2 * 20 / row.seconds <= row.tok_s * 1.0001
    assert row.bytes_per_step is row.bound_tok_s is row.fraction_of_bound is row.gb_s is None
    with compilations() as counts:
        timer(repetitions=3).prefill(20, 2)
    assert counts == {}


def test_the_prompts_are_what_generate_gets(monkeypatch):
    calls = []
    generate = bench.generate

    def spy(model, tokenizer, prompts, params, **options):
        lengths = np.asarray(options["cache"].lengths).tolist()
        calls.append((tokenizer, [len(p) for p in prompts], params.max_tokens, lengths))
        return generate(model, tokenizer, prompts, params, **options)

    monkeypatch.setattr(bench, "generate", spy)
    timer(repetitions=2).prefill(20, 2)
    assert calls == [(None, [20, 20], 1, [0, 0])] * 3


# Numbers


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [([2.0], (5.0, None)), ([2.0, 1.0], (7.5, 12.5**0.5)), ([1.0, 0.0], (None, None))],
    ids=["one", "two", "a clock that stands still"],
)
def test_mean_and_deviation(seconds, expected):
    assert bench.mean_and_deviation(10, seconds) == pytest.approx(expected)


def test_a_clock_that_stands_still_divides_nothing(monkeypatch):
    monkeypatch.setattr(bench.time, "perf_counter", lambda: 0.0)
    row = timer().decode([5, 20])
    assert row.tok_s is row.tok_s_std is row.gb_s is row.fraction_of_bound is None
    assert row.bound_tok_s > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens must be an integer from 1 to 1024, found 0"),
        ({"tokens": 2000}, "tokens must be an integer from 1 to 1024, found 2000"),
        ({"repetitions": 0}, "repetitions must be an integer from 1 to 10000, found 0"),
        ({"repetitions": True}, "repetitions must be .* found True"),
        ({"ceiling": 0.0}, "read_ceiling must be above 0"),
        ({"ceiling": float("nan")}, "read_ceiling must be above 0"),
    ],
    ids=str,
)
def test_what_makes_no_measurement_is_refused(options, message):
    with pytest.raises(RequestError, match=message):
        timer(**options)


@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    [
        ([], None, "the number of sequences must be an integer from 1 to 65536, found 0"),
        ([-1], None, "a depth must be an integer from 0 to 1073741824, found -1"),
        ([125], 128, "a depth of 125 and 4 tokens need a capacity of 129, found 128"),
        ([5], 0, "capacity must be an integer from 1"),
    ],
    ids=["none", "negative", "full", "no capacity"],
)
def test_what_does_not_fit_is_refused(lengths, capacity, message):
    with pytest.raises(RequestError, match=message):
        timer().decode(lengths, capacity=capacity)


def test_prompts_that_cannot_be_measured_are_refused():
    with pytest.raises(RequestError, match="prompt_tokens must be an integer from 1"):
        timer().prefill(0)
    with pytest.raises(RequestError, match="batch must be an integer from 1"):
        timer().prefill(5, 0)
    with pytest.raises(RequestError, match="a prompt goes through flash_decode"):
        timer().prefill(5, 1, NO_SPLIT)
