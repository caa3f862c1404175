"""From options to a running model: device, compilation cache, loading, generating.

This module imports jax; verbs import it when they run, so that their help does not wait for it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import platformdirs
from jax.sharding import Mesh

from jaxdecode.bench import choose_attention
from jaxdecode.checkpoint import loading
from jaxdecode.checkpoint.default_model import fetch_default_model
from jaxdecode.checkpoint.source import WeightSource
from jaxdecode.cli import cuda_plugin, options
from jaxdecode.cli.output import Report, progress_bars, say_warning
from jaxdecode.device_model import of_device
from jaxdecode.errors import DeviceError, RequestError, TokenizerError
from jaxdecode.generation import PREFILL_STEP_SIZE, stream_generate
from jaxdecode.memory import Workload
from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.inner_attention import attends_in_layers
from jaxdecode.models.kv_cache import KVCache
from jaxdecode.models.llama import Llama
from jaxdecode.models.sharding import Sharding, auto_sizes, describe
from jaxdecode.pallas_kernels import AttentionChoice
from jaxdecode.plan import Plan, check_fits, explain_exhaustion, plan, plan_model
from jaxdecode.processes import random_seed
from jaxdecode.prompts import encode_prompts
from jaxdecode.results import Result
from jaxdecode.sampling import SamplingParams
from jaxdecode.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model, ready to generate.

    Attributes:
      device_name: as --json and, before how many there are, the first line on stderr name it.
      attention: the implementation that runs.
      implementation: the one asked for, None if it was left to choose.
    """

    model: Llama
    tokenizer: Tokenizer
    device_name: str
    attention: str
    implementation: str | None


def load_model(
    report: Report, name: str, *, dtype: str | None, attn: str, device: str, mesh: str | None,
    compilation_cache: bool, chat_template: Path | None, context: int | None,
) -> Loaded:  # fmt: skip
    """Chooses the devices, says which and why, and loads model and tokenizer onto them.

    Raises:
      DecodeError: one of them cannot be had, or does not fit with a cache of `context` tokens.
    """
    if report.together and mesh is None:
        mesh = "auto"
    sizes = None if mesh is None else options.parse_mesh(mesh)
    report.device = announced_device(device)
    if compilation_cache:
        enable_compilation_cache()
    source = open_model(report, name)
    try:
        dtype = dtype or loading.default_dtype(source)
        sharding = make_sharding(source.config, sizes, jax.devices(report.device.platform))
        # Two tokens: what serves only one at a time cannot read a prompt.
        choice = choose_attention(source.config, dtype, attn, sharding, query_tokens=2)
        kind = report.device.device_kind
        count = "" if sizes is None else f"{sharding.num_devices} x "
        report.say(f"device: {count}{kind}; attention: {brief(choice)}; weights: {dtype}")
        if sizes is not None:
            report.say(describe(source.config, sharding))
        work = Workload(config=source.config, context=max(1, context or 1), dtype=dtype)
        here = of_device(report.device)
        check_memory(report, None if here is None else plan(work, here, sharding))
        tokenizer = _tokenizer(source, chat_template)
        with (
            explain_exhaustion(lambda: report.plan),
            progress_bars(report, "bytes") as on_progress,
        ):
            model = loading.load_model(source, dtype, sharding, on_progress=on_progress)
    finally:
        source.close()
    asked = None if attn == "auto" else attn
    return Loaded(model, tokenizer, kind, choice.implementation, asked)


def brief(choice: AttentionChoice) -> str:
    """The implementation and the reason. How work is divided depends on lengths yet to come."""
    return f"{choice.implementation}: {choice.reason}"


def brief_of_steps(
    choice: AttentionChoice, config: LlamaConfig, dtype: str, sharding: Sharding
) -> str:
    """The same of decode steps, with where those of one token attend, if not in a kernel apart."""
    if choice.implementation != "flash_decode" or not attends_in_layers(config, dtype, sharding):
        return brief(choice)
    return f"{brief(choice)}; a step of one token attends inside the layers' kernel"


