"""`jaxdecode plan`, and what `generate` and `chat` do when memory is short."""

from __future__ import annotations

import dataclasses
import json
import re

import jax
import pytest
from cli_runs import fails

from jaxdecode import generation
from jaxdecode.checkpoint import loading
from jaxdecode.cli import plan as verb
from jaxdecode.cli import runtime
from jaxdecode.device_model import DEVICES, DeviceModel
from jaxdecode.models.config import PRESETS


@pytest.fixture
def answer(cli):
    """answer(*arguments) -> the object that --json prints."""

    def call(*arguments):
        code, out, err = cli("plan", *arguments, "--json")
        assert (code, err, out.count("\n")) == (0, "", 1)
        return json.loads(out)

    return call


LLAMA = ("--preset", "llama-2-70b", "-c", 1_000_000, "--device-kind", "h200")

# The verb


def test_the_readme_shows_what_the_command_prints(cli, project_root):
    readme = (project_root / "README.md").read_text()
    ((arguments, shown),) = re.findall(r"```\n\$ jaxdecode (plan .*)\n((?s:.*?))```", readme)
    assert cli(*arguments.split())[:2] == (0, shown)


def test_json_schema(answer):
    found = answer(*LLAMA)
    assert list(found) == [
        "model", "dtype", "batch", "context", "capacity", "device", "memory_bytes", "hosts",
        "mesh_note", "devices", "mesh", "weights_bytes", "cache_bytes", "workspace_bytes",
        "total_bytes", "free_bytes", "fits", "largest_context", "smallest", "bytes_per_step",
        "bound_tok_s", "predicted_tok_s", "prefill_seconds", "read_tb_s", "read_source", "kinds",
    ]  # fmt: skip
    assert (found["model"], found["dtype"], found["batch"]) == ("llama-2-70b", "float16", 1)
    assert (found["devices"], found["hosts"], found["fits"]) == (8, 1, True)
    assert found["mesh"] == {"data": 1, "tensor": 8, "seq": 1}
    assert found["memory_bytes"] == int(0.75 * 141e9)
    assert found["capacity"] == 1_000_064
    assert found["total_bytes"] + found["free_bytes"] == found["memory_bytes"]
    assert 0 < found["predicted_tok_s"] < found["bound_tok_s"]
    assert list(found["kinds"]) == list(DEVICES)
    assert found["kinds"]["h200"]["bound_tok_s"] == found["bound_tok_s"]
    assert found["kinds"]["a100-40gb"]["devices"] == 16


def test_a_mesh_that_does_not_fit_names_one_that_does(cli, answer):
    found = answer(*LLAMA, "--mesh", "tensor=4")
    assert (found["fits"], found["devices"]) == (False, 4)
    assert found["free_bytes"] < 0
    assert 128 <= found["largest_context"] < 1_000_000
    assert found["smallest"]["devices"] == 8
    code, out, _ = cli("plan", *LLAMA, "--mesh", "tensor=4")
    assert code == 0
    assert "too little: does not fit    11.9 GB\n" in out
    assert "largest context here: 856192\n" in out
    assert "fewest such devices that hold it: 8 (tensor=8, seq=1)\n" in out
    code, out, _ = cli("plan", *LLAMA, "--memory-fraction", "0.001")
    assert "largest context here: none\n" in out
    assert "no number of such devices holds it\n" in out
    assert out.endswith("\nno mesh of a100-40gb, a100-80gb, h100-80gb, h200 holds this batch and "
                        "context\n")  # fmt: skip


