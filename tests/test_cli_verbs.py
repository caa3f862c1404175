"""The other verbs in this process: chat, inspect, convert, doctor; and the device and its cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import jax
import pytest
from cli_runs import fails

import jaxdecode
from jaxdecode.checkpoint import load
from jaxdecode.cli import runtime
from jaxdecode.errors import DeviceError
from jaxdecode.generation import generate
from jaxdecode.pallas_kernels import flash_decode, fused_layer
from jaxdecode.sampling import SamplingParams

# Devices and the compilation cache


def test_device_gpu_without_one(ask):
    line = fails(ask("-p", "hi", "--device", "gpu"))
    assert "--device gpu: JAX finds none" in line
    assert ask("-p", "hi", "--device", "cpu")[0] == 0


def test_device_error_passes_on_what_jax_says(monkeypatch):
    def refuse(**_):
        raise RuntimeError("CUDA driver too old")

    monkeypatch.setattr(jax, "local_devices", refuse)
    with pytest.raises(DeviceError, match="CUDA driver too old; install the plugin"):
        runtime.select_device("auto")


@pytest.fixture
def cache_home(monkeypatch, tmp_path):
    """A cache directory of the test's own; yields its compiled/ and what JAX was told."""
    told = {}
    monkeypatch.setattr(runtime, "cache_directory", lambda: tmp_path / "caches" / "jaxdecode")
    monkeypatch.setattr(runtime.jax.config, "update", told.__setitem__)
    return tmp_path / "caches" / "jaxdecode" / "compiled", told


def test_compilation_cache_is_private(cache_home):
    path, told = cache_home
    runtime.enable_compilation_cache()
    assert told["jax_compilation_cache_dir"] == str(path)
    assert path.stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("which", ["compiled", "parent"])
def test_compilation_cache_writable_by_others_is_not_used(cache_home, capsys, which):
    path, told = cache_home
    path.mkdir(parents=True)
    (path if which == "compiled" else path.parent).chmod(0o777)
    runtime.enable_compilation_cache()
    assert told == {}
    assert "is writable by others (mode 0777)" in capsys.readouterr().err


def test_compilation_cache_of_somebody_else_is_not_used(cache_home, capsys, monkeypatch):
    _, told = cache_home
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    runtime.enable_compilation_cache()
    assert told == {}
    assert "not to you (12345)" in capsys.readouterr().err


def test_compilation_cache_behind_a_link_or_a_file_is_not_used(cache_home, capsys, tmp_path):
    path, told = cache_home
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path)
    runtime.enable_compilation_cache()
    path.unlink()
    path.write_text("")
    runtime.enable_compilation_cache()
    assert told == {}
    first, second = capsys.readouterr().err.splitlines()
    assert "is not a directory" in first
    assert "cannot make" in second


# chat


def say(cli, model, text, *arguments):
    options = ("-m", model, "--no-compilation-cache", "-n", 8, "-c", 128)
    return cli("chat", *options, *arguments, stdin=text.encode())


def test_chat_continues_the_conversation_without_prefilling_it_again(cli, model):
    code, out, err = say(cli, model, "hello\nand then?\n\n/exit\nnever\n", "--system", "Be brief.")
    decoder, tokenizer = load(model)
    messages = [{"role": "system", "content": "Be brief."}]
    texts, prompts = [], []
    for line in ("hello", "and then?"):
        messages.append({"role": "user", "content": line})
        (result,) = generate(decoder, tokenizer, [messages], SamplingParams(max_tokens=8))
        messages.append({"role": "assistant", "content": result.text})
        texts.append(result.text)
        prompts.append(result.stats.prompt_tokens)
    assert code == 0
    assert out == "".join(text + "\n" for text in texts)
    footers = [line for line in err.splitlines() if line.startswith("prompt: ")]
    counts = [int(line.split()[1]) for line in footers]
    answered = 8
    assert counts == [prompts[0], prompts[1] - prompts[0] - answered]


def test_chat_reset_forgets(cli, model):
    once = say(cli, model, "hello\n")[1]
    code, out, err = say(cli, model, "hello\n/reset\nhello\n/what now\n")
    assert (code, out) == (0, once + once)
    assert "begun anew" in err
    assert "/what is no command" in err


def test_chat_refuses_what_does_not_fit(cli, model):
    code, out, err = say(cli, model, "hello\n" + "x" * 100 + "\n", "-c", "64")
    assert code == 2
    assert out.count("\n") >= 1
    assert "--context is 64" in err.splitlines()[-1]
    assert "stdin is not UTF-8" in fails(
        cli("chat", "-m", model, "--no-compilation-cache", stdin=b"\xff\n")
    )


def test_chat_prints_one_seed_that_repeats_it(cli, model):
    _, out, err = say(cli, model, "hello\nagain\n", "--temp", "1.5")
    (seed,) = [line.removeprefix("seed: ") for line in err.splitlines() if "seed:" in line]
    assert say(cli, model, "hello\nagain\n", "--temp", "1.5", "--seed", seed)[1] == out


# inspect, convert, doctor


