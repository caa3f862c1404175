"""`jaxdecode plan`: what a model takes of the devices' memory, and how fast it can be there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxdecode.cli import options
from jaxdecode.cli.output import Report, one_line, write_json, write_text
from jaxdecode.device_model import DEVICES, DeviceModel, of_device
from jaxdecode.errors import DeviceError, RequestError
from jaxdecode.units import readable_bytes

if TYPE_CHECKING:
    from jaxdecode.memory import Workload
    from jaxdecode.models.config import LlamaConfig
    from jaxdecode.models.sharding import Sharding
    from jaxdecode.plan import Plan

Model = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--model",
        metavar="PATH|NAME",
        rich_help_panel=options.MODEL,
        help="The model, as -m of generate takes it; only its headers are read.",
    ),
]
Batch = Annotated[
    int,
    typer.Option("-b", "--batch", rich_help_panel=options.RUN, help="Sequences that run together."),
]
DeviceKind = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=options.RUN,
        help=f"A kind of GPU: {', '.join(DEVICES)}; if not given, this machine's own device.",
    ),
]
Gpus = Annotated[
    int | None,
    typer.Option(
        min=1,
        rich_help_panel=options.RUN,
        help="How many to cut the model over; if not given, and without --mesh, the fewest that "
        "suffice.",
    ),
]
GpusPerHost = Annotated[
    int,
    typer.Option(min=1, rich_help_panel=options.RUN, help="How many share one host's fast links."),
]
MemoryFraction = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        rich_help_panel=options.RUN,
        help="Share of a --device-kind's memory for JAX, as XLA_CLIENT_MEM_FRACTION sets it.",
    ),
]


def plan(
    context: typer.Context,
    model: Model = None,
    preset: options.Preset = None,
    dtype: options.Dtype = None,
    context_size: options.Context = None,
    batch: Batch = 1,
    mesh: options.Mesh = None,
    gpus: Gpus = None,
    gpus_per_host: GpusPerHost = 8,
    device_kind: DeviceKind = None,
    memory_fraction: MemoryFraction = 0.75,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show the memory that a model and its context take, and the tok/s that they allow.

    Nothing is loaded and no GPU is needed. Speeds are arithmetic, not measurements.
    """
    from jaxdecode import plan as planning
    from jaxdecode.memory import Workload

    report: Report = context.obj
    report.quiet = quiet
    kinds = {name: _usable(kind, memory_fraction) for name, kind in DEVICES.items()}
    device = _device(device_kind, kinds)
    name, config, own_dtype = _model(report, model, preset, device.platform)
    work = Workload(
        config=config, context=config.max_positions if context_size is None else context_size,
        batch=batch, dtype=dtype or own_dtype,
    )  # fmt: skip
    made = planning.plan(work, device, _sharding(work, device, mesh, gpus), gpus_per_host)
    fewest = {
        kind: planning.plan(work, each, planning.smallest_mesh(work, each), gpus_per_host)
        for kind, each in kinds.items()
    }
    answer = describe(name, made, fewest, gpus_per_host)
    if as_json:
        write_json(answer)
    else:
        write_text("\n".join(map(one_line, readable(answer))) + "\n")


def _usable(kind: DeviceModel, share: float) -> DeviceModel:
    """A known device with as much of its memory as JAX may use."""
    if not 0 < share <= 1:
        raise RequestError(f"--memory-fraction must be above 0 and at most 1, found {share}")
    return dataclasses.replace(kind, memory=int(kind.memory * share))


def _device(name: str | None, kinds: Mapping[str, DeviceModel]) -> DeviceModel:
    from jaxdecode.cli import runtime

    if name is None:
        chosen = of_device(runtime.select_device("auto"))
        if chosen is None:
            raise DeviceError("this device does not say its memory; name one with --device-kind")
        return chosen
    if name not in kinds:
        raise RequestError(f"--device-kind {name!r} is unknown; known: {', '.join(kinds)}")
    runtime.select_device("cpu")
    return kinds[name]


def _model(
    report: Report, model: str | None, preset: str | None, platform: str
) -> tuple[str, LlamaConfig, str]:
    """Name, configuration and the dtype in which the weights are loaded unless told otherwise."""
    from jaxdecode.checkpoint.loading import default_dtype
    from jaxdecode.cli import runtime
    from jaxdecode.models.config import PRESETS

    if (model is None) == (preset is None):
        raise RequestError("give one model: -m PATH|NAME, or --preset NAME")
    if preset is not None:
        return preset, PRESETS[preset], PRESETS[preset].dtype
    source = runtime.open_model(report, str(model))
    source.close()
    return str(source.path), source.config, default_dtype(source, platform)


def _sharding(work: Workload, device: DeviceModel, mesh: str | None, gpus: int | None) -> Sharding:
    """The mesh that was asked for; else, and for auto, one over all GPUs or the fewest that do."""
    from jaxdecode.models.sharding import Sharding, auto_sizes, fit
    from jaxdecode.plan import smallest_mesh

    sizes = options.parse_mesh(mesh or "auto")
    if sizes == "auto" and gpus is None:
        return smallest_mesh(work, device) or Sharding()
    try:
        if sizes == "auto":
            return fit(work.config, auto_sizes(work.config, gpus or 1))
        sharding = fit(work.config, sizes)
    except ValueError as error:
        raise RequestError(f"--mesh {mesh or 'auto'}: {error}") from error
    if gpus not in (None, sharding.num_devices):
        raise RequestError(
            f"--mesh {mesh} has {sharding.num_devices} devices, but --gpus is {gpus}; give one"
        )
    return sharding