def test_gpus_hosts_batch_and_share(answer):
    many = answer(*LLAMA, "--gpus", 32)
    assert (many["devices"], many["hosts"]) == (32, 4)
    assert many["mesh"] == {"data": 1, "tensor": 8, "seq": 4}
    assert "along its length" in many["mesh_note"]
    joined = answer(*LLAMA, "--gpus", 32, "--gpus-per-host", 32)
    assert joined["hosts"] == 1
    assert joined["predicted_tok_s"] > many["predicted_tok_s"]
    assert joined["bound_tok_s"] == many["bound_tok_s"]
    batch = answer(*LLAMA, "--mesh", "data=2,tensor=8", "-b", 4)
    assert (batch["batch"], batch["devices"], batch["hosts"]) == (4, 16, 2)
    assert batch["cache_bytes"] == pytest.approx(2 * answer(*LLAMA)["cache_bytes"])
    assert answer(*LLAMA, "--memory-fraction", "0.9")["memory_bytes"] == int(0.9 * 141e9)


def test_dtype_and_context_of_the_preset(answer):
    narrow = answer("--preset", "llama-2-7b", "--device-kind", "h200")
    wide = answer("--preset", "llama-2-7b", "--device-kind", "h200", "--dtype", "float32")
    assert (narrow["dtype"], wide["dtype"]) == ("float16", "float32")
    assert narrow["context"] == PRESETS["llama-2-7b"].max_positions
    assert wide["weights_bytes"] == 2 * narrow["weights_bytes"]


def test_of_a_model_on_disk_only_headers_are_read(answer, cli, model, monkeypatch):
    monkeypatch.setattr(loading, "load_params", lambda *_, **__: pytest.fail("weights were read"))
    found = answer("-m", model, "-c", 500)
    assert found["model"] == str(model)
    assert found["dtype"] == "float32"
    assert found["weights_bytes"] == (json.loads(cli("inspect", model, "--json")[1])["bytes"])
    assert found["capacity"] == 512
    # Of this machine's device only the memory is known.
    assert (found["device"], found["bound_tok_s"]) == ("cpu", None)
    assert "tok/s: not known for cpu" in cli("plan", "-m", model)[1]


def test_on_a_cpu_the_workspace_alone_refuses_nothing(cli, monkeypatch):
    here = DeviceModel(name="cpu", platform="cpu", memory=int(20e9))
    monkeypatch.setattr(verb, "of_device", lambda _: here)
    _, out, _ = cli("plan", "--preset", "llama-2-7b", "-c", 8192)
    assert re.search(r"\ntoo little, if the workspace is that large +\d+\.\d GB\n", out)


def test_a_quantised_model_has_the_type_of_the_device_that_runs_it(answer, model, monkeypatch):
    source = runtime.open_model(None, str(model))
    source.quantised = True
    monkeypatch.setattr(runtime, "open_model", lambda *_: source)
    assert answer("-m", model)["dtype"] == "float32"
    assert answer("-m", model, "--device-kind", "h200")["dtype"] == "bfloat16"
    assert answer("-m", model, "--dtype", "float16")["dtype"] == "float16"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give one model"),
        (["--preset", "llama-2-7b", "-m", "x"], "give one model"),
        (["--preset", "llama-9"], "--preset 'llama-9' is unknown; known: smollm2-135m, "),
        (["--preset", "llama-2-7b", "--device-kind", "b9"], "known: a100-40gb, "),
        (["--preset", "llama-2-7b", "--memory-fraction", "1.5"], "--memory-fraction must be above"),
        (["--preset", "llama-2-7b", "--memory-fraction", "nan"], "--memory-fraction must be above"),
        (["--preset", "llama-2-7b", "-c", "0"], "context must be from 1 to 2147483647, found 0"),
        (["--preset", "llama-2-7b", "-c", str(2**40)], f"found {2**40}"),
        (["--preset", "llama-2-7b", "-b", "0"], "batch must be from 1 to"),
        (["--preset", "llama-2-7b", "--gpus", "3"], "no mesh over 3 devices"),
        (["--preset", "llama-2-7b", "--mesh", "tensor=3"], "does not divide num_kv_heads=32"),
        (["--preset", "llama-2-7b", "--mesh", "heads=2"], "mesh axes must be among"),
        (["--preset", "llama-2-7b", "--mesh", "tensor=2", "--gpus", "4"], "--gpus is 4; give one"),
        (["-m", "nobody/nothing"], "nobody/nothing"),
    ],
)  # fmt: skip
def test_mistakes(cli, arguments, words):
    assert words in fails(cli("plan", *arguments))


