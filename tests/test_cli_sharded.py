"""--mesh on the command line: what it takes, what it says, and the same text on any devices."""

from __future__ import annotations

import json
import types

import jax
import pytest
from cli_runs import fails

from jaxdecode.cli import runtime
from jaxdecode.cli.options import parse_mesh
from jaxdecode.errors import RequestError
from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.sharding import Sharding, describe, fit

KV_HEADS = LlamaConfig(
    vocab_size=64, embed_dim=64, ffw_dim=96, num_layers=1, num_q_heads=8, num_kv_heads=2, head_dim=8
)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("auto", "auto"),
        ("tensor=2", {"tensor": 2}),
        ("data=1,tensor=2,seq=4", {"data": 1, "tensor": 2, "seq": 4}),
        ("seq=2, tensor = 16", {"seq": 2, "tensor": 16}),
    ],
)
def test_sizes(text, sizes):
    assert parse_mesh(text) == sizes
    if sizes != "auto":
        assert list(parse_mesh(text)) == list(sizes)  # the first axis is the slowest


@pytest.mark.parametrize(
    "text",
    ["", "4", "tensor", "tensor=", "=2", "tensor=0", "tensor=-1", "tensor=2.0", "tensor=1e9",
     "tensor=2,", "tensor=2;seq=2", "AUTO", "tensor=\N{SUPERSCRIPT TWO}", "tensor=" + "9" * 5000],
)  # fmt: skip
def test_what_are_no_sizes(text):
    with pytest.raises(RequestError, match="--mesh takes auto, or a list such as data=1,tensor=2"):
        parse_mesh(text)


def test_an_axis_twice():
    with pytest.raises(RequestError, match="--mesh names seq twice: 'seq=2,tensor=2,seq=1'"):
        parse_mesh("seq=2,tensor=2,seq=1")


def test_generate_over_a_mesh_writes_the_same_text(ask):
    _, text, err = ask("-p", "hello")
    assert "mesh" not in err
    code, out, err = ask("-p", "hello", "--mesh", "tensor=2,seq=2")
    assert (code, out) == (0, text)
    device, mesh, *_ = err.splitlines()
    assert device.startswith("device: 4 x cpu; attention: xla: ")
    assert mesh == (
        "mesh: data=1, tensor=2, seq=2; the KV cache is cut along its length over seq, as 2 KV "
        "heads do not divide among 4 devices; embedding and output are whole on each device, as 4 "
        "does not divide the vocabulary of 258"
    )
    assert err.count("vocabulary") == 1
    assert "mesh" not in ask("-p", "hello", "--mesh", "tensor=2,seq=2", "-q")[2]


def test_auto_says_what_it_chose(ask):
    _, out, err = ask("-p", "hello", "--mesh", "auto", "--json")
    answer = json.loads(out)
    assert (answer["num_devices"], answer["mesh"]) == (8, "tensor=2,seq=4")
    assert err.splitlines()[1].startswith(
        "mesh: data=1, tensor=2, seq=4; the KV cache is cut along its length over seq, as 2 KV "
        "heads do not divide among 8 devices; "
    )
    assert answer["text"] == json.loads(ask("-p", "hello", "--json")[1])["text"]


def test_a_batch_axis_and_a_cache_of_given_size(ask):
    expected = ask("-p", "hello")[1]
    assert ask("-p", "hello", "-c", 200, "--mesh", "data=2,tensor=2")[:2] == (0, expected)


def test_chat_over_a_mesh_continues_its_cache(cli, model):
    options = ("-m", model, "--no-compilation-cache", "-n", 8)
    lines = b"hello\nand then?\n/reset\nhello\n"
    # Capacities that the tests above have, and so their compiled programs.
    (_, expected, said), (code, out, err) = (
        cli("chat", *options, *more, stdin=lines)
        for more in (("-c", 128), ("-c", 200, "--mesh", "data=2,tensor=2"))
    )
    assert (code, out) == (0, expected)
    # As much was prefilled each time.
    counts = [
        [line.split()[1] for line in text.splitlines() if line.startswith("prompt: ")]
        for text in (said, err)
    ]
    assert counts[0] == counts[1]
    assert len(counts[0]) == 3


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("tensor=2,seq=8", "--mesh tensor=2,seq=8 needs 16 devices, but there are 8 (cpu); "),
        ("tensor=4", "mesh axis tensor=4 does not divide num_kv_heads=2 (divisors: 1, 2); "
                     "tensor=2,seq=2 fits"),
        ("model=2", "mesh axes must be among data, tensor, seq; found model"),
        ("2", "--mesh takes auto, or a list such as data=1,tensor=2,seq=2; found '2'"),
    ],
)  # fmt: skip
def test_meshes_that_cannot_be_had(ask, mesh, message):
    assert message in fails(ask("-p", "hello", "--mesh", mesh))


def test_a_mesh_without_one_of_the_processes():
    """Refused in each of them, not only where the mesh has no device."""
    devices = [types.SimpleNamespace(process_index=i // 4) for i in range(8)]
    with pytest.raises(RequestError, match="takes 4 of 8 devices, none of process 1; start fewer"):
        runtime.make_sharding(KV_HEADS, {"tensor": 2, "seq": 2}, devices)


def test_auto_where_no_mesh_fits():
    with pytest.raises(
        RequestError, match=r"--mesh auto: no mesh over 7 devices .* that fits is 6"
    ):
        runtime.make_sharding(
            LlamaConfig(**{**vars(KV_HEADS), "num_kv_heads": 3, "num_q_heads": 9}),
            "auto",
            jax.devices()[:7],
        )


def test_the_first_devices_in_their_order():
    sharding = runtime.make_sharding(KV_HEADS, {"seq": 2, "tensor": 2}, jax.devices())
    assert sharding.mesh is not None
    assert sharding.mesh.axis_names == ("seq", "tensor")
    assert [device.id for device in sharding.mesh.devices.flat] == [0, 1, 2, 3]
    assert runtime.make_sharding(KV_HEADS, None, jax.devices()) == Sharding()


def test_what_is_said_of_a_mesh():
    assert describe(KV_HEADS, fit(KV_HEADS, {"data": 4, "tensor": 2})) == (
        "mesh: data=4, tensor=2, seq=1"
    )
    # Somebody who asks for it is told no reason.
    assert describe(KV_HEADS, fit(KV_HEADS, {"seq": 2})) == (
        "mesh: data=1, tensor=1, seq=2; the KV cache is cut along its length over seq"
    )
    assert [str(fit(KV_HEADS, sizes)) for sizes in ({}, {"seq": 2, "data": 4})] == [
        "", "data=4,seq=2",
    ]  # fmt: skip
