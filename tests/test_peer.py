"""When sums go through the peers' memory, when they are left to XLA, and what is said about it."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import make_mesh
from naive_llama import CONFIG

from jaxdecode import decode_loop
from jaxdecode.decode_loop import SplitModel
from jaxdecode.models.llama import Llama
from jaxdecode.models.sharding import COLLECTIVES, Sharding, choose_collectives, fit_mesh
from jaxdecode.pallas_kernels import peer

HOPPER = {
    "platform": "gpu", "compute_capability": "9.0", "process_index": 0, "device_kind": "NVIDIA H200"
}  # fmt: skip


def mesh_of(*devices):
    """What stands for a mesh of devices that this machine does not have."""
    made = [types.SimpleNamespace(**HOPPER | {"id": i} | d) for i, d in enumerate(devices)]
    return types.SimpleNamespace(devices=np.array(made).reshape(1, -1))


@pytest.fixture
def new_jax(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        ([{}], "there is one device"),
        ([{}] * 9, "at most 8 devices, and the mesh has 9"),
        ([{}, {"process_index": 1}], "of one process"),
        ([{"platform": "cpu"}] * 2, "the mesh is of cpu"),
        ([{}, {"compute_capability": "8.0"}], "compute capability 9.0"),
        ([{"id": 1}, {"id": 0}], "devices 0 to 1 in this order, and the mesh has [1, 0]"),
        ([{"id": 2}, {"id": 3}], "devices 0 to 1 in this order, and the mesh has [2, 3]"),
    ],
    ids=["one", "nine", "processes", "cpu", "ampere", "permuted", "not the first"],
)
def test_devices_that_do_not_reach_each_other(new_jax, devices, words):
    reason = peer.why_not_here(mesh_of(*devices))
    assert words in reason
    assert choose_collectives(mesh_of(*devices)) == ("xla", reason)


@pytest.mark.parametrize(
    ("count", "kind", "collectives"),
    [(2, "NVIDIA H200", "peer"), (4, "NVIDIA H200", "xla"), (2, "NVIDIA H100 PCIe", "xla")],
)
def test_devices_that_do(new_jax, count, kind, collectives):
    mesh = mesh_of(*[{"device_kind": kind}] * count)
    assert peer.why_not_here(mesh) is None
    chosen, reason = choose_collectives(mesh)
    assert chosen == collectives
    if chosen == "xla":
        assert (
            f"verified on up to 2 NVIDIA H200 so far, and the mesh is of {count} {kind}" in reason
        )


def test_an_older_jax_is_named(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert "jax >= 0.11.2" in peer.why_not_here(mesh_of({}, {}))


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((1, 1, 8192), "int32", "take bfloat16, float16, float32, not int32"),
        ((1, 1, 576), "bfloat16", "multiples of 1024 bytes, not 1152"),
        ((0, 1, 512), "bfloat16", "multiples of 1024 bytes, not 0"),
        ((1, 2048, 8192), "bfloat16", "at most 262144 bytes, not 33554432"),
    ],
)
def test_arrays_that_are_left_to_xla(shape, dtype, words):
    assert words in peer.why_not(shape, dtype)
    with pytest.raises(ValueError, match=words):
        peer.open_mailbox(shape, dtype, ("tensor",))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 1, 512), "bfloat16"), ((1, 1, 8192), "bfloat16"), ((64, 1, 1024), "float32")],
)
def test_arrays_that_are_not(shape, dtype):
    assert peer.why_not(shape, dtype) is None


def test_a_sharding_says_why_it_does_not_use_peers():
    token = (1, 1, 8192), jnp.bfloat16
    assert "collectives are xla" in Sharding(1, 2, 1).why_not_peer("F", *token)
    asked = Sharding(1, 2, 1, collectives="peer")
    assert asked.why_not_peer("F", *token) is None
    assert "different parts of B" in asked.why_not_peer("B", *token)
    assert "multiples" in asked.why_not_peer("F", (1, 1, 576), jnp.bfloat16)
    assert Sharding(1, 2, 1).mailbox("F", *token) is None
    assert asked.mailbox("B", *token) is None
    assert asked.mailbox("F", (1, 1, 576), jnp.bfloat16) is None


def test_generation_chooses_the_collectives_and_a_bare_call_takes_those_with_a_gradient(
    monkeypatch,
):
    model = Llama(CONFIG)
    model.sharding = fit_mesh(CONFIG, make_mesh((1, 2, 1)))
    assert model.sharding.collectives is None
    assert "are xla" in model.sharding.why_not_peer("F", (1, 1, 8192), jnp.bfloat16)
    assert SplitModel(model).static.sharding.collectives == "xla"
    monkeypatch.setattr(decode_loop, "choose_collectives", lambda mesh: ("peer", ""))
    split = SplitModel(model)
    assert split.static.merge(split.leaves).sharding.collectives == "peer"
    assert model.sharding.collectives is None
    for asked in COLLECTIVES:
        model.sharding = dataclasses.replace(model.sharding, collectives=asked)
        assert SplitModel(model).static.sharding.collectives == asked


@pytest.mark.parametrize(
    ("shape", "dtype", "axes"),
    [
        ((1, 2, 512), jnp.bfloat16, ("tensor",)),
        ((1, 1, 512), jnp.float16, ("tensor",)),
        ((1, 1, 512), jnp.bfloat16, ("tensor", "seq")),
    ],
    ids=["shape", "dtype", "axes"],
)
def test_a_mailbox_is_for_one_kind_of_array(shape, dtype, axes):
    made = jnp.dtype(jnp.bfloat16)
    mailbox = peer.Mailbox((1, 1, 512), made, 1, (("tensor", 2),), slots=None, turns=None)
    with pytest.raises(ValueError, match=r"is for 1 of bfloat16\[1, 1, 512\] over tensor; found"):
        peer.all_reduce(jnp.zeros(shape, dtype), axes, mailbox)


@pytest.mark.parametrize(
    ("blocks", "rows", "cluster"),
    [
        (1, 1, (1, 1)), (7, 1, (1, 7)), (8, 1, (8, 1)), (10, 1, (2, 5)), (16, 1, (8, 2)),
        (64, 16, (4, 1)), (64, 1, (8, 8)), (13, 1, None), (39, 3, None), (4, 8, None),
        (64, 5, None),
    ],
    ids=str,
)  # fmt: skip
def test_the_cluster_that_has_a_row(blocks, rows, cluster):
    assert peer.cluster_of_a_row(blocks, rows) == cluster


def test_a_norm_too_is_refused_the_mailbox_of_other_arrays():
    mailbox = peer.Mailbox(
        (1, 1, 512), jnp.dtype(jnp.bfloat16), 1, (("tensor", 2),), slots=None, turns=None
    )
    x, scale = jnp.zeros((1, 2, 512), jnp.bfloat16), jnp.zeros(512, jnp.bfloat16)
    with pytest.raises(ValueError, match=r"is for 1 of bfloat16\[1, 1, 512\] over tensor; found"):
        peer.add_and_norm(x, x, scale, 1e-5, ("tensor",), mailbox)
