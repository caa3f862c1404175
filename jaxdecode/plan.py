"""Whether a model with its context fits a mesh of devices, and how fast it can be there.

Arithmetic only: nothing is allocated and no device is needed. `check_fits` refuses what would run
out of memory; `explain_exhaustion` is for what runs out all the same.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import traceback
from collections.abc import Callable, Iterator

from jaxdecode.device_model import DeviceModel, of_device
from jaxdecode.errors import MemoryPlanError, OutOfMemoryError
from jaxdecode.memory import MAX_CONTEXT, Memory, Workload, needed, num_weights
from jaxdecode.models.kv_cache import round_up_capacity
from jaxdecode.models.llama import Llama
from jaxdecode.models.sharding import Sharding, auto_sizes, fit
from jaxdecode.roofline import Speed, speed
from jaxdecode.units import readable_bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a workload takes of each device, and what it can expect.

    Attributes:
      work, sharding, device: what was planned.
      memory: bytes on each device.
      speed: None where the device's speeds are not known.
    """

    work: Workload
    sharding: Sharding
    device: DeviceModel
    memory: Memory
    speed: Speed | None

    @property
    def fits(self) -> bool:
        return _fits(self.memory, self.device)

    @property
    def free(self) -> int:
        """Bytes left on each device; negative if it does not fit."""
        return self.device.memory - self.memory.total

    @functools.cached_property
    def largest_context(self) -> int:
        """Tokens per sequence that fit on this mesh; 0 if not even the weights do."""
        return _largest_context(self.work, self.sharding, self.device)

    @functools.cached_property
    def smallest(self) -> Sharding | None:
        """The mesh of fewest such devices that holds the workload, None if there is none."""
        return smallest_mesh(self.work, self.device)

    def __str__(self) -> str:
        """One line: what each device needs and has."""
        memory = self.memory
        return (
            f"weights {readable_bytes(memory.weights)}, KV cache {readable_bytes(memory.cache)}, "
            f"workspace up to {readable_bytes(memory.workspace)} on each device, "
            f"{self.device.name} with {readable_bytes(self.device.memory)}"
        )

    def advice(self) -> str:
        """One line: what would fit."""
        if self.largest_context:
            text = f"the largest context that fits is {self.largest_context} tokens"
        else:
            text = "no context fits"
        if self.smallest and self.smallest.num_devices != self.sharding.num_devices:
            text += f"; it would fit on {_mesh_text(self.smallest)}"
        return text


def plan(
    work: Workload,
    device: DeviceModel,
    sharding: Sharding | None = None,
    devices_per_host: int = 8,
) -> Plan:
    """Plans a workload on a mesh.

    Args:
      device: one of `device_model.DEVICES`, or `device_model.of_device(jax.devices()[0])`.
      sharding: from `models.sharding.fit` or `fit_mesh`; one device when None.
      devices_per_host: how many share a host's fast links.
    """
    sharding = sharding or Sharding()
    return Plan(
        work=work,
        sharding=sharding,
        device=device,
        memory=needed(work, sharding, device.platform),
        speed=speed(work, sharding, device.speeds, devices_per_host) if device.speeds else None,
    )


def plan_model(
    model: Llama, *, context: int, batch: int = 1, cache_dtype: str | None = None,
    prefill_step_size: int = 512,
) -> Plan | None:  # fmt: skip
    """Plans the cache and the steps of a model that is loaded, where it lies.

    Arguments are those of `memory.Workload`. None if its device keeps no account of its memory.
    """
    work = Workload(
        config=model.config, context=context, batch=batch, dtype=model.dtype.name,
        cache_dtype=cache_dtype, prefill_step_size=prefill_step_size,
    )  # fmt: skip
    weights = num_weights(model.config, model.sharding) * work.itemsize
    device = of_device(model.embed[...].addressable_shards[0].device, held=weights)
    return None if device is None else plan(work, device, model.sharding)


def smallest_mesh(work: Workload, device: DeviceModel) -> Sharding | None:
    """The mesh of fewest devices on which the workload fits, as `--mesh auto` makes it."""
    config = work.config
    # Devices of a CPU share one memory. Elsewhere no mesh cuts more finely than heads and columns.
    most = 1 if device.platform == "cpu" else config.num_kv_heads * config.head_dim
    for count in range(1, most + 1):
        if config.ffw_dim % count:  # for speed: auto_sizes would say so too
            continue
        try:
            sharding = fit(config, auto_sizes(config, count))
        except ValueError:
            continue
        if _fits(needed(work, sharding, device.platform), device):
            return sharding
    return None


def check_fits(made: Plan) -> None:
    """Call before anything is allocated.

    Raises:
      MemoryPlanError: it cannot fit; the message has the plan and the largest context that fits.
    """
    if made.fits:
        return
    what = f"the model with a context of {made.work.context} tokens"
    if made.work.batch > 1:
        what += f" for each of {made.work.batch} sequences"
    raise MemoryPlanError(
        f"{what} does not fit into memory: {made}; {made.advice()}; "
        "lower the context, or use a smaller dtype or model"
    )


@contextlib.contextmanager
def explain_exhaustion(make_plan: Callable[[], Plan | None]) -> Iterator[None]:
    """Turns a device's cry for memory into an error that shows the plan.

    The arrays of the functions that failed are let go, so that the process can be used further.

    Raises:
      OutOfMemoryError: in the place of JAX's RESOURCE_EXHAUSTED, or of MemoryError.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_exhaustion(error):
            raise
        # The frames of a traceback keep their variables, and these the device's memory.
        traceback.clear_frames(error.__traceback__)
        made = make_plan()
        planned = "" if made is None else f"; planned: {made}; {made.advice()}"
        cause = str(error).partition("\n")[0]
        raise OutOfMemoryError(
            f"out of memory ({cause}){planned}; lower the context, or use a smaller dtype or model"
        ) from error


def _fits(memory: Memory, device: DeviceModel) -> bool:
    """On CPU what certainly cannot fit is refused only: the workspace is a bound."""
    certain = memory.weights + memory.cache
    return (certain if device.platform == "cpu" else memory.total) <= device.memory


def _largest_context(work: Workload, sharding: Sharding, device: DeviceModel) -> int:
    step = round_up_capacity(1, sharding.parts("S"))

    def too_long(steps: int) -> bool:
        longer = dataclasses.replace(work, context=steps * step)
        return not _fits(needed(longer, sharding, device.platform), device)

    # Memory only grows with the context, so halving finds how many steps fit.
    return step * bisect.bisect_left(range(1, MAX_CONTEXT // step + 1), True, key=too_long)


def _is_exhaustion(error: Exception) -> bool:
    """Whether a device or the host had no memory left."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _mesh_text(sharding: Sharding) -> str:
    """For people: "8 devices (tensor=8, seq=1)"."""
    if sharding.num_devices == 1:
        return "1 device"
    data = f"data={sharding.data}, " if sharding.data > 1 else ""
    return f"{sharding.num_devices} devices ({data}tensor={sharding.tensor}, seq={sharding.seq})"
