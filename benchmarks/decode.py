"""Decoding speed on one GPU, beside the bound of its memory: one results file per chart.

    python benchmarks/decode.py depth capacity call prompt mha batch ragged call_8b

Weights are random: speed does not depend on their values. Each row is the mean of some dispatches
of the step that `jaxdecode.generate` runs, with the read ceiling measured before in the same run.
Rows come in the order of their importance and the file is written after each, so a run that is cut
short, or that the budget ends, leaves a usable file; "left_out" says what is missing and why. A row
with "measured": false is a cost model (fastertransformer.py). The bound of a prompt is that of the
matrix units: its operations at the rate of a large matrix product in the same run. Exit status 1 if
a case failed.
--tiny runs every case with a tiny model and short caches on any machine: it tests the script.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import fastertransformer
import jax
import jax.numpy as jnp
import numpy as np
from decode_cases import CHARTS, Case, Chart
from runs import Clock, CompileAhead, Recorder, spoken_speed, tiny
from source_hash import ROOT
from timing import time_of

from jaxdecode import SamplingParams, bench, generate
from jaxdecode.errors import DeviceError
from jaxdecode.memory import Workload
from jaxdecode.models.config import PRESETS
from jaxdecode.models.random_model import random_model
from jaxdecode.read_bandwidth import METHODS, ReadCeiling, measure_read_ceiling
from jaxdecode.roofline import prefill_flops

_TINY_SCALE = 1024  # caches are so many times shorter with --tiny


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the charts' results files and returns the exit status."""
    options = parse(arguments)
    clock = Clock(options.budget_s)
    options.output.mkdir(parents=True, exist_ok=True)
    ceiling = measure_read_ceiling(
        methods=options.read_methods, num_bytes=2**23 if options.tiny else None
    )
    clock.say(f"memory: read at {ceiling}")
    failed = 0
    for preset, charts in itertools.groupby(options.charts, lambda name: CHARTS[name].preset):
        failed += run_model(preset, list(charts), ceiling, options, clock)
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("charts", nargs="+", choices=CHARTS)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results/h200")
    parser.add_argument("--budget-s", type=float, default=900.0, help="for everything together")
    parser.add_argument("--tokens", type=int, default=64, help="per dispatch that is timed")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--read-methods", nargs="+", choices=METHODS, help="if not all should run")
    parser.add_argument("--compile-ahead", action="store_true", help=CompileAhead.HELP)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to test this script")
    return parser.parse_args(arguments)


def run_model(
    preset: str, charts: list[str], ceiling: ReadCeiling, options: argparse.Namespace, clock: Clock
) -> int:
    """Measures one model's charts; returns how many cases failed. Its weights go with the call."""
    config = tiny(PRESETS[preset]) if options.tiny else PRESETS[preset]
    model = random_model(config)
    clock.say(f"{preset}: random weights, {bench.weight_bytes(model) / 1e9:.2f} GB read per step")
    timer = bench.Bench(
        model, preset, ceiling.bytes_per_second, options.tokens, options.repetitions
    )
    decoding = [x for name in charts for x in cases(name, options) if x.step_size is None]
    ahead = CompileAhead(
        [functools.partial(dispatch_of, timer, case) for case in decoding if options.compile_ahead]
    )
    return sum(run_chart(name, timer, ceiling, options, clock, ahead) for name in charts)


def cases(name: str, options: argparse.Namespace) -> tuple[Case, ...]:
    """Of a chart, short with --tiny."""
    chosen = CHARTS[name].cases
    return tuple(map(shortened, chosen)) if options.tiny else chosen


def dispatch_of(timer: bench.Bench, case: Case) -> bench.Dispatch:
    """What a case of decoding measures."""
    return timer.dispatch(case.lengths, case.implementation, capacity=case.capacity)


def run_chart(
    name: str, timer: bench.Bench, ceiling: ReadCeiling, options: argparse.Namespace, clock: Clock,
    ahead: CompileAhead,
) -> int:  # fmt: skip
    """Measures the chart's cases; returns how many failed."""
    chart, path = CHARTS[name], options.output / f"decode_{name}.json"
    recorder = Recorder(path, {"chart": name}, ceiling, clock)
    for case in cases(name, options):
        if case.called:
            row = functools.partial(measured_call, timer, case)
        elif case.step_size is None:
            row = functools.partial(measured, chart, timer, case, recorder.rows)
        else:
            row = functools.partial(measured_prompt, timer, case)
        recorder.measure(case, case.implementation, row, spoken_speed)
        ahead()
    recorder.close()
    return recorder.failed


class UnknownImplementation(DeviceError):
    """An implementation that this version of jaxdecode does not have."""


