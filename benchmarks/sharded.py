"""Decoding over several GPUs of a host: speed, where the time goes, and what collectives cost.

    python benchmarks/sharded.py [PART ...] [--output FOLDER] [--budget-s 400]

    depth        CodeLlama-34B at 512 to 128k tokens: ours, XLA's attention, attention unsplit;
                 and, where ours exchanges through the peers' memory, ours with XLA's collectives
    layers       the time of a layer: matvecs, attention, collectives, the rest (needs CUPTI)
    collectives  latency by size, of XLA's and through the peers' memory
    attention    to a million tokens with one KV head, over 1, 2, 4 and 8 GPUs
    million      a million tokens in the cache: CodeLlama-34B, and with one KV head
    scaling      CodeLlama-34B on 1, 2, 4 and 8 GPUs

Without a PART all are measured: on two H200s in about 350 s, of which half is compiling (an
estimate); each further mesh of `scaling` takes 35 s more. Weights are random. A part's results file
is sharded_PART.json, written after each row; "left_out" says what is missing and why: what needs
more devices than there are, what does not fit into memory, what a mailbox among peers does not
take, what the budget ended. Beside what was measured stands what the planner expects, null where it
does not know the device. Exit status 1 if a case failed. --tiny runs every case with a tiny model
on any machine: it tests the script.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import sharded_ops as ops
from jax.sharding import Mesh
from kernel_items import itemised, items_of_fusions
from runs import Clock, CompileAhead, Recorder, Row, spoken_speed, tiny
from sharded_cases import (
    PEER,
    XLA,
    AttentionCase,
    Case,
    CollectiveCase,
    DecodeCase,
    Setup,
    attention_cases,
    collective_cases,
    depth_cases,
    layer_cases,
    million_cases,
    scaling_cases,
    setup_34b,
    setup_mqa,
    spread,
)
from source_hash import ROOT
from timing import cupti_kernels

from jaxdecode import bench, plan
from jaxdecode.device_model import of_device
from jaxdecode.memory import Workload
from jaxdecode.models.llama import Llama
from jaxdecode.models.random_model import random_model
from jaxdecode.models.sharding import choose_collectives, fit
from jaxdecode.read_bandwidth import METHODS, ReadCeiling, measure_read_ceiling

_TINY_SCALE = 1024  # caches are so many times shorter with --tiny
_KERNELS_KEPT = 30  # by time, in the results file


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the parts' results files and returns the exit status."""
    options = parse(arguments)
    # By itself JAX takes three quarters. A million tokens on two H200s need more, and what is left
    # is enough for NCCL and the programs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    clock = Clock(options.budget_s)
    options.output.mkdir(parents=True, exist_ok=True)
    devices = jax.devices()[: options.devices]
    ceiling = measure_read_ceiling(
        methods=options.read_methods, num_bytes=2**23 if options.tiny else None
    )
    clock.say(f"{len(devices)} devices, memory: read at {ceiling}")
    return Run(options, clock, devices, ceiling).measure()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks/results/h200")
    parser.add_argument("--budget-s", type=float, default=400.0, help="for everything together")
    parser.add_argument("--devices", type=int, help="use the first ones; default all")
    parser.add_argument("--tensor", type=int, help="how many share the heads of CodeLlama-34B")
    parser.add_argument("--tokens", type=int, default=32, help="per dispatch that is timed")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--read-methods", nargs="+", choices=METHODS, help="if not all should run")
    parser.add_argument("--compile-ahead", action="store_true", help=CompileAhead.HELP)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to test this script")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"PART must be one of {', '.join(PARTS)}, found {unknown[0]}")
    options.parts = options.parts or list(PARTS)
    return options


