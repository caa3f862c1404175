"""The attention benchmark without a GPU: its cases, its JAX side, and how it runs both sides."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import pathlib
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def cases():
    import attention_cases

    return attention_cases


@pytest.fixture
def small_rotation(cases, monkeypatch):
    """Tests have no cache to flush."""
    monkeypatch.setattr(cases, "COLD_BYTES", 1)
    monkeypatch.setattr(cases, "LEAST_CALLS", 4)


def test_cases_are_those_of_the_plan(cases):
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    assert {"1x512 16/2", "1x1048576 16/2", "16x8192 32/32", "1x65536 64/8", "256x256 16/2"} <= {
        *names
    }
    assert "8x65536 16/2 filled 2048" in names
    assert {case.B * case.S for case in cases.ARTICLE_CASES[:-1]} == {65536}
    ragged, uniform = cases.BATCH_CASES
    assert ragged.name == "32x65536 16/2 ragged"
    assert min(ragged.kv_len) >= 512
    assert max(ragged.kv_len) <= 65536
    # The lengths that the goal of 140 us was set for, and as many tokens without the mixture.
    assert sum(ragged.kv_len) == 501182
    assert sum(uniform.kv_len) == 501184


def test_bytes_are_those_of_the_visible_keys_and_values(cases):
    assert cases.full(1, 65536).bytes == 2 * 65536 * 2 * 128 * 2
    assert cases.filled(8, 65536, 2048).bytes == 8 * cases.full(1, 2048).bytes
    assert cases.ragged(32, 65536).bytes == 501182 * 1024
    row = cases.full(16, 8192, 32, 32).row()
    assert row["bytes"] == 16 * 8192 * 32 * 128 * 2 * 2
    assert (row["kv_len"], row["T"]) == (8192, 1)
    assert cases.ragged(4, 600).row()["kv_len"] == list(cases.ragged(4, 600).kv_len)


def test_every_rotation_is_cold_and_even(cases):
    for case in cases.CASES:
        rotation = case.rotation
        distinct = rotation.buffers * rotation.chains
        assert distinct * case.bytes >= cases.COLD_BYTES
        assert distinct >= 2
        assert rotation.buffers <= cases.MOST_BUFFERS
        assert rotation.calls >= 24
        assert rotation.calls % rotation.buffers == 0
        # Buffers of nearly empty caches are large: they still fit beside each other.
        held = distinct * case.bytes * case.S * case.B / sum(case.kv_len)
        assert held < 16e9, case.name


def test_page_tables(cases):
    case = cases.Case(3, 64, 4, 2, (1, 33, 64))
    starts, pages, last = case.page_tables()
    assert starts == [0, 1, 4, 8]
    assert pages == [0, 4, 5, 6, 8, 9, 10, 11]
    assert last == [1, 1, 16]


@pytest.fixture
def jax_side(small_rotation):
    import attention_jax

    with jax.numpy_dtype_promotion("standard"):  # jax.nn needs it
        yield attention_jax


# Four calls of 3 us and what they share, 2 us, three times; then a call alone with it, six times.
KERNELS = [[3e-6, 3e-6, 3e-6, 1e-6, 2e-6, 2e-6] * 3, [4e-6, 1e-6] * 6]


def measured(jax_side, case, names, kernels=KERNELS):
    kernels = itertools.cycle(kernels)

    def kernel_times(run):
        run()
        return next(kernels)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        prepared = jax_side.prepare(case, names, pool)
    return jax_side.measure(case, prepared, kernel_times)


@pytest.mark.parametrize("kv_len", [(64, 64), (3, 64)], ids=str)
def test_jax_side(jax_side, cases, kv_len):
    results = measured(jax_side, cases.Case(2, 64, 4, 2, kv_len), [*cases.OURS, *cases.JAX_PEERS])
    assert list(results) == [*cases.OURS, *cases.JAX_PEERS]
    for name in ("jaxdecode_xla", "xla"):
        assert results[name]["us"] > 0
        assert results[name]["kernel_us"] == pytest.approx(3)
        assert results[name]["once_us"] == pytest.approx(2)
    for name in ("flash_decode", "flash_decode_nosplit"):
        assert "need an NVIDIA Hopper GPU, and JAX runs on cpu" in results[name]["failure"]
    assert "cudnn" in results["cudnn"]["failure"].lower()


def test_fewer_kernels_than_calls_are_no_measurement(jax_side, cases):
    results = measured(jax_side, cases.full(1, 64, 2, 1), ["xla"], kernels=[[1e-6]])
    assert results == {"xla": {"failure": "RuntimeError: CUPTI saw 1 kernels of 12 calls"}}


def test_wrong_implementations_get_no_time(jax_side, cases, monkeypatch):
    def honest(q, k, v, kv_len):
        return jax_side.reference(q, k, v, kv_len).astype(q.dtype)

    calls = {
        "honest": honest,
        "a token short": lambda q, k, v, kv_len: honest(q, k, v, kv_len - 1),
        "a token too many": lambda q, k, v, kv_len: honest(q, k, v, kv_len + 1),
        "without the first": lambda q, k, v, kv_len: honest(q, k[:, 1:], v[:, 1:], kv_len - 1),
        "k and v swapped": lambda q, k, v, kv_len: honest(q, v, k, kv_len),
        "sequences swapped": lambda q, k, v, kv_len: honest(q, k, v, kv_len)[::-1],
        "not a number": lambda q, k, v, kv_len: jnp.full_like(q, jnp.nan),
    }
    monkeypatch.setattr(jax_side, "implementation_calls", lambda case: calls)
    results = measured(jax_side, cases.Case(2, 64, 4, 2, (40, 63)), list(calls))
    assert "us" in results.pop("honest")
    assert len(results) == 6
    for name, found in results.items():
        assert found.get("failure", "").startswith("WrongResult: relative error"), name


def test_chain_feeds_each_result_to_the_next_call(jax_side):
    run = jax_side.chain(lambda q, k, v, kv_len: q * k + v, 5)
    q, kv_len = jnp.float32(1.0), jnp.int32(1)
    keys, values = [jnp.float32(2), jnp.float32(3)], [jnp.float32(10), jnp.float32(100)]
    first, last = run(q, keys, values, kv_len)
    expected = [1.0]
    for i in range(5):
        expected.append(expected[-1] * (2, 3)[i % 2] + (10, 100)[i % 2])
    assert (first, last) == (expected[1], expected[-1])


SIDE = """
    import sys
    sys.path.insert(0, {benchmarks!r})
    from attention_worker import serve

    def answer(request):
        print("a library says hello")
        match request["do"]:
            case "prepare":
                if {prepares!r} == "no":
                    sys.exit("no GPU today")
                return {{"device": "GPU", "versions": {{"jax": "1"}}, "cases": request["cases"],
                        "missing": {missing!r}}}
            case "read_peak":
                return {{"copy": 3e12, "tma": 4e12}}
            case "measure":
                if request["case"] == {breaks_at!r}:
                    print("out of luck", file=sys.stderr)
                    sys.exit(3)
                if request["case"] == {fails_at!r}:
                    raise ValueError("not this one")
                return {{name: {{"us": 20.0, "kernel_us": 10.0}} for name in {names!r}}}

    serve(answer)
