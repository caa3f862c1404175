"""Plans: what fits and what does not, at the very edge, and what is said when memory runs out."""

from __future__ import annotations

import dataclasses
import weakref

import jax
import jax.numpy as jnp
import pytest
from generation_runs import run_one
from naive_llama import CONFIG, random_model

from jaxdecode import generation
from jaxdecode import plan as planning
from jaxdecode.device_model import DEVICES, DeviceModel
from jaxdecode.errors import DecodeError, MemoryPlanError, OutOfMemoryError
from jaxdecode.memory import Workload, needed
from jaxdecode.models.config import PRESETS
from jaxdecode.models.sharding import Sharding, auto_sizes, fit
from jaxdecode.plan import check_fits, explain_exhaustion, plan, plan_model, smallest_mesh

LLAMA = PRESETS["llama-2-70b"]


def workload(config=LLAMA, **sizes) -> Workload:
    return Workload(config=config, **{"context": 100_000, "dtype": "bfloat16"} | sizes)


def gpu(memory: float) -> DeviceModel:
    return dataclasses.replace(DEVICES["h200"], memory=int(memory))


# What fits


@pytest.mark.parametrize("sizes", [{}, {"tensor": 8}, {"tensor": 4, "seq": 4}], ids=str)
@pytest.mark.parametrize("batch", [1, 5])
def test_the_largest_context_just_fits(sizes, batch):
    sharding = fit(LLAMA, sizes)
    made = plan(workload(batch=batch), gpu(150e9), sharding)
    step = 128 * sharding.seq
    assert made.largest_context > 0
    assert made.largest_context % step == 0
    for context, fits in ((made.largest_context, True), (made.largest_context + 1, False)):
        again = plan(workload(batch=batch, context=context), gpu(150e9), sharding)
        assert again.fits is fits
        assert (again.free >= 0) is fits


def test_a_byte_decides():
    total = needed(workload(), Sharding(), "gpu").total
    assert plan(workload(), gpu(total)).fits
    check_fits(plan(workload(), gpu(total)))
    assert not plan(workload(), gpu(total - 1)).fits


def test_on_a_cpu_only_what_is_certain_is_refused():
    memory = needed(workload(), Sharding(), "cpu")
    certain = memory.weights + memory.cache
    device = DeviceModel(name="cpu", platform="cpu", memory=certain)
    made = plan(workload(), device)
    assert made.fits
    assert made.free == -memory.workspace
    assert not plan(workload(), dataclasses.replace(device, memory=certain - 1)).fits


def test_the_smallest_mesh_is_the_first_that_fits():
    for memory in (30e9, 60e9, 105e9, 700e9):
        found = smallest_mesh(workload(context=1_000_000), gpu(memory))
        every = []
        for count in range(1, 65):
            try:
                sharding = fit(LLAMA, auto_sizes(LLAMA, count))
            except ValueError:
                continue
            if plan(workload(context=1_000_000), gpu(memory), sharding).fits:
                every.append(sharding)
        assert found == every[0]


def test_no_mesh_is_fine_enough_for_everything():
    assert smallest_mesh(workload(context=2**31 - 1, batch=1000), gpu(30e9)) is None
    # All devices of a CPU share its memory.
    cpu = DeviceModel(name="cpu", platform="cpu", memory=10**11)
    assert smallest_mesh(workload(), cpu) is None
    assert smallest_mesh(workload(context=128), dataclasses.replace(cpu, memory=10**12)) == fit(
        LLAMA, {}
    )


def test_speed_is_unknown_where_the_device_is():
    assert plan(workload(), gpu(1e12)).speed.bound_tok_s > 1
    assert plan(workload(), DeviceModel(name="x", memory=10**12)).speed is None


def test_plan_of_a_loaded_model_counts_its_weights_once(monkeypatch):
    given = {}

    def of_device(device, held):
        given.update(device=device, held=held)
        return gpu(1e9)

    monkeypatch.setattr(planning, "of_device", of_device)
    model = random_model()
    made = plan_model(model, context=300, batch=2, cache_dtype="bfloat16")
    assert given == {"device": jax.devices()[0], "held": 4 * CONFIG.num_parameters}
    assert (made.work.context, made.work.batch, made.work.dtype) == (300, 2, "float32")
    assert made.memory == needed(made.work, Sharding(), "gpu")
    monkeypatch.setattr(planning, "of_device", lambda *_, **__: None)
    assert plan_model(model, context=300) is None


# What is said


def test_refusal_names_the_plan_and_what_would_fit():
    made = plan(workload(batch=3), gpu(200e9))
    with pytest.raises(MemoryPlanError) as caught:
        check_fits(made)
    text = str(caught.value)
    assert isinstance(caught.value, DecodeError)
    for words in (
        "a context of 100000 tokens for each of 3 sequences does not fit",
        "weights 138.0 GB, KV cache 98.4 GB, workspace up to ",
        "NVIDIA H200 with 200.0 GB",
        f"the largest context that fits is {made.largest_context} tokens",
        "it would fit on 2 devices (tensor=2, seq=1)",
    ):
        assert words in text


def test_refusal_where_nothing_fits():
    made = plan(workload(context=2**31 - 1, batch=1000), gpu(30e9))
    with pytest.raises(MemoryPlanError, match="; no context fits; lower the context, or use"):
        check_fits(made)


# When memory runs out all the same


def exhaust():
    """More than any machine has: the allocator itself says no."""
    return jnp.zeros(2**50, jnp.int8)


@pytest.mark.parametrize(
    "error", [MemoryError("no more"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 4 GB")],
    ids=["host", "device"],
)  # fmt: skip
def test_exhaustion_is_explained(error):
    made = plan(workload(), gpu(200e9))
    with (
        pytest.raises(OutOfMemoryError, match=r"^out of memory \((no more|.* 4 GB)\)") as caught,
        explain_exhaustion(lambda: made),
    ):
        raise error
    assert f"; planned: {made}; {made.advice()}; lower the context" in str(caught.value)
    assert caught.value.__cause__ is error


def test_exhaustion_without_a_plan_and_other_errors():
    with (
        pytest.raises(OutOfMemoryError, match=r"^out of memory \(.*\); lower the context"),
        explain_exhaustion(lambda: None),
    ):
        exhaust()
    with pytest.raises(RuntimeError, match=r"^other$"), explain_exhaustion(lambda: None):
        raise RuntimeError("other")


class Held(list):
    """A weakly referable stand-in for what a function's variables hold."""


def test_arrays_are_let_go_while_the_error_is_kept():
    held = []

    def work():
        arrays = Held([jnp.zeros(1000)])
        held.append(weakref.ref(arrays))
        exhaust()

    try:
        work()
    except RuntimeError as error:
        kept = error  # as a notebook keeps the last one
    assert held[0]() is not None
    del kept

    with pytest.raises(OutOfMemoryError) as caught, explain_exhaustion(lambda: None):
        work()
    assert held[1]() is None
    assert caught.value.__cause__.__traceback__ is not None  # where it was is still known


def test_generation_goes_on_after_exhaustion(monkeypatch):
    prompt = [5, 6, 7]
    before = run_one(prompt, max_tokens=4).tokens

    def exhausted(*_, **__):
        exhaust()

    for step in ("prefill", "decode"):
        with monkeypatch.context() as patch:
            patch.setattr(generation, step, exhausted)
            with pytest.raises(OutOfMemoryError, match="planned: "):
                run_one(prompt, max_tokens=4)
    assert run_one(prompt, max_tokens=4).tokens == before