def measured(
    chart: Chart, timer: bench.Bench, case: Case, rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The row of a case, after that of the cost model if the chart wants one and has none yet."""
    if case.implementation not in bench.NAMES:
        raise UnknownImplementation("this version has no such implementation")
    found = timer.decode(case.lengths, case.implementation, capacity=case.capacity)
    row = {**dataclasses.asdict(found), "measured": True}
    known = any(x["depth"] == row["depth"] and not x["measured"] for x in rows)
    modelled = cost_model(timer, row) if chart.cost_model and not known else []
    return [*modelled, row]


def measured_call(timer: bench.Bench, case: Case) -> list[dict[str, Any]]:
    """The row of calls of `jaxdecode.generate`, which dispatches a few tokens at a time: of the
    seconds after the prompt, which is one token, beside those of the same tokens in one dispatch.
    """
    model, batch, tokens = timer.model, len(case.lengths), timer.tokens
    at_once = timer.decode(case.lengths, case.implementation, capacity=case.capacity)
    before = [length - 1 for length in case.lengths]
    cache = bench.filled_cache(model, before, at_once.capacity)
    before = model.sharding.place(np.array(before, np.int32), "B")
    params, seconds = SamplingParams(max_tokens=tokens, ignore_eos=True), []
    for _ in range(timer.repetitions + 2):  # as many as a dispatch is given to warm up
        result, *_ = generate(
            model, None, [[0]] * batch, params, cache=cache, implementation=case.implementation
        )
        cache = result.cache.truncate(before)
        seconds.append(result.stats.generation_seconds)
    rate, deviation = bench.mean_and_deviation(batch * tokens, seconds[2:])
    bound = at_once.bound_tok_s
    return [
        dataclasses.asdict(at_once) | {
            "test": at_once.test.replace("tg", "call"), "tok_s": rate, "tok_s_std": deviation,
            "seconds": statistics.fmean(seconds[2:]), "seconds_at_once": at_once.seconds,
            "gb_s": rate and rate / batch * at_once.bytes_per_step / 1e9,
            "fraction_of_bound": rate and rate / bound, "measured": True,
        }
    ]  # fmt: skip


def measured_prompt(timer: bench.Bench, case: Case) -> list[dict[str, Any]]:
    """The row of prompts of one length."""
    model, (tokens, *_) = timer.model, case.lengths
    found = timer.prefill(tokens, len(case.lengths), case.implementation, step_size=case.step_size)
    work = Workload(
        config=model.config, context=tokens, batch=len(case.lengths), dtype=model.dtype.name
    )
    flops, peak = prefill_flops(work, model.sharding), matmul_flop_s(model.config.embed_dim)
    bound = tokens * len(case.lengths) * peak / flops
    fraction = None if found.tok_s is None else found.tok_s / bound
    return [
        dataclasses.asdict(found) | {
            "bound_tok_s": bound, "fraction_of_bound": fraction, "step_size": case.step_size,
            "flops": flops, "matmul_tflop_s": peak / 1e12, "measured": True,
        }
    ]  # fmt: skip


@functools.cache
def matmul_flop_s(size: int) -> float:
    """Operations per second of the product of two square bfloat16 matrices of random numbers."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    multiply = jax.jit(lambda x, y: x @ y)

    def rotate(times: int) -> None:
        for _ in range(times):
            last = multiply(x, x)
        jax.block_until_ready(last)

    return 2 * size**3 / time_of(rotate)


def cost_model(timer: bench.Bench, row: dict[str, Any]) -> list[dict[str, Any]]:
    """FasterTransformer's row of the same case, if its kernel could run it."""
    config, itemsize = timer.model.config, timer.model.dtype.itemsize
    seen = row["depth"] + (row["tokens"] + 1) // 2
    seconds = fastertransformer.step_seconds(
        config, bench.weight_bytes(timer.model), seen, row["batch"], itemsize, timer.read_ceiling
    )
    if seconds is None:
        return []
    rate = row["batch"] / seconds
    unknown = dict.fromkeys(("tok_s_std", "seconds", "compile_s", "repetitions"))
    return [
        row | unknown | {
            "implementation": fastertransformer.NAME, "measured": False, "tok_s": rate,
            "gb_s": row["bytes_per_step"] / seconds / 1e9,
            "fraction_of_bound": rate / row["bound_tok_s"],
        }
    ]  # fmt: skip


def shortened(case: Case) -> Case:
    """The case with --tiny; a given capacity keeps room for the tokens."""
    lengths = tuple(max(1, length // _TINY_SCALE) for length in case.lengths)
    capacity = None if case.capacity is None else 4 * case.capacity // _TINY_SCALE
    return dataclasses.replace(case, lengths=lengths, capacity=capacity)


if __name__ == "__main__":
    sys.exit(main())