class Run:
    """One run of this script, and how each kind of case is measured in it.

    Attributes:
      devices: that may be used.
      setup: CodeLlama-34B over all of them, or as --tensor says.
      ours: what attention is by default.
      peers: whether `setup` exchanges through the peers' memory by default.
      device: their memory and speeds, for planning; None if they keep no account of memory.
    """

    def __init__(
        self, options: argparse.Namespace, clock: Clock, devices: list[jax.Device],
        ceiling: ReadCeiling,
    ):  # fmt: skip
        self.devices = devices
        self.setup = spread(len(devices)) if options.tensor is None else setup_34b(options.tensor)
        config = self.setup.config
        self.ours = bench.choose_attention(config, config.dtype, "auto").implementation
        used = Mesh(np.array(devices[: self.setup.devices]), ("all",))
        self.peers = choose_collectives(used)[0] == PEER
        self.device = of_device(devices[0])
        self._options, self._clock, self._ceiling = options, clock, ceiling
        speeds = self.device and self.device.speeds
        self._collectives = functools.partial(
            ops.collective_row, devices=devices, speeds=speeds, rounds=2 if options.tiny else 16
        )
        self._attention = ops.AttentionTimer(
            setup_mqa(1).config, devices, ceiling.bytes_per_second, speeds,
            0 if options.tiny else ops.COLD_BYTES,
        )  # fmt: skip
        # The one model that is in memory, and what several parts show but is measured once.
        self._timer: tuple[Setup, bench.Bench] | None = None
        self._decoded: dict[DecodeCase, Row] = {}

    def measure(self) -> int:
        """Measures the parts and returns the exit status."""
        folder = self._options.output
        recorders = {
            part: Recorder(
                folder / f"sharded_{part}.json", {"part": part}, self._ceiling, self._clock
            )
            for part in self._options.parts
        }
        for _, jobs in itertools.groupby(self.jobs(), lambda job: job[1].setup):
            self._measure_setup(list(jobs), recorders)
        for recorder in recorders.values():
            recorder.close()
        return 1 if any(recorder.failed for recorder in recorders.values()) else 0

    def _measure_setup(self, jobs: list[tuple[str, Case]], recorders: dict[str, Recorder]) -> None:
        obstacles = [self.obstacle(case) for _, case in jobs]
        feasible = [case for (_, case), no in zip(jobs, obstacles, strict=True) if no is None]
        decoding = [case for case in dict.fromkeys(feasible) if isinstance(case, DecodeCase)]
        ahead = CompileAhead(
            [functools.partial(self.dispatch, x) for x in decoding if self._options.compile_ahead]
        )
        for (part, case), reason in zip(jobs, obstacles, strict=True):
            if reason is not None:
                recorders[part].leave_out(case, reason)
                continue
            row = functools.partial(PARTS[part].row, self, case)
            recorders[part].measure(case, case.kind, lambda row=row: [row()], PARTS[part].spoken)
            ahead()

    def jobs(self) -> list[tuple[str, Case]]:
        """(part, case) of everything, put together by models, so that each is made once. What the
        profiler times comes last: it slows down all that a process launches from then on."""
        jobs = [
            (part, self._shrunk(shortened(case) if self._options.tiny else case))
            for part in self._options.parts
            for case in PARTS[part].cases(self)
        ]
        setups = [case.setup for _, case in jobs]
        profiled = {case.setup for part, case in jobs if PARTS[part].profiled}

        def place(job: tuple[str, Case]) -> tuple[bool, int, bool]:
            part, case = job
            return case.setup in profiled, setups.index(case.setup), PARTS[part].profiled

        return sorted(jobs, key=place)

    def obstacle(self, case: Case) -> str | None:
        """Why the case cannot be measured here; None if it can."""
        if case.devices > len(self.devices):
            return f"it needs {case.devices} devices, and there are {len(self.devices)}"
        if isinstance(case, CollectiveCase):
            return ops.obstacle(case, self.devices)
        if not isinstance(case, DecodeCase):
            return None
        try:
            made = self._plan(case, (case.room or case.depth) + self._options.tokens)
        except ValueError as error:
            return str(error)
        if made is None or made.fits:
            return None
        return f"it does not fit into memory: {made}; {made.advice()}"

    def _shrunk(self, case: Case) -> Case:
        """The case, with as many layers as fit into memory if it allows that."""
        if not isinstance(case, DecodeCase) or not case.may_shrink:
            return case
        layers = range(case.setup.config.num_layers, 0, -1)
        fitting = (each for each in map(case.with_layers, layers) if self.obstacle(each) is None)
        return next(fitting, case)

    def _plan(self, case: DecodeCase, context: int) -> plan.Plan | None:
        """The planner's view of the case; ValueError if the mesh does not divide the model."""
        config = case.setup.config
        sharding = fit(config, dict(case.setup.sizes))
        if self.device is None:
            return None
        work = Workload(config=config, context=context, dtype=config.dtype, prefill_step_size=1)
        return plan.plan(work, self.device, sharding)

    def timer(self, case: DecodeCase) -> bench.Bench:
        """For the case's model and collectives."""
        made = self._made(case.setup)
        model, mesh = made.model, made.model.sharding.mesh
        if mesh is None:
            return made
        # The same weights: only what their exchanges go through differs.
        collectives = case.collectives or choose_collectives(mesh)[0]
        sharding = dataclasses.replace(model.sharding, collectives=collectives)
        return dataclasses.replace(
            made, model=Llama.from_params(model.config, model.params(), sharding)
        )

    def _made(self, setup: Setup) -> bench.Bench:
        """For this model, which takes the place of the one before."""
        if self._timer is None or self._timer[0] != setup:
            self._timer = None
            model = random_model(setup.config, mesh=self._mesh(setup))
            self._clock.say(
                f"{setup}: random weights, each device reads "
                f"{bench.weight_bytes(model) / 1e9:.2f} GB of them per step"
            )
            options = self._options
            self._timer = setup, bench.Bench(
                model, setup.model, self._ceiling.bytes_per_second, options.tokens,
                options.repetitions,
            )  # fmt: skip
        return self._timer[1]

    def _mesh(self, setup: Setup) -> Mesh | None:
        if not setup.sizes:
            return None
        axes, sizes = zip(*setup.sizes, strict=True)
        return Mesh(np.array(self.devices[: setup.devices]).reshape(sizes), axes)

    def _capacity(self, case: DecodeCase) -> int | None:
        return None if case.room is None else case.room + self._options.tokens

    def dispatch(self, case: DecodeCase) -> bench.Dispatch:
        """What is timed of the case."""
        capacity = self._capacity(case)
        return self.timer(case).dispatch([case.depth], case.implementation, capacity=capacity)

    def decode_row(self, case: DecodeCase) -> Row:
        """Tokens per second, beside the bound and the planner's prediction."""
        if case not in self._decoded:
            timer = self.timer(case)
            found = timer.decode([case.depth], case.implementation, capacity=self._capacity(case))
            # The mean depth of the tokens that are timed.
            made = self._plan(case, case.depth + (found.tokens + 1) // 2)
            self._decoded[case] = {
                **dataclasses.asdict(found),
                "collectives": timer.model.sharding.collectives or XLA,
                "num_layers": case.setup.config.num_layers,
                "devices": case.devices,
                "predicted_tok_s": made.speed.predicted_tok_s if made and made.speed else None,
            }
        return self._decoded[case]

    def layer_row(self, case: DecodeCase) -> Row:
        """Microseconds per layer: of a step by the clock, and of its kernels by CUPTI.

        What a step does once, such as the output projection, is spread over the layers. Kernels are
        the mean over the devices; idle is the time in which no kernel runs, if none overlap."""
        setup, tokens, timer = case.setup, self._options.tokens, self.timer(case)
        dispatch = self.dispatch(case)
        dispatch()  # compiles
        step = statistics.median(dispatch() for _ in range(self._options.repetitions))
        kernels = cupti_kernels(dispatch)
        items, by_name = itemised(kernels, items_of_fusions(dispatch.hlo()))
        layers = tokens * setup.config.num_layers
        us = step / layers * 1e6
        items_us = {item: seconds / layers / case.devices * 1e6 for item, seconds in items.items()}
        return {
            "model": setup.model, "mesh": setup.mesh, "num_layers": setup.config.num_layers,
            "devices": case.devices, "depth": case.depth, "tokens": tokens,
            "implementation": dispatch.choice.implementation,
            "collectives": timer.model.sharding.collectives or XLA, "us": us, "items_us": items_us,
            "idle_us": us - sum(items_us.values()),
            "kernels": [
                {
                    "name": kernel["name"], "item": kernel["item"],
                    "per_layer": kernel["count"] / layers / case.devices,
                    "us": kernel["seconds"] / layers / case.devices * 1e6,
                }
                for kernel in by_name[:_KERNELS_KEPT]
            ],
        }  # fmt: skip

    def collective_row(self, case: CollectiveCase) -> Row:
        return self._collectives(case)

    def attention_row(self, case: AttentionCase) -> Row:
        return self._attention.row(case)


class Part(NamedTuple):
    """What a results file holds: its cases, the row of one of them, that row in words, and whether
    a profiler times it."""

    cases: Callable[[Run], Sequence[Case]]
    row: Callable[[Run, Any], Row]
    spoken: Callable[[Row], str]
    profiled: bool = False


def spoken_time(row: Row) -> str:
    """The row in words."""
    return f"{row['us']:.1f} us"


PARTS = {
    "depth": Part(
        lambda run: depth_cases(run.setup, run.ours, run.peers), Run.decode_row, spoken_speed
    ),
    "layers": Part(
        lambda run: layer_cases(run.setup, run.ours, run.peers),
        Run.layer_row, spoken_time, profiled=True,
    ),
    "collectives": Part(
        lambda run: collective_cases(len(run.devices), ops.implementations()),
        Run.collective_row, spoken_time,
    ),
    "attention": Part(
        lambda run: attention_cases(len(run.devices)), Run.attention_row, spoken_time
    ),
    "million": Part(
        lambda run: million_cases(run.setup, len(run.devices), run.ours),
        Run.decode_row, spoken_speed,
    ),
    "scaling": Part(
        lambda run: scaling_cases(len(run.devices), run.ours), Run.decode_row, spoken_speed
    ),
}  # fmt: skip


def shortened(case: Case) -> Case:
    """The case with --tiny."""
    if isinstance(case, CollectiveCase):
        return dataclasses.replace(case, bytes=case.bytes // 64)
    if isinstance(case, AttentionCase):
        return dataclasses.replace(case, tokens=case.tokens // _TINY_SCALE)
    setup = dataclasses.replace(case.setup, config=tiny(case.setup.config))
    room = None if case.room is None else case.room // _TINY_SCALE
    depth = max(1, case.depth // _TINY_SCALE)
    return dataclasses.replace(case, setup=setup, depth=depth, room=room)


if __name__ == "__main__":
    sys.exit(main())