def test_inspect_json(cli, model):
    code, out, err = cli("inspect", model, "--json")
    answer = json.loads(out)
    weights = (model / "model.safetensors").read_bytes()
    assert (code, err) == (0, "")
    assert answer["parameters"] == answer["bytes"] // 4
    assert answer["config"]["num_kv_heads"] == 2
    assert answer["kv_bytes_per_token"] == {"float32": 256, "bfloat16": 128, "float16": 128}
    assert answer["tensors"]["model.norm.weight"] == {
        "shape": [32], "dtype": "float32", "bytes": 128,
    }  # fmt: skip
    files = {file["name"]: file for file in answer["files"]}
    assert sorted(files) == sorted(path.name for path in model.iterdir())
    assert files["model.safetensors"] == {
        "name": "model.safetensors",
        "bytes": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }


def test_inspect_for_people_and_without_hash(cli, model):
    code, out, _ = cli("inspect", model)
    digest = hashlib.sha256((model / "config.json").read_bytes()).hexdigest()
    assert code == 0
    assert f"sha256 {digest}" in out
    for words in (
        "parameters: ",
        "bytes per token: 256 in float32",
        "  num_layers: 2",
        "float32: ",
    ):
        assert words in out
    assert digest not in cli("inspect", model, "--no-hash")[1]


def test_inspect_skips_what_is_no_file(cli, model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model")
    os.mkfifo(copy / "pipe")
    (copy / "outside").symlink_to("/dev")
    assert {file["name"] for file in json.loads(cli("inspect", copy, "--json")[1])["files"]} == {
        path.name for path in model.iterdir()
    }


@pytest.mark.parametrize("form", ["safetensors", "orbax"])
def test_convert_makes_a_model_that_answers_the_same(cli, ask, model, tmp_path, form):
    target = tmp_path / "new" / "converted"
    code, out, err = cli("convert", model, target, "--format", form)
    assert (code, out) == (0, "")
    assert f"wrote {target}" in err
    assert ask("-p", "hello", model=target)[1] == ask("-p", "hello")[1]


def test_convert_to_another_type(cli, model, tmp_path):
    for form in ("safetensors", "orbax"):
        assert (
            cli("convert", model, tmp_path / form, "--format", form, "--dtype", "bfloat16")[0] == 0
        )
        answer = json.loads(cli("inspect", tmp_path / form, "--json")[1])
        assert {tensor["dtype"] for tensor in answer["tensors"].values()} == {"bfloat16"}


def test_convert_replaces_only_a_model_and_only_by_force(cli, model, tmp_path):
    target = tmp_path / "target"
    assert cli("convert", model, target)[0] == 0
    (target / "mark").write_text("old")
    assert "exists already" in fails(cli("convert", model, target))
    assert (target / "mark").exists()
    assert cli("convert", model, target, "--force", "--dtype", "float16")[0] == 0
    assert not (target / "mark").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert "holds the model that is being converted" in fails(
        cli("convert", target, target, "--force")
    )
    assert (target / "model.safetensors").exists()
    (target / "config.json").rename(target / "other.json")
    assert "not a model directory" in fails(cli("convert", model, target, "--force"))


def test_convert_that_fails_keeps_the_old_model(cli, model, tmp_path):
    target, broken = tmp_path / "target", shutil.copytree(model, tmp_path / "broken")
    assert cli("convert", model, target)[0] == 0
    before = (target / "model.safetensors").read_bytes()
    (broken / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in fails(cli("convert", broken, target, "--force"))
    assert (target / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "target"]


def test_doctor(cli, cache_home):
    path, _ = cache_home
    code, out, err = cli("doctor")
    assert (code, err) == (0, "")
    assert f"jaxdecode: {jaxdecode.__version__}\n" in out
    assert f"jax: {jax.__version__}\n" in out
    assert "device: cpu 0: cpu" in out
    assert "attention: xla: " in out
    assert "layers: not fused: the kernels need an NVIDIA Hopper GPU, and JAX runs on cpu\n" in out
    assert "collectives: xla: the kernels need NVIDIA Hopper GPUs" in out
    assert "mesh: data=1, tensor=8, seq=1 (--mesh auto, for the same model)\n" in out
    assert f"compiled programs: {path} (not made yet)" in out
    path.mkdir(parents=True)
    path.chmod(0o770)
    out = cli("doctor", "--device", "gpu")[1]
    assert "(mode 0770, 0 B; not used: " in out
    assert "devices: none (--device gpu: JAX finds none" in out


@pytest.mark.parametrize(
    ("obstacle", "words"),
    [
        (None, "fused: a step of one token on one GPU goes from one attention to the next in one"),
        ("the kernel needs 132 multiprocessors", "not fused: the kernel needs 132 multiprocessors"),
    ],
)
def test_doctor_says_whether_layers_are_fused(cli, cache_home, monkeypatch, obstacle, words):
    monkeypatch.setattr(fused_layer, "why_not_here", lambda: obstacle)
    (line,) = (line for line in cli("doctor")[1].splitlines() if line.startswith("layers: "))
    assert line.startswith(f"layers: {words}")


def test_doctor_says_where_a_step_attends(cli, cache_home, monkeypatch):
    def attention_lines():
        return [x for x in cli("doctor")[1].splitlines() if x.startswith("attention: ")]

    where = "; a step of one token attends inside the layers' kernel"
    apart = "attention: flash_decode: the kernels for this GPU"
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: None)
    half, single = attention_lines()
    assert half.startswith(f"{apart}{where} (a decode step in bfloat16, 32 query and 8 KV heads")
    assert single.startswith("attention: xla: the portable implementation; ")
    assert "layers' kernel" not in single
    monkeypatch.setattr(fused_layer, "why_not_here", lambda: "too few multiprocessors")
    assert attention_lines()[0].startswith(f"{apart} (a decode step in bfloat16")
