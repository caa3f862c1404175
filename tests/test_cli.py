"""`jaxdecode generate` in this process: text, what goes where, mistakes and exit codes."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
from cli_runs import MAX_POSITIONS, TEMPLATE, fails, make_model

import jaxdecode
from jaxdecode.checkpoint import load
from jaxdecode.cli import runtime
from jaxdecode.cli.interrupts import EXIT_INTERRUPTED
from jaxdecode.generation import generate
from jaxdecode.sampling import SamplingParams


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "plain", template=None)


# Text


def test_generate_streamed_text_equals_whole_text_and_api(ask, model):
    code, streamed, _ = ask("-p", "Once upon a time", "--no-chat", "-n", 40, "--ignore-eos")
    assert code == 0
    _, whole, _ = ask(
        "-p", "Once upon a time", "--no-chat", "-n", 40, "--ignore-eos", "--no-stream"
    )
    decoder, tokenizer = load(model)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    (result,) = generate(decoder, tokenizer, "Once upon a time", params)
    assert streamed == whole == result.text.removesuffix("\n") + "\n"
    assert len(result.text) > 10


def test_generate_reads_prompt_from_stdin_and_file(ask, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes("grüße\r\n".encode())
    _, expected, _ = ask("-p", "grüße")
    assert ask("-p", "-", stdin="grüße\n".encode())[:2] == (0, expected)
    assert ask("-f", file)[:2] == (0, expected)
    assert ask("-p", "grüße\n")[1] != expected


def test_generate_uses_template_unless_told_not_to(ask, plain_model):
    asked = json.loads(ask("-p", "hello", "--json")[1])
    continued = json.loads(ask("-p", "hello", "--no-chat", "--json")[1])
    written = json.loads(ask("-p", "<s>user: hello<s>assistant: ", "--no-chat", "--json")[1])
    assert asked["tokens"] == written["tokens"] != continued["tokens"]
    assert asked["prompt_tokens"] == written["prompt_tokens"] > continued["prompt_tokens"]
    # Without a template the text is continued without asking.
    plain = json.loads(ask("-p", "hello", "--json", model=plain_model)[1])
    assert plain["tokens"] == continued["tokens"]


def test_generate_system_message_and_own_template(ask, plain_model, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    own = ask("-p", "hi", "--system", "Be brief.", "--chat-template", file, model=plain_model)
    same = ask("-p", "hi", "--system", "Be brief.")
    assert own[0] == 0
    assert own[1] == same[1] != ask("-p", "hi")[1]


def test_generate_same_seed_same_text(ask):
    sampled = ("-p", "hello", "--temperature", "1.5", "--seed", "3")
    assert ask(*sampled)[1] == ask(*sampled)[1]
    assert ask(*sampled)[1] != ask(*sampled[:-1], "4")[1]


def test_generate_prints_random_seed_that_repeats_the_run(ask):
    code, text, err = ask("-p", "hello", "--temp", "1.5", "-n", 30)
    (seed,) = [line.removeprefix("seed: ") for line in err.splitlines() if "seed:" in line]
    assert code == 0
    assert ask("-p", "hello", "--temp", "1.5", "-n", 30, "--seed", seed)[1] == text
    assert "seed:" not in ask("-p", "hello")[2]  # greedy


def test_generate_stops_before_stop_text(ask):
    whole = json.loads(ask("-p", "hello", "-n", 40, "--ignore-eos", "--json")[1])["text"]
    stop = whole[10:12]
    answer = json.loads(
        ask("-p", "hello", "-n", 40, "--ignore-eos", "--json", "--stop", stop, "--stop", "zzzz")[1]
    )
    assert answer["text"] == whole[: whole.index(stop)]
    assert answer["finish_reason"] == "stop"


def test_default_model_is_fetched_with_a_word_first(cli, model, monkeypatch):
    def fetch(on_message, on_progress):
        on_message("fetching 98 MB")
        on_progress("fetching", 1, 2)
        return model

    monkeypatch.setattr(runtime, "fetch_default_model", fetch)
    code, out, err = cli("generate", "-p", "hello", "-n", 8, "--no-compilation-cache")
    assert (code, len(out)) == (0, 9)
    assert err.startswith("fetching 98 MB\ndevice: ")
    assert cli("inspect", "-q")[2] == ""


# What goes where


def test_stdout_holds_only_the_text_and_stderr_says_the_rest(ask):
    _, out, err = ask("-p", "hello")
    first, *_, last = err.splitlines()
    assert first.startswith("device: cpu; attention: xla: ")
    for part in ("prompt: ", "generation: ", "compile: ", "peak memory: ", " tok/s"):
        assert part in last
        assert part not in out
    code, quiet_out, quiet_err = ask("-p", "hello", "-q")
    assert (code, quiet_out, quiet_err) == (0, out, "")


def test_json_schema(ask, model):
    code, out, _ = ask("-p", "hello", "--json", "--ignore-eos", "--logprobs", 2, "--seed", 5)
    answer = json.loads(out, parse_constant=pytest.fail)
    assert code == 0
    assert out.count("\n") == 1
    assert list(answer) == [
        "text", "tokens", "finish_reason", "prompt_tokens", "generated_tokens", "prompt_tps",
        "generation_tps", "compile_seconds", "peak_memory_bytes", "seed", "model", "dtype",
        "device", "num_devices", "mesh", "attention", "logprobs",
    ]  # fmt: skip
    assert answer["generated_tokens"] == len(answer["tokens"]) == 8
    assert answer["finish_reason"] == "length"
    assert answer["seed"] == 5
    assert (answer["dtype"], answer["device"], answer["attention"]) == ("float32", "cpu", "xla")
    assert (answer["num_devices"], answer["mesh"]) == (1, "")
    assert answer["peak_memory_bytes"] > 1e6
    assert len(answer["logprobs"]) == 8
    for token, logprobs in zip(answer["tokens"], answer["logprobs"], strict=True):
        assert [*logprobs] == ["logprob", "top"]
        assert logprobs["top"][0]["token"] == token  # greedy takes the likeliest
        assert logprobs["top"][0]["logprob"] == logprobs["logprob"] < 0
        assert len(logprobs["top"]) == 2
    assert json.loads(ask("-p", "hello", "--json")[1])["logprobs"] is None


def test_logprobs_as_text_on_stderr(ask):
    _, out, err = ask("-p", "hello", "--logprobs", 2, "--ignore-eos")
    assert out == ask("-p", "hello", "--ignore-eos")[1]
    assert sum(line.startswith("logprob ") for line in err.splitlines()) == 8


def test_logprobs_of_rows_that_no_token_has(cli, tmp_path):
    directory = make_model(tmp_path / "padded", more_rows=3)
    arguments = (
        "generate",
        "-m",
        directory,
        "-p",
        "hello",
        "-n",
        8,
        "--ignore-eos",
        "--logprobs",
        4,
    )
    code, out, err = cli(*arguments, "--json")
    assert code == 0, err
    answer = json.loads(out)
    last = load(directory)[1].vocab_size
    assert max(answer["tokens"]) >= last
    for token in answer["logprobs"]:
        for other in token["top"]:
            assert (other["text"] == "") == (other["token"] >= last)
    code, _, err = cli(*arguments)
    assert code == 0, err
    assert "logprob '' " in err


# Mistakes of the user


def test_no_prompt_or_two_prompts(ask, tmp_path):
    assert "give one prompt" in fails(ask())
    file = tmp_path / "prompt.txt"
    file.write_text("hello")
    assert "give one prompt" in fails(ask("-p", "hello", "-f", file))


@pytest.mark.parametrize("chat", ["--no-chat", "--chat"])
def test_empty_prompt(ask, tmp_path, chat):
    assert "the prompt is empty" in fails(ask("-p", "", chat))
    assert "stdin is empty" in fails(ask("-p", "-", chat, stdin=b"\n"))
    file = tmp_path / "prompt.txt"
    file.write_text("")
    assert "prompt.txt is empty" in fails(ask("-f", file, chat))


def test_prompt_that_is_not_utf8(ask, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xff\xfe")
    assert "prompt.txt is not UTF-8" in fails(ask("-f", file))
    assert "stdin is not UTF-8" in fails(ask("-p", "-", stdin=b"\xff"))
    assert "surrogate" in fails(ask("-p", "a\udcff", "--no-chat"))


def test_prompt_file_that_is_not_there(ask, tmp_path):
    code, out, err = ask("-f", tmp_path / "absent.txt")
    assert (code, out) == (2, "")
    assert "does not exist" in err


def test_too_long_prompt_names_three_numbers(ask):
    line = fails(ask("-p", "xy" * 50, "--no-chat", "-c", "64"))
    assert all(number in line for number in ("has 100 tokens", "--max-tokens 8", "the 64 tokens"))
    line = fails(ask("-p", "xy" * 50, "--no-chat", "-n", MAX_POSITIONS))
    assert f"the {MAX_POSITIONS} positions" in line
    assert ask("-p", "xy" * 28, "--no-chat", "-c", "64")[0] == 0  # just fits
    assert "the 0 tokens of --context" in fails(ask("-p", "x", "-c", "0"))


def test_context_beyond_training_is_allowed_with_a_warning(ask, monkeypatch):
    capacities = []

    def spy(*_, cache, **__):
        capacities.append(cache.capacity)
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime, "stream_generate", spy)
    _, _, err = ask("-p", "x", "-c", MAX_POSITIONS + 1)
    assert f"warning: --context {MAX_POSITIONS + 1} goes beyond" in err
    assert "warning" not in ask("-p", "x", "-c", MAX_POSITIONS)[2]
    assert capacities == [MAX_POSITIONS + 128, MAX_POSITIONS]


@pytest.mark.parametrize(
    ("option", "name", "values"),
    [
        ("--max-tokens", "max_tokens", ["0", "-1", "1000000000000"]),
        ("--temperature", "temperature", ["-1", "nan", "inf"]),
        ("--top-p", "top_p", ["0", "1.5", "nan"]),
        ("--top-k", "top_k", ["-1"]),
        ("--min-p", "min_p", ["-0.1", "1", "nan"]),
        ("--repetition-penalty", "repetition_penalty", ["0", "-1", "nan"]),
        ("--seed", "seed", ["-1", str(2**64)]),
        ("--logprobs", "logprobs", ["-1", "101"]),
        ("--stop", "stop", [""]),
        ("--prefill-step-size", "prefill_step_size", ["0", "15", "100", "-16"]),
    ],
)
def test_sampling_values_out_of_range(ask, option, name, values):
    for value in values:
        assert name in fails(ask("-p", "hello", option, value))


def test_values_that_are_no_numbers_and_unknown_options(ask, cli):
    for arguments in (
        ["--max-tokens", "many"],
        ["--dtype", "int3"],
        ["--attn", "magic"],
        ["--nope"],
    ):
        code, out, err = ask("-p", "hello", *arguments)
        assert (code, out) == (2, "")
        assert arguments[0] in err
    assert cli("dance")[0] == 2


def test_unknown_model(ask, tmp_path):
    assert "absent" in fails(ask("-p", "hi", model=tmp_path / "absent"))
    assert "nobody/nothing" in fails(ask("-p", "hi", model="nobody/nothing"))


def test_attention_is_passed_on_unless_it_cannot_run_here(ask, monkeypatch):
    asked = []
    stream = runtime.stream_generate

    def spy(*arguments, implementation, **others):
        asked.append(implementation)
        return stream(*arguments, **others)

    monkeypatch.setattr(runtime, "stream_generate", spy)
    assert "attention flash_decode: " in fails(ask("-p", "hi", "--attn", "flash_decode"))
    assert "takes one query token" in fails(ask("-p", "hi", "--attn", "cudnn"))
    assert ask("-p", "hi", "--attn", "xla")[0] == ask("-p", "hi")[0] == 0
    assert asked == ["xla", None]


def test_chat_without_template(ask, cli, plain_model):
    assert "no chat template" in fails(ask("-p", "hi", "--chat", model=plain_model))
    assert "--no-chat" in fails(cli("chat", "-m", plain_model, "--no-compilation-cache"))
    assert "--system" in fails(ask("-p", "hi", "--system", "Be.", "--no-chat"))


def test_template_that_refuses(ask, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{{ raise_exception('roles must alternate') }}")
    assert "roles must alternate" in fails(ask("-p", "hi", "--chat-template", file))


def test_model_without_tokenizer(ask, tmp_path):
    model = make_model(tmp_path / "mute", tokenizer=False)
    assert "has no tokenizer.json" in fails(ask("-p", "hi", model=model))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", truncate),
        ("model.safetensors", lambda path: path.write_bytes(b"")),
        ("config.json", lambda path: path.write_text('{"hidden_size": NaN')),
        ("config.json", lambda path: path.unlink()),
        ("tokenizer.json", truncate),
    ],
)
def test_damaged_files(ask, cli, model, tmp_path, name, damage):
    copy = shutil.copytree(model, tmp_path / "damaged")
    damage(copy / name)
    assert name in fails(ask("-p", "hi", model=copy))
    if name != "tokenizer.json":
        assert name in fails(cli("inspect", copy))


# Errors that are nobody's mistake, and interruptions


def test_internal_error_is_one_line_and_verbose_shows_traceback(ask, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("the cause")

    monkeypatch.setattr(runtime, "encode", broken)
    code, out, err = ask("-p", "hi")
    assert (code, out) == (1, "")
    assert "error: internal error: ZeroDivisionError: the cause; -v shows" in err
    code, _, err = ask("-p", "hi", "-v")
    assert code == 1
    assert "Traceback" in err
    assert "in broken" in err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PermissionError(13, "Permission denied", "/models/x"), 2, "/models/x: Permission denied"),
        (MemoryError("40 GB"), 1, "out of memory (40 GB); lower --context"),
        (RuntimeError("RESOURCE_EXHAUSTED: 40 GB"), 1, "out of memory"),
        (RuntimeError("UNKNOWN: Gloo AllGather failed: closed by peer"), 1, "lost another process"),
    ],
)
def test_exit_code_of_other_errors(ask, monkeypatch, error, code, words):
    def broken(*_):
        raise error

    monkeypatch.setattr(runtime, "encode", broken)
    assert words in fails(ask("-p", "hi"), code)


def test_keyboard_interrupt_exits_130(ask, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime, "encode", interrupted)
    assert ask("-p", "hi")[:2] == (EXIT_INTERRUPTED, "")


def test_run_leaves_logging_as_it_was(cli):
    handlers = list(logging.getLogger("jaxdecode").handlers)
    cli("--version")
    assert logging.getLogger("jaxdecode").handlers == handlers


def test_help_and_version(cli):
    assert cli("--version")[:2] == (0, f"jaxdecode {jaxdecode.__version__}\n")
    code, out, _ = cli("--help")
    assert code == 0
    assert all(verb in out for verb in ("generate", "chat", "inspect", "convert", "doctor"))
    code, out, _ = cli("generate", "--help")
    assert code == 0
    for words in ("--max-tokens", "Sampling", "Device and memory", "--no-chat", "--temp"):
        assert words in out