"""


@pytest.fixture
def make_side(tmp_path):
    import attention

    sides = []

    def make(names, *, prepares="yes", missing=None, breaks_at=None, fails_at=None):
        script = tmp_path / f"side{len(sides)}.py"
        values = dict(prepares=prepares, missing=missing or {}, breaks_at=breaks_at)
        values |= dict(names=names, fails_at=fails_at, benchmarks=str(BENCHMARKS))
        script.write_text(textwrap.dedent(SIDE.format(**values)))
        sides.append(attention.Side([sys.executable, str(script)], names, names, {}))
        return sides[-1]

    yield make
    for side in sides:
        side.stop()


def test_run_writes_rows_after_every_case(make_side, cases, tmp_path, capsys):
    import attention

    sides = [make_side(["flash_decode"]), make_side(["fa3"], missing={"flashinfer": "no wheel"})]
    results = attention.run(sides, [0, 1], 60.0, tmp_path / "new" / "attention.json")
    assert json.loads((tmp_path / "new" / "attention.json").read_text()) == results
    first, *_, last = results["rows"]
    assert first == cases.CASES[0].row() | {
        "implementation": "flash_decode",
        "us": 20.0,
        "kernel_us": 10.0,
        "fraction_of_peak": round(cases.CASES[0].bytes / 10e-6 / 4e12, 4),
    }
    assert (last["S"], last["implementation"]) == (2048, "fa3")
    assert (results["device"], results["jax"], results["read_peak_tb_s"]) == ("GPU", "1", 4.0)
    assert results["read_rates_tb_s"] == {"copy": 3.0, "tma": 4.0}
    assert results["missing"] == {"flashinfer": "no wheel"}
    assert (len(results["rows"]), results["failures"], results["not_measured"]) == (4, [], [])
    assert attention.exit_status(results) == 0
    assert "hello" in capsys.readouterr().err


def test_run_out_of_time_says_what_is_left(make_side, cases, tmp_path, monkeypatch):
    import attention

    clock = types.SimpleNamespace(monotonic=iter([0.0, 59.0, 61.0]).__next__)
    monkeypatch.setattr(attention, "time", clock)
    sides = [make_side(["flash_decode"]), make_side([])]
    results = attention.run(sides, [0, 2, 3], 60.0, tmp_path / "x.json")
    assert results["not_measured"] == [cases.CASES[2].name, cases.CASES[3].name]
    assert [row["S"] for row in results["rows"]] == [512]
    assert json.loads((tmp_path / "x.json").read_text()) == results


def test_a_side_that_breaks_is_started_again(make_side, tmp_path):
    import attention

    sides = [make_side(["flash_decode"], breaks_at=1), make_side(["fa3"], fails_at=0)]
    results = attention.run(sides, [0, 1, 2], 60.0, tmp_path / "x.json")
    rows = [(row["S"], row["implementation"]) for row in results["rows"]]
    assert rows == [
        (512, "flash_decode"), (2048, "fa3"), (8192, "flash_decode"), (8192, "fa3"),
    ]  # fmt: skip
    other, broken = results["failures"]
    assert (other["implementation"], other["reason"]) == ("fa3", "ValueError: not this one")
    assert (broken["implementation"], broken["S"]) == ("flash_decode", 2048)
    assert "the process ended" in broken["reason"]
    assert "out of luck" in broken["reason"]
    assert attention.exit_status(results) == 1


def test_peers_that_cannot_start_are_listed_as_missing(make_side, tmp_path):
    import attention

    sides = [make_side(["flash_decode"]), make_side(["fa3", "flashinfer"], prepares="no")]
    results = attention.run(sides, [0], 60.0, tmp_path / "x.json")
    assert list(results["missing"]) == ["fa3", "flashinfer"]
    assert "no GPU today" in results["missing"]["fa3"]
    assert [row["implementation"] for row in results["rows"]] == ["flash_decode"]


def test_a_worker_that_hangs_is_stopped(tmp_path):
    from attention_worker import Worker, WorkerError

    worker = Worker([sys.executable, "-c", "import time; time.sleep(60)"])
    worker.send({"do": "measure"})
    with pytest.raises(WorkerError, match="gave no answer in 0 s"):
        worker.receive(0.2)
    assert not worker.is_running


def test_wrong_results_and_our_failures_fail_the_run():
    from attention import exit_status

    def failed(name, reason):
        return {"failures": [{"implementation": name, "reason": reason}]}

    assert exit_status(failed("sdpa_flash", "NotImplementedError: takes no lengths")) == 0
    assert exit_status(failed("sdpa_flash", "WrongResult: relative error 1, at most 0.01")) == 1
    assert exit_status(failed("flash_decode", "RuntimeError: no")) == 1


def test_cases_and_implementations_are_chosen_by_name(cases):
    import attention

    chosen = [cases.CASES[i].name for i in attention.chosen_cases("1x512 , ragged")]
    assert chosen == ["1x512 16/2", "32x65536 16/2 ragged"]
    assert len(attention.chosen_cases(None)) == len(cases.CASES)
    with pytest.raises(SystemExit, match="no case holds '7x7'"):
        attention.chosen_cases("7x7")
    assert attention.chosen_implementations("xla, fa3") == ["xla", "fa3"]
    with pytest.raises(SystemExit, match=r"no \['fa4'\]"):
        attention.chosen_implementations("fa4")
