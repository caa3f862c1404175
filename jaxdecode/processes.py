"""Several processes, on one host or many, that run one model through JAX's distributed runtime.

Each process runs the same program with the same prompts; the model lies on a mesh over the devices
of all. Every process then computes the same tokens, and only its output tells process 0 apart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import ipaddress
import re
import secrets
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxdecode.errors import DeviceError, RequestError
from jaxdecode.models.sharding import Sharding

# JAX's own.
JOIN_TIMEOUT = 300
HEARTBEAT_TIMEOUT = 100
_LONGEST_TIMEOUT = 3600


@dataclasses.dataclass(frozen=True)
class Member:
    """One process's place among those that run together.

    Attributes:
      num_processes: how many there are.
      process_id: which one this is, from 0.
      coordinator: HOST:PORT at which process 0 listens; None: JAX works it out under the launcher.
      whole_host: this process takes all devices of its host, also where its launcher would give
        each of its processes one.
    """

    num_processes: int
    process_id: int
    coordinator: str | None
    whole_host: bool


def find_member(
    environ: Mapping[str, str],
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Member | None:
    """This process's place: as given, or as Slurm or Open MPI started it; None if it runs alone.

    Args:
      environ: the environment variables, in which a launcher says what it started.
      coordinator, num_processes, process_id: all three, or none. Under a launcher also the
        coordinator alone, where JAX cannot work it out.

    Raises:
      RequestError: the arguments are incomplete or contradict each other.
    """
    if coordinator is not None:
        found = re.fullmatch(r"\S+:([0-9]{1,5})", coordinator)
        if found is None or not 1 <= int(found[1]) <= 65535:
            raise RequestError(
                f"coordinator must be HOST:PORT of process 0, found {coordinator!r:.100}"
            )
    # Whoever names devices in JAX's own variable gets those.
    whole_host = "JAX_LOCAL_DEVICE_IDS" not in environ
    if num_processes is None and process_id is None:
        launched = _launched(environ, whole_host)
        if launched is None and coordinator is not None:
            raise RequestError(
                "coordinator needs num_processes and process_id too, as no launcher (Slurm, Open "
                "MPI) started several processes"
            )
        return launched and dataclasses.replace(launched, coordinator=coordinator)
    if num_processes is None or process_id is None or coordinator is None:
        raise RequestError(
            "coordinator, num_processes and process_id go together; found "
            f"coordinator={coordinator}, num_processes={num_processes}, process_id={process_id}"
        )
    if not 0 <= process_id < num_processes:
        raise RequestError(
            f"process_id={process_id} must be from 0 to num_processes - 1 = {num_processes - 1}"
        )
    return Member(num_processes, process_id, coordinator, whole_host)


def _launched(environ: Mapping[str, str], whole_host: bool) -> Member | None:
    """What Open MPI or Slurm says, if it started more than one process."""

    def number(name: str) -> int:
        value = environ.get(name, "")
        return int(value) if value.isdecimal() else 0

    # mpirun starts its own helpers through Slurm, so Open MPI's word comes first. Of a Slurm job,
    # only the step counts: a shell in an allocation for many tasks is still one process.
    for count, rank, alone in (
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", number("OMPI_COMM_WORLD_LOCAL_SIZE") == 1),
        (
            "SLURM_STEP_NUM_TASKS", "SLURM_PROCID",
            number("SLURM_STEP_NUM_TASKS") == number("SLURM_STEP_NUM_NODES"),
        ),
    ):  # fmt: skip
        if number(count) > 1:
            return Member(number(count), number(rank), None, alone and whole_host)
    return None


def join(
    member: Member, *, timeout: int = JOIN_TIMEOUT, heartbeat_timeout: int = HEARTBEAT_TIMEOUT
) -> None:
    """Joins the other processes, before anything uses a device. Returns once all are there.

    From then on JAX watches over them. When one dies, or none has heard of it for
    `heartbeat_timeout`, JAX ends the others with a fatal message on stderr that Python cannot
    catch; when process 0 dies they end at once.

    Args:
      member: this process's place.
      timeout: seconds to wait for the others.
      heartbeat_timeout: seconds of silence after which a process counts as dead.

    Raises:
      RequestError: a timeout is out of range.
      DeviceError: the others did not come in time, or the runtime cannot start. This process should
        end then: it cannot try again.
    """
    for name, seconds in (("join", timeout), ("heartbeat", heartbeat_timeout)):
        if not 1 <= seconds <= _LONGEST_TIMEOUT:
            raise RequestError(
                f"the {name} timeout must be from 1 to {_LONGEST_TIMEOUT} s, found {seconds}"
            )
    # It would make this process ignore SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    failures: list[Exception] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                member.coordinator,
                member.num_processes,
                member.process_id,
                local_device_ids=[] if member.whole_host else None,
                # At its own timeout JAX would abort the process instead of raising.
                initialization_timeout=timeout + _LONGEST_TIMEOUT,
                heartbeat_timeout_seconds=heartbeat_timeout,
                coordinator_bind_address=_bind_address(member.coordinator),
            )
        except Exception as error:  # noqa: BLE001  # what a launcher's variables cause is unknown
            failures.append(error)

    joining = threading.Thread(target=initialize, daemon=True)
    joining.start()
    joining.join(timeout)
    if failures:
        hint = "" if member.coordinator else "; give coordinator, num_processes and process_id"
        raise DeviceError(f"cannot join the other processes: {failures[0]}{hint}") from failures[0]
    if joining.is_alive():
        at = f" at {member.coordinator}" if member.coordinator else ""
        raise DeviceError(
            f"{member.num_processes} processes did not meet{at} within {timeout} s; check that all "
            "were started, each with a process_id of its own and the same num_processes, and that "
            "the coordinator's port can be reached"
        )


def _bind_address(coordinator: str | None) -> str | None:
    """A coordinator for this host alone listens here alone; None: on all interfaces."""
    host = "" if coordinator is None else coordinator.rpartition(":")[0].strip("[]")
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        local = False
    return coordinator if local else None


def check_same(sharding: Sharding, request: Any, what: str) -> None:
    """Checks that each process of a mesh was given the same request.

    Args:
      sharding: of the model; nothing happens unless its mesh spans several processes.
      request: anything whose repr says all that matters.
      what: it is, for the message.

    Raises:
      RequestError: in every process, if they differ.
    """
    digest = hashlib.sha256(repr(request).encode()).digest()
    said = _gathered(sharding, np.frombuffer(digest, np.uint32))
    first = min(said)
    others = [str(process) for process in sorted(said) if (said[process] != said[first]).any()]
    if others:
        raise RequestError(
            f"not all processes were given the same {what} as process {first} "
            f"(others: {', '.join(others)}); start every process with the same arguments"
        )


def random_seed(sharding: Sharding) -> int:
    """A random seed of 32 bits, the same in each process of a mesh."""
    said = _gathered(sharding, np.array([secrets.randbits(32)], np.uint32))
    return int(said[min(said)][0])


def gather_texts(sharding: Sharding, text: str) -> dict[int, str]:
    """What each process of a mesh says, by process; each waits until all have spoken."""
    data = text.encode(errors="surrogateescape")
    sizes = {
        process: int(size[0])
        for process, size in _gathered(sharding, np.array([len(data)], np.uint32)).items()
    }
    longest = max(sizes.values())
    # Rounded up, because each length is compiled anew.
    padded = data.ljust(-(-longest // 4096) * 4096, b"\0")
    rows = _gathered(sharding, np.frombuffer(padded, np.uint32)) if longest else {}
    return {
        process: rows[process].tobytes()[:size].decode(errors="surrogateescape") if size else ""
        for process, size in sizes.items()
    }


def ranks(sharding: Sharding) -> tuple[int, int]:
    """The first process of a mesh, and this one; the same without a mesh."""
    own = jax.process_index()
    mesh = sharding.mesh
    processes = [own] if mesh is None else [device.process_index for device in mesh.devices.flat]
    return min(processes), own


def _gathered(sharding: Sharding, words: np.ndarray) -> dict[int, np.ndarray]:
    """What each process of the mesh passes, by process; words is [n] uint32 in each."""
    mesh = sharding.mesh
    if mesh is None or not mesh.is_multi_process:
        return {jax.process_index(): words}
    # One row for each device, which its process fills in.
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    shape = (mesh.size, words.size)
    rows = jax.make_array_from_callback(shape, place, lambda index: words[None])
    processes = [device.process_index for device in mesh.devices.flat]
    return dict(zip(processes, sharding.fetch(rows), strict=True))
