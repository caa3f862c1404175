"""Several processes: the same tokens as one, and one clear error instead of a hang."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny_hf
from cli_runs import fails, start

import jaxdecode as jd
from jaxdecode.checkpoint.hf_directory import HfDirectory
from jaxdecode.errors import DeviceError, RequestError
from jaxdecode.processes import Member, find_member, join

# For slow machines; nothing here waits that long unless it has failed.
PATIENCE = 240
# As conftest.py makes this process, with half of its devices.
STRICT = """
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 4)
"""
# What a process of several prints in the test of the library; `run` below is what one does alone.
WORKER = (
    STRICT
    + """
import json, sys
from jaxdecode.processes import find_member, join
from test_processes import run
coordinator, process_id, directory = sys.argv[1:]
join(find_member({}, coordinator, 2, int(process_id)), timeout=200)
print("FOUND", json.dumps(run(directory)))
"""
)
CONFIG = dataclasses.replace(tiny_hf.TINY, num_layers=1, ffw_dim=32, eos_ids=())
PROMPTS = [[5, 3, 4], [7, 8], [9]]
SAMPLED = {"temperature": 1.0, "top_k": 30, "top_p": 0.9}


def run(directory):
    """What every process finds, over a mesh of which each of two holds a part of every axis."""
    devices = np.array(jax.devices()).reshape(2, 2, 2)
    mesh = jax.sharding.Mesh(devices, ("seq", "data", "tensor"))
    own, other = jax.process_index(), {}
    with contextlib.suppress(RequestError):
        jd.load(directory, mesh=mesh, dtype=["float32", "bfloat16"][own])
        other["dtype"] = "accepted"
    with counting_reads() as num_bytes:
        model, _ = jd.load(directory, mesh=mesh)
    found = {"bytes": sum(num_bytes), "devices": len(jax.local_devices())}

    def generate(prompts=PROMPTS, **params):
        return jd.generate(model, None, prompts, jd.SamplingParams(max_tokens=10, **params))

    # The last is refused by one of two processes.
    for what, prompts in {"prompts": PROMPTS[: 2 + own], "token": [[5, 10**6 * own]]}.items():
        with contextlib.suppress(RequestError):
            generate(prompts)
            other[what] = "accepted"
    for name, params in {"greedy": {}, "sampled": {**SAMPLED, "seed": 3}, "any": SAMPLED}.items():
        results = generate(**params)
        found[name] = [result.tokens for result in results]
        found[f"seed of {name}"] = results[0].seed
    return {**found, "other": other}


@contextlib.contextmanager
def counting_reads():
    """The number of bytes of each read from a Hugging Face directory."""
    read, counts = HfDirectory.read, []

    def counted(self, name, index):
        array = read(self, name, index)
        counts.append(array.nbytes)
        return array

    HfDirectory.read = counted
    yield counts
    HfDirectory.read = read


@pytest.fixture
def children():
    """children(popen) remembers a process; whatever is left of them ends with the test."""
    started = []
    yield lambda process: started.append(process) or process
    for left in started:
        left.kill()
        left.communicate()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    return tiny_hf.write_model(directory, CONFIG, eos_token_id=None)


def test_two_processes_find_what_one_does(tiny, children):
    coordinator = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = []
    for i in range(2):
        command = [sys.executable, "-c", WORKER, coordinator, str(i), str(tiny)]
        both.append(children(subprocess.Popen(command, env=environment, **pipes)))
    alone = run(tiny)
    found = []
    for process in both:
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
        found.append(json.loads(out.partition("FOUND ")[2]))
    for name in ("greedy", "sampled", "seed of sampled"):
        assert found[0][name] == found[1][name] == alone[name], name
    assert found[0]["sampled"] != found[0]["greedy"]
    # Nobody gave a seed, so process 0's holds for both.
    for name in ("any", "seed of any"):
        assert found[0][name] == found[1][name], name
    assert [result["devices"] for result in found] == [4, 4]
    # Each reads its half, and the norms, which are whole on each device.
    assert max(result["bytes"] for result in found) < 0.7 * alone["bytes"]
    assert sum(result["bytes"] for result in found) >= alone["bytes"]
    accepted = dict.fromkeys(("dtype", "prompts", "token"), "accepted")
    assert [result["other"] for result in (*found, alone)] == [{}, {}, accepted]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where compiled programs are kept, so that all tests of this file compile them once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def generating(cache, children):
    """generating(*arguments, prelude=..., model=...) starts `jaxdecode generate`."""

    def call(*arguments, prelude=STRICT, model="never opened"):
        options = ("generate", "-m", model, "-p", "hello", "--no-chat", *arguments)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return children(start([*map(str, options)], cache, prelude=prelude, **pipes))

    return call


def member(port, process_id):
    return (
        "--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id", process_id
    )  # fmt: skip


def ends(process):
    """Exit code, stdout and the lines of stderr."""
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out.decode(), err.decode().splitlines()


def slurm(port, process_id):
    """Python that sets what `srun --ntasks=2` does, on one host."""
    variables = {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": str(process_id),
        "SLURM_LOCALID": str(process_id), "JAX_COORDINATOR_PORT": str(port),
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
    }  # fmt: skip
    return f"{STRICT}\nimport os\nos.environ |= {variables}\n"


def test_slurm_starts_one_command_on_all(generating, model):
    port = free_port()
    sampled = ("-n", 8, "--ignore-eos", "--temperature", 1, "--json")
    both = [generating(*sampled, prelude=slurm(port, i), model=model) for i in range(2)]
    (code, out, said), silent = map(ends, both)
    assert code == 0, said
    assert silent == (0, "", [])
    answer = json.loads(out)
    assert (answer["num_devices"], answer["mesh"]) == (8, "tensor=2,seq=4")
    assert f"seed: {answer['seed']}" in said
    assert len(answer["tokens"]) == 8


def test_killed_while_generating(generating, model):
    port = free_port()
    # JAX's CPU collectives mostly notice by themselves, and else the missing heartbeat does.
    long = ("-n", 2000, "--heartbeat-timeout", 10)
    both = [generating(*member(port, i), *long, model=model) for i in range(2)]
    assert both[0].stdout.read(1)  # the first token has come
    both[1].kill()
    code, _, said = ends(both[0])
    assert code not in (0, None)
    lost = "error: process 0: lost (process 1|another process), which died or cannot be reached; "
    assert re.match(lost, said[-1]), said
    assert len([line for line in said if "rror" in line]) == 1, said


# Nothing is computed, so that only JAX's own watch can notice.
WAITING = (
    STRICT
    + """