def describe(
    name: str, made: Plan, fewest: Mapping[str, Plan], devices_per_host: int
) -> dict[str, Any]:
    """The object that --json prints; tests hold its keys."""
    from jaxdecode.models.sharding import describe as describe_mesh

    work, memory = made.work, made.memory
    return {
        "model": name,
        "dtype": work.dtype,
        "batch": work.batch,
        "context": work.context,
        "capacity": work.capacity(made.sharding),
        "device": made.device.name,
        "memory_bytes": made.device.memory,
        "hosts": -(-made.sharding.num_devices // devices_per_host),
        "mesh_note": describe_mesh(work.config, made.sharding),
        **_mesh(made.sharding),
        "weights_bytes": memory.weights,
        "cache_bytes": memory.cache,
        "workspace_bytes": memory.workspace,
        "total_bytes": memory.total,
        "free_bytes": made.free,
        "fits": made.fits,
        "largest_context": made.largest_context,
        "smallest": _mesh(made.smallest) if made.smallest else None,
        **_speed(made),
        "kinds": {
            kind: {"memory_bytes": each.device.memory, **_mesh(each.sharding), **_speed(each)}
            for kind, each in fewest.items()
            if each.fits
        },
    }


def _mesh(sharding: Sharding) -> dict[str, Any]:
    sizes = {"data": sharding.data, "tensor": sharding.tensor, "seq": sharding.seq}
    return {"devices": sharding.num_devices, "mesh": sizes}


def _speed(made: Plan) -> dict[str, Any]:
    from jaxdecode.roofline import Speed

    speeds = made.device.speeds
    known = dataclasses.asdict(made.speed) if made.speed else {}
    return {
        **{field.name: known.get(field.name) for field in dataclasses.fields(Speed)},
        "read_tb_s": speeds.read_tb_s if speeds else None,
        "read_source": speeds.read_source if speeds else None,
    }


def readable(answer: dict[str, Any]) -> list[str]:
    """The same for people."""
    hosts = f" on {answer['hosts']} hosts" if answer["hosts"] > 1 else ""
    lines = [
        f"model: {answer['model']} in {answer['dtype']}",
        f"batch {answer['batch']}, context {answer['context']} tokens",
        f"devices: {answer['devices']} x {answer['device']}{hosts}, "
        f"{readable_bytes(answer['memory_bytes'])} for JAX on each",
        answer["mesh_note"],
        "",
        *_memory_table(answer),
        "",
        f"largest context here: {answer['largest_context'] or 'none'}",
        *_smallest_line(answer),
        *_speed_lines(answer),
    ]
    if answer["kinds"]:
        lines += ["", "fewest GPUs for this batch and context:"]
        lines += [f"  {_kind_line(name, each)}" for name, each in answer["kinds"].items()]
    else:
        lines += ["", f"no mesh of {', '.join(DEVICES)} holds this batch and context"]
    return lines


def _memory_table(answer: dict[str, Any]) -> list[str]:
    rows = {
        "on each device": "",
        "weights": readable_bytes(answer["weights_bytes"]),
        "KV cache": readable_bytes(answer["cache_bytes"]),
        "workspace, up to": readable_bytes(answer["workspace_bytes"]),
        "total": readable_bytes(answer["total_bytes"]),
    }
    if answer["free_bytes"] >= 0:
        rows["free"] = readable_bytes(answer["free_bytes"])
    elif answer["fits"]:
        rows["too little, if the workspace is that large"] = readable_bytes(-answer["free_bytes"])
    else:
        rows["too little: does not fit"] = readable_bytes(-answer["free_bytes"])
    width = max(map(len, rows))
    return [f"{name:<{width}}{value:>11}".rstrip() for name, value in rows.items()]


def _smallest_line(answer: dict[str, Any]) -> list[str]:
    """What would hold it, where these devices do not."""
    if answer["fits"]:
        return []
    smallest = answer["smallest"]
    if smallest is None:
        return ["no number of such devices holds it"]
    return [f"fewest such devices that hold it: {smallest['devices']} ({_sizes(smallest)})"]


def _sizes(mesh: dict[str, Any]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in mesh["mesh"].items() if axis != "data")


def _speed_lines(answer: dict[str, Any]) -> list[str]:
    if answer["bound_tok_s"] is None:
        return [f"tok/s: not known for {answer['device']}; --device-kind names GPUs that are"]
    return [
        f"each device reads in a step: {readable_bytes(answer['bytes_per_step'])}, "
        f"at {answer['read_tb_s']} TB/s ({answer['read_source']})",
        f"bound: {answer['bound_tok_s']:.1f} tok/s with the cache full",
        f"predicted: {answer['predicted_tok_s']:.1f} tok/s, estimated",
        f"a prompt that fills the cache: at least {answer['prefill_seconds']:.1f} s",
    ]


def _kind_line(name: str, each: dict[str, Any]) -> str:
    return (
        f"{each['devices']:>4} x {name:<10} {readable_bytes(each['memory_bytes']):>9} each   "
        f"{_sizes(each):<19} at most {each['bound_tok_s']:.1f} tok/s"
    )