def make_sharding(
    config: LlamaConfig, sizes: dict[str, int] | Literal["auto"] | None, devices: list[jax.Device]
) -> Sharding:
    """The sharding over the first of `devices`, of the sizes that --mesh names; None: one device.

    Raises:
      DeviceError: there are fewer devices.
      RequestError: an axis does not divide the model, or no mesh over all devices does.
    """
    if sizes is None:
        return Sharding()
    if sizes == "auto":
        try:
            sizes = auto_sizes(config, len(devices))
        except ValueError as error:
            raise RequestError(f"--mesh auto: {error}") from error
    count = math.prod(sizes.values())
    if count > len(devices):
        asked = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise DeviceError(
            f"--mesh {asked} needs {count} devices, but there are {len(devices)} "
            f"({devices[0].device_kind}); make it smaller, or let --mesh auto choose"
        )
    taking_part = {device.process_index for device in devices[:count]}
    if idle := {device.process_index for device in devices} - taking_part:
        raise RequestError(
            f"--mesh takes {count} of {len(devices)} devices, none of process {min(idle)}; "
            "start fewer processes, or let --mesh auto take all devices"
        )
    grid = np.array(devices[:count]).reshape(tuple(sizes.values()))
    return loading.checked_sharding(config, Mesh(grid, tuple(sizes)))


def check_memory(report: Report, made: Plan | None) -> None:
    """Keeps the plan of a run for the report, before any of its memory is taken.

    Raises:
      MemoryPlanError: the device certainly has too little.
    """
    report.plan = made
    if made is not None:
        check_fits(made)


def open_model(report: Report, name: str) -> WeightSource:
    """Opens a model by path or name; says so when the default model has to be fetched first."""
    if name != loading.DEFAULT_MODEL:
        return loading.open_source(name)
    with progress_bars(report, "bytes") as on_progress:
        return loading.open_source(fetch_default_model(report.say, on_progress))


def _tokenizer(source: WeightSource, chat_template: Path | None) -> Tokenizer:
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise TokenizerError(f"{source.path} has no tokenizer.json, without which there is no text")
    if chat_template is not None:
        template = options.decode_utf8(str(chat_template), chat_template.read_bytes())
        tokenizer.chat_template = template
    return tokenizer


def with_seed(report: Report, loaded: Loaded, params: SamplingParams) -> SamplingParams:
    """The same with a seed; a random one is said, so that the run can be repeated."""
    if params.seed is not None:
        return params
    params = dataclasses.replace(params, seed=random_seed(loaded.model.sharding))
    if params.temperature > 0:
        report.say(f"seed: {params.seed}")
    return params


def encode(loaded: Loaded, prompt: str | list[dict[str, str]]) -> list[int]:
    """Token ids of a text or of a conversation."""
    return encode_prompts(loaded.tokenizer, prompt, loaded.model.config.vocab_size)[0]


def make_cache(
    report: Report, loaded: Loaded, context: int | None, num_prompt: int, params: SamplingParams,
    prefill_step_size: int,
) -> KVCache | None:  # fmt: skip
    """The cache for --context; None (just enough room) without it.

    Raises:
      RequestError: prompt and answer do not fit into it, or into what the model was trained for.
      MemoryPlanError: they do not fit into the device's memory.
    """
    trained, max_tokens = loaded.model.config.max_positions, params.max_tokens
    limit = trained if context is None else context
    if num_prompt + max_tokens > limit:
        what = "positions the model was trained for" if context is None else "tokens of --context"
        raise RequestError(
            f"the prompt has {num_prompt} tokens, and with --max-tokens {max_tokens} that is more "
            f"than the {limit} {what}; shorten the prompt, lower --max-tokens or raise --context"
        )
    capacity = num_prompt + max_tokens if context is None else context
    made = plan_model(loaded.model, context=capacity, prefill_step_size=prefill_step_size)
    check_memory(report, made)
    if context is None:
        return None
    if context > trained:
        say_warning(
            f"--context {context} goes beyond the {trained} positions the model was trained for"
        )
    return empty_cache(report, loaded, context)