import sys, time
from jaxdecode.cli import runtime
def load_model(*arguments, **options):
    jax.devices()
    sys.stderr.write("READY\\n")
    time.sleep(1000)
runtime.load_model = load_model
"""
)


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_while_nothing_is_exchanged(generating, killed):
    port = free_port()
    both = [
        generating(*member(port, i), "--heartbeat-timeout", 6, prelude=WAITING) for i in range(2)
    ]
    for process in both:
        assert process.stderr.readline() == b"READY\n"
    since = time.monotonic()
    both[killed].kill()
    code, out, said = ends(both[1 - killed])
    assert code not in (0, None)
    assert out == ""
    assert said == [
        f"error: process {1 - killed}: lost process {killed}, which died or cannot be reached; "
        "its own messages say why"
    ]
    assert time.monotonic() - since < 60


def test_one_that_never_comes(generating):
    # Each of these waits for the other at a port of its own.
    ports = [free_port(), free_port()]
    both = [generating(*member(ports[i], i), "--join-timeout", 2) for i in range(2)]
    for i, process in enumerate(both):
        code, out, said = ends(process)
        assert (code, out) == (2, "")
        assert len(said) == 1
        assert said[0].startswith(
            f"error: process {i}: 2 processes did not meet at 127.0.0.1:{ports[i]} within 2 s; "
        )


ARGUMENTS = {
    "no port": {"coordinator": "host", "num_processes": 2, "process_id": 0},
    "port 0": {"coordinator": "host:0", "num_processes": 2, "process_id": 0},
    "port too large": {"coordinator": "host:65536", "num_processes": 2, "process_id": 0},
    "coordinator alone": {"coordinator": "host:1"},
    "no coordinator": {"num_processes": 2, "process_id": 0},
    "no process_id": {"coordinator": "host:1", "num_processes": 2},
    "no num_processes": {"coordinator": "host:1", "process_id": 0},
    "one too many": {"coordinator": "host:1", "num_processes": 2, "process_id": 2},
    "negative": {"coordinator": "host:1", "num_processes": 2, "process_id": -1},
    "none at all": {"coordinator": "host:1", "num_processes": 0, "process_id": 0},
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_do_not_fit(case):
    with pytest.raises(RequestError, match=r"coordinator|process_id"):
        find_member({}, **ARGUMENTS[case])


SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "4", "SLURM_PROCID": "3"}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"
}  # fmt: skip
MEMBERS = {
    "nothing": ({}, None),
    "given": ({"given": True}, Member(8, 5, "host:1", True)),
    "given under Slurm": ({**SLURM, "given": True}, Member(8, 5, "host:1", True)),
    "own devices": ({"JAX_LOCAL_DEVICE_IDS": "0", **SLURM}, Member(4, 3, None, False)),
    "Slurm": (SLURM, Member(4, 3, None, True)),
    "Slurm, several on a host": ({**SLURM, "SLURM_STEP_NUM_NODES": "2"}, Member(4, 3, None, False)),
    "Slurm, one task": ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),
    "Slurm, a shell in a job": ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),
    "Open MPI": (MPI, Member(2, 1, None, False)),
    "Open MPI in a Slurm job": ({**SLURM, **MPI}, Member(2, 1, None, False)),
    "Open MPI, one task": ({**MPI, "OMPI_COMM_WORLD_SIZE": "1"}, None),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_which_process_this_is(case):
    environ, expected = MEMBERS[case]
    given = ("host:1", 8, 5) if "given" in environ else ()
    assert find_member(environ, *given) == expected


def test_launcher_without_an_address():
    assert find_member(MPI, "host:1") == Member(2, 1, "host:1", False)


@pytest.mark.parametrize("timeouts", [(0, 100), (300, 0), (3601, 100), (300, -1)])
def test_timeouts_out_of_range(timeouts):
    with pytest.raises(RequestError, match="must be from 1 to 3600 s, found"):
        join(Member(2, 0, "127.0.0.1:1", True), timeout=timeouts[0], heartbeat_timeout=timeouts[1])


def test_joining_too_late():
    jax.devices()
    message = "cannot join the other processes: jax.distributed.initialize.. must be called before"
    with pytest.raises(DeviceError, match=message):
        join(Member(2, 1, "127.0.0.1:1", True))


@pytest.mark.parametrize("verb", ["chat", "bench"])
def test_verbs_of_one_process(verb, cli, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    error = fails(cli(verb))
    assert error.startswith(f"error: {verb} runs in one process, but the launcher started 4; ")


def test_mesh_without_a_device_of_this_process(tiny, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    mesh = jax.make_mesh((2,), ("tensor",))
    with pytest.raises(RequestError, match="the mesh has no device of process 1"):
        jd.load(tiny, mesh=mesh)