def test_a_device_that_keeps_no_account(cli, monkeypatch):
    monkeypatch.setattr(verb, "of_device", lambda _: None)
    assert "name one with --device-kind" in fails(cli("plan", "--preset", "llama-2-7b"))


def test_help_names_the_kinds(cli):
    code, out, _ = cli("plan", "--help")
    assert code == 0
    for words in (*DEVICES, "--preset", "--mesh", "--memory-fraction", "--gpus-per-host"):
        assert words in out


# Short memory


@pytest.fixture
def small_device(monkeypatch):
    """small_device(memory): a GPU of so many bytes that runs the model."""

    def make(memory):
        device = dataclasses.replace(DEVICES["h200"], memory=memory)
        monkeypatch.setattr(runtime, "of_device", lambda _: device)
        return device

    return make


def test_generate_refuses_before_loading(ask, cli, model, small_device, monkeypatch):
    small_device(10**9)
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("it was loaded"))
    line = fails(ask("-p", "hi", "-c", 10_000_000))
    assert "a context of 10000000 tokens does not fit into memory: weights " in line
    assert "NVIDIA H200 with 1.0 GB; the largest context that fits is " in line
    assert "does not fit" in fails(
        cli("chat", "-m", model, "--no-compilation-cache", "-c", 10_000_000, stdin=b"hi\n")
    )
    small_device(1000)
    assert "no context fits" in fails(ask("-p", "hi"))


def test_generate_refuses_a_request_that_turns_out_too_long(ask, monkeypatch):
    """Without --context its size is known only with the prompt's tokens."""

    def plan_model(model, *, context, prefill_step_size):
        found.append((context, prefill_step_size))
        work = runtime.Workload(config=model.config, context=context, dtype="float32")
        return runtime.plan(work, dataclasses.replace(DEVICES["h200"], memory=1000))

    found = []
    monkeypatch.setattr(runtime, "plan_model", plan_model)
    refused = ask("-p", "hello", "--no-chat", "--prefill-step-size", 16)
    assert "a context of 13 tokens does not fit" in fails(refused)
    assert found == [(13, 16)]


def test_generate_refuses_on_this_machine(ask):
    """Half a terabyte: more memory than a machine of tests has."""
    line = fails(ask("-p", "hi", "-c", 2_000_000_000))
    assert "KV cache 512.0 GB" in line
    assert re.search(r"cpu with .*; the largest context that fits is \d+ tokens", line)


def test_a_device_that_keeps_no_account_is_trusted(ask, monkeypatch):
    monkeypatch.setattr(runtime, "of_device", lambda _: None)
    monkeypatch.setattr(runtime, "plan_model", lambda *_, **__: None)
    assert ask("-p", "hi")[0] == 0


def exhausted(*_, **__):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")


@pytest.mark.parametrize(
    ("owner", "name", "arguments"),
    [
        (loading, "load_params", []),
        (generation, "prefill", []),
        (generation, "decode", []),
        (runtime.Llama, "init_cache", ["-c", 256]),
    ],
    ids=["load", "prefill", "decode", "cache"],
)
def test_memory_that_runs_out_all_the_same(ask, monkeypatch, owner, name, arguments):
    _, before, _ = ask("-p", "hello")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, exhausted)
        line = fails(ask("-p", "hello", *arguments), code=1)
    assert "out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.); " in line
    assert re.search(r"; planned: weights .*, cpu with .*; the largest context that fits ", line)
    assert ask("-p", "hello")[:2] == (0, before)


def test_chat_when_memory_runs_out(cli, model, monkeypatch):
    monkeypatch.setattr(runtime.Llama, "init_cache", exhausted)
    chat = ("chat", "-m", model, "--no-compilation-cache")
    assert "; planned: weights " in fails(cli(*chat, stdin=b"hello\n"), code=1)