def empty_cache(report: Report, loaded: Loaded, capacity: int) -> KVCache:
    """For one conversation, and rows that stay idle where the mesh cuts the batch."""
    with explain_exhaustion(lambda: report.plan):
        return loaded.model.init_cache(loaded.model.sharding.data, capacity)


def generate_text(
    report: Report, loaded: Loaded, tokens: list[int], params: SamplingParams,
    cache: KVCache | None, *, on_text: Callable[[str], None] | None,
    prefill_step_size: int = PREFILL_STEP_SIZE,
) -> Result:  # fmt: skip
    """Generates to the end; `on_text` gets text as it comes, and the report keeps up with it."""
    report.start(len(tokens))
    with explain_exhaustion(lambda: report.plan):
        with progress_bars(report, "tokens") as on_progress:
            chunks = stream_generate(
                loaded.model, loaded.tokenizer, tokens, params, cache=cache,
                implementation=loaded.implementation, prefill_step_size=prefill_step_size,
                on_prefill=lambda done, total: on_progress("prompt", done, total),
            )  # fmt: skip
            chunk = next(chunks)
        while True:
            report.count_token()
            if on_text is not None:
                on_text(chunk.text)
            if chunk.result is not None:
                report.stats = chunk.result.stats
                return chunk.result
            chunk = next(chunks)


def cache_directory() -> Path:
    """The user's own cache directory of jaxdecode."""
    return platformdirs.user_cache_path("jaxdecode")


def compilation_cache_directory() -> Path:
    """Where compiled programs are kept between runs."""
    return cache_directory() / "compiled"


def announced_device(name: str) -> jax.Device:
    """`select_device`, with a warning where JAX took the CPU and a plugin would give it a GPU."""
    device = select_device(name)
    chosen_by_jax = not jax.config.values["jax_platforms"]
    if chosen_by_jax and device.platform == "cpu" and (missing := cuda_plugin.missing_plugin()):
        say_warning(missing)
    return device


def select_device(name: str) -> jax.Device:
    """Lets JAX choose among the devices that `name` ("auto", "gpu" or "cpu") allows.

    Call it before anything else uses a device: JAX settles its platforms at the first use.

    Raises:
      DeviceError: there is no such device, or JAX_PLATFORMS names one that cannot start.
    """
    if name == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif name == "gpu":
        jax.config.update("jax_platforms", None)
    try:
        return jax.local_devices(backend="gpu" if name == "gpu" else None)[0]
    except (RuntimeError, AssertionError) as error:
        platforms = jax.config.values["jax_platforms"]
        asked = "--device gpu" if name == "gpu" else f"JAX_PLATFORMS={platforms}"
        # With JAX_PLATFORMS=cuda and no plugin, JAX raises an AssertionError without a word.
        unknown = not str(error) or str(error).startswith("Unknown backend")
        reason = "JAX finds none, or its plugin is missing" if unknown else str(error)
        raise DeviceError(
            f"{asked}: {reason}; install the plugin ({cuda_plugin.INSTALL}), or run with "
            "--device cpu"
        ) from error


def enable_compilation_cache() -> None:
    """Keeps compiled programs for the next run, if the user's directory for them is private.

    Whoever can write there can run code as this user, so a directory that belongs to somebody
    else or that others may write to is not used; a warning says so.
    """
    path = compilation_cache_directory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        say_warning(f"compiled programs are not kept: cannot make {path}: {error.strerror}")
        return
    fault = privacy_fault(path.parent) or privacy_fault(path)
    if fault:
        say_warning(f"compiled programs are not kept: {fault}; make it private with chmod 700")
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def privacy_fault(path: Path) -> str | None:
    """Why others could change what lies in this directory, or None when only its user can."""
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        return f"{path} is not a directory"
    if status.st_uid != os.geteuid():
        return f"{path} belongs to user {status.st_uid}, not to you ({os.geteuid()})"
    if status.st_mode & 0o022:
        return f"{path} is writable by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return None
