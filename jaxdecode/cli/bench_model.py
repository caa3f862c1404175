"""What `jaxdecode bench` measures: the model, the devices it lies on, and their attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import jax

from jaxdecode import bench
from jaxdecode.checkpoint import loading
from jaxdecode.cli import runtime
from jaxdecode.cli.output import Report, progress_bars
from jaxdecode.device_model import of_device
from jaxdecode.errors import DeviceError, RequestError
from jaxdecode.memory import Workload
from jaxdecode.models.config import PRESETS, LlamaConfig
from jaxdecode.models.llama import Llama
from jaxdecode.models.random_model import random_model
from jaxdecode.models.sharding import Sharding, describe
from jaxdecode.plan import plan as plan_memory

if TYPE_CHECKING:
    from jaxdecode.cli.bench import Plan

Sizes = dict[str, int] | Literal["auto"] | None


def make_model(
    report: Report, plan: Plan, model: str, preset: str | None, dtype: str | None,
    sizes: Sizes,
) -> tuple[Llama, list[str]]:  # fmt: skip
    """The model of -m, or the preset with random weights; and the attention to measure.

    Raises:
      DecodeError: the model cannot be loaded or does not fit, or an implementation does not run
        here.
    """
    if preset is not None:
        config = PRESETS[preset]
        dtype = dtype or config.dtype
        sharding, names = choose(report, plan, config, dtype, sizes)
        return random_model(config, dtype, mesh=sharding.mesh), names
    source = runtime.open_model(report, model)
    try:
        dtype = dtype or loading.default_dtype(source)
        sharding, names = choose(report, plan, source.config, dtype, sizes)
        with progress_bars(report, "bytes") as on_progress:
            return loading.load_model(source, dtype, sharding, on_progress=on_progress), names
    finally:
        source.close()


def choose(
    report: Report, plan: Plan, config: LlamaConfig, dtype: str,
    sizes: Sizes,
) -> tuple[Sharding, list[str]]:  # fmt: skip
    """The devices and the attention to measure on; says which, and why.

    Raises:
      DecodeError: there are too few devices, their memory is too small, or an implementation does
        not run on them.
    """
    device = report.device
    if device is None:
        raise DeviceError("no device was chosen")
    sharding = runtime.make_sharding(config, sizes, jax.devices(device.platform))
    if sizes is not None:
        report.say(describe(config, sharding))
    work, here = largest_work(plan, config, dtype, sharding), of_device(device)
    runtime.check_memory(report, None if here is None else plan_memory(work, here, sharding))
    return sharding, choose_attention(report, config, dtype, plan.attention, sharding)


def largest_work(plan: Plan, config: LlamaConfig, dtype: str, sharding: Sharding) -> Workload:
    """The row that takes most memory.

    Raises:
      RequestError: the mesh axis data does not divide a batch.
    """
    sizes = [
        (bench.slots_for(lengths, plan.tokens, plan.capacity, sharding), len(lengths))
        for lengths in plan.batches
    ]
    sizes += [(tokens + 1, batch) for tokens, batch in plan.prompts]
    for _, batch in sizes:
        if batch % sharding.data:
            raise RequestError(
                f"a batch of {batch} is not divided by the mesh axis data={sharding.data}; "
                "choose another with -b or --mesh"
            )
    context, batch = max(sizes, key=math.prod)
    return Workload(config=config, context=context, batch=batch, dtype=dtype)


def choose_attention(
    report: Report, config: LlamaConfig, dtype: str, names: list[str], sharding: Sharding
) -> list[str]:
    """The names without those that run what an earlier one does; says which runs, and why."""
    chosen: dict[str, str] = {}
    kind = report.device.device_kind if report.device else "unknown"
    report.say(f"device: {kind}; weights: {dtype}")
    for name in names:
        choice = bench.choose_attention(config, dtype, name, sharding)
        report.say(f"attention {name}: {runtime.brief_of_steps(choice, config, dtype, sharding)}")
        chosen.setdefault(choice.implementation, name)
    return list(chosen.values())
