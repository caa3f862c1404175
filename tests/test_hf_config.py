"""config.json, read strictly: what is not understood is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_hf import TINY, hf_config

from jaxdecode.checkpoint.hf_config import (
    config_from_hf,
    config_to_hf,
    generation_config_to_hf,
    read_config,
)
from jaxdecode.errors import CheckpointError, ConfigError, PathError, UnsupportedRopeError
from jaxdecode.models.config import PRESETS, LlamaConfig, RopeScaling

PATH = Path("model/config.json")
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def parse(**changes):
    return config_from_hf(hf_config(**changes), PATH)


def write(directory, text, generation=None):
    (directory / "config.json").write_text(text)
    if generation is not None:
        (directory / "generation_config.json").write_text(generation)
    return directory


def test_every_field():
    assert parse() == TINY


def test_absent_keys_mean_what_transformers_assumes():
    data = {
        "model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 4,
        "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    llama = config_from_hf(data, PATH)
    assert (llama.num_kv_heads, llama.head_dim, llama.window) == (2, 4, None)
    assert (llama.max_positions, llama.norm_eps, llama.rope_theta) == (2048, 1e-6, 10_000.0)
    assert (llama.dtype, llama.bos_id, llama.eos_ids) == ("float32", None, ())
    mistral = config_from_hf(
        data | {"model_type": "mistral", "num_attention_heads": 8, "head_dim": 4}, PATH
    )
    assert (mistral.num_kv_heads, mistral.window, mistral.max_positions) == (8, 4096, 131_072)


def test_window_is_mistrals():
    assert parse(model_type="mistral", sliding_window=16).window == 16
    assert parse(sliding_window=16).window is None
    null = hf_config(model_type="mistral") | {"sliding_window": None}
    assert config_from_hf(null, PATH).window is None


REQUIRED = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
]  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
def test_required_keys(key):
    with pytest.raises(ConfigError, match=f"config.json: {key} is missing"):
        parse(**{key: None})


@pytest.mark.parametrize(
    "key", [*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"]
)
@pytest.mark.parametrize("value", [0, -1, 2**40, 1.5, 4.0, "4", True, [4], {}])
def test_sizes_out_of_range_are_named_as_in_the_file(key, value):
    with pytest.raises(ConfigError, match=f"model/config.json: .*{key}"):
        parse(**{key: value})


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, 1e300, "1", True])
def test_constants_out_of_range(key, value):
    with pytest.raises(ConfigError, match=key):
        parse(**{key: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen2"}, "model_type must be llama or mistral.*found 'qwen2'"),
        ({"model_type": None}, "model_type must be llama or mistral.*found nothing"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu"),
        ({"attention_bias": True}, "attention_bias must be false"),
        ({"mlp_bias": True}, "mlp_bias must be false"),
        ({"attention_bias": "no"}, "attention_bias must be false"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config announces"),
        ({"compression_config": {}}, "compression_config announces"),
        ({"auto_map": {"AutoModel": "modeling.X"}}, "auto_map asks to run code"),
        ({"custom_pipelines": {}}, "custom_pipelines asks to run code"),
        ({"_attn_implementation_internal": "me/kernel"}, "_attn_implementation_internal asks to"),
        ({"_attn_implementation_internal": "eager"}, "_attn_implementation_internal asks to run"),
        ({"_attn_implementation": "me/kernel"}, "_attn_implementation asks to run code"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"torch_dtype": "int8"}, "torch_dtype must be one of float32, bfloat16, float16"),
        ({"torch_dtype": ["float32"]}, "torch_dtype must be one of"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must be the same"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"eos_token_id": 40}, "eos_token_id must be an integer from 0 to 39"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": "2"}, "eos_token_id must be a token id or a list"),
        ({"eos_token_id": [[2]]}, "eos_token_id must be a token id or a list"),
        ({"bos_token_id": 1.0}, "bos_token_id"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
    ],
)  # fmt: skip
def test_refused_by_name(change, words):
    with pytest.raises(ConfigError, match=words):
        parse(**change)


def test_messages_are_one_short_line_whatever_the_file_holds():
    with pytest.raises(ConfigError) as caught:
        parse(model_type="\x1b[31m" + "x" * 10_000)
    message = str(caught.value)
    assert len(message) < 400
    assert message.isprintable()


def test_harmless_keys_are_accepted():
    extra = {
        "_attn_implementation": "sdpa",
        "_attn_implementation_autoset": True,
        "pretraining_tp": 1,
        "use_cache": True,
        "layer_types": ["full_attention"] * 2,
        "partial_rotary_factor": 1.0,
        "attention_bias": False,
    }
    assert parse(**extra) == TINY
    with_null = hf_config() | {"auto_map": None, "quantization_config": None, "head_dim": 6}
    assert config_from_hf(with_null, PATH) == TINY


def test_dtype_in_both_spellings():
    assert parse(torch_dtype="float16").dtype == "float16"
    assert parse(torch_dtype=None, dtype="bfloat16").dtype == "bfloat16"


V4 = {
    "none": ({}, None),
    "default": ({"rope_scaling": {"rope_type": "default"}}, None),
    "linear": (
        {"rope_scaling": {"type": "linear", "factor": 4}},
        RopeScaling(kind="linear", factor=4),
    ),
    "llama3": (
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        RopeScaling(kind="llama3", factor=8, original_max_positions=64),
    ),
    "yarn": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "finetuned": True}},
        RopeScaling(kind="yarn", factor=2.0, original_max_positions=128),
    ),
    "yarn, every key": (
        {
            "rope_scaling": {
                "rope_type": "yarn", "type": "yarn", "factor": 2.0, "beta_fast": 16, "beta_slow": 2,
                "original_max_position_embeddings": 32, "attention_factor": 1.25, "truncate": False,
            }
        },
        RopeScaling(
            kind="yarn", factor=2.0, original_max_positions=32, beta_fast=16, beta_slow=2,
            attention_factor=1.25, truncate=False,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", V4)
def test_both_spellings_of_rope_are_equal(name):
    v4, scaling = V4[name]
    old = parse(rope_theta=5e5, **v4)
    assert (old.rope_theta, old.rope_scaling) == (5e5, scaling)
    parameters = {"rope_theta": 5e5, **v4.get("rope_scaling", {})}
    new = parse(rope_theta=None, rope_parameters=parameters)
    assert new == old
    # A file may hold both, as long as they agree.
    assert parse(rope_theta=5e5, rope_parameters=parameters, **v4) == old


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
        {
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 4.0},
        },
        {
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "default"},
        },
    ],
)
def test_contradicting_spellings_of_rope(changes):
    with pytest.raises(UnsupportedRopeError, match="rope_parameters contradicts"):
        parse(**changes)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"type": "dynamic", "factor": 2.0}, "'dynamic' changes the rotation .* go stale"),
        ({"type": "longrope"}, "unknown kind 'longrope'; .* default, linear, llama3, yarn"),
        ({"type": "proportional"}, "unknown kind 'proportional'"),
        ({"type": ["linear"]}, "unknown kind"),
        ({"type": "linear", "rope_type": "yarn", "factor": 2.0}, "two kinds"),
        ({"type": "linear"}, "'linear' needs factor"),
        ({"type": "yarn"}, "'yarn' needs factor"),
        ({"type": "llama3", "factor": 8.0}, "'llama3' needs low_freq_factor"),
        ({"type": "linear", "factor": None}, "'linear' needs factor"),
        ({"type": "linear", "factor": 0.5}, "rope factor must be a number from 1.0"),
        ({"type": "linear", "factor": "2"}, "rope factor must be a number"),
        ({"type": "llama3", **LLAMA3, "low_freq_factor": 5.0}, "must be below high_freq_factor"),
        ({"type": "yarn", "factor": 2.0, "truncate": 1}, "truncate must be true or false"),
        ({"type": "yarn", "factor": 2.0, "mscale": "x", "mscale_all_dim": 1.0}, "not convert"),
        ({"type": "yarn", "factor": 2.0, "extrapolate": 1}, "extrapolate = 1 is not supported"),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0},
         "original_max_position_embeddings must be an integer"),
        ({"type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention = .* is not supported"),
        ({"type": "default", "rope_theta": "big"}, "rope_theta must be a number"),
    ],
)  # fmt: skip
def test_rope_refused_by_name(spelling, rope, words):
    with pytest.raises(ConfigError, match=words):
        parse(rope_theta=None, **{spelling: rope})


def test_rope_settings_that_are_no_objects():
    with pytest.raises(ConfigError, match="rope_scaling must be an object or null; found 'yarn'"):
        parse(rope_scaling="yarn")
    with pytest.raises(
        UnsupportedRopeError, match=r"partial_rotary_factor = 0\.25 is not supported"
    ):
        parse(partial_rotary_factor=0.25)


def test_trained_length_beside_the_scaling():
    yarn = {"type": "yarn", "factor": 2.0}
    config = parse(rope_scaling=yarn, original_max_position_embeddings=16)
    assert config.rope_scaling.original_max_positions == 16
    with pytest.raises(UnsupportedRopeError, match="is 16, but in rope_scaling it is 32"):
        parse(
            rope_scaling=yarn | {"original_max_position_embeddings": 32},
            original_max_position_embeddings=16,
        )


def test_yarn_attention_factor_from_two_scales():
    yarn = {"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    scaling = parse(rope_scaling=yarn).rope_scaling
    expected = (0.1 * math.log(40.0) + 1.0) / (0.05 * math.log(40.0) + 1.0)
    assert scaling.attention_factor == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not hold valid JSON"),
        ("{", "not hold valid JSON"),
        ("[]", "must hold a JSON object"),
        ('"llama"', "must hold a JSON object"),
        ('{"rms_norm_eps": NaN}', "not hold valid JSON: NaN is not a JSON number"),
        ('{"rope_theta": -Infinity}', "-Infinity is not a JSON number"),
        ('{"vocab_size": 1, "vocab_size": 2}', "key 'vocab_size' appears twice"),
        ('{"vocab_size": ' + "9" * 30 + "}", "an integer of 30 digits"),
        ("[" * 100_000, "not hold valid JSON"),
        ('{"a": "' + "x" * (1 << 20) + '"}', "larger than 1048576 bytes"),
        ("version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_damaged_json(tmp_path, text, words):
    with pytest.raises(CheckpointError, match=words):
        read_config(write(tmp_path, text))


def test_json_that_is_no_utf8(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(CheckpointError, match="JSON: 'utf-8' codec"):
        read_config(tmp_path)


def test_no_config(tmp_path):
    with pytest.raises(CheckpointError, match="json: no such file or directory"):
        read_config(tmp_path)


def test_config_that_is_a_directory(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="json is not a regular file"):
        read_config(tmp_path)


def test_config_behind_a_link(tmp_path):
    outside, model = tmp_path / "outside.json", tmp_path / "model"
    outside.write_text(json.dumps(hf_config()))
    model.mkdir()
    (model / "config.json").symlink_to(outside)
    with pytest.raises(PathError, match="leads out of its directory"):
        read_config(model)


def test_eos_ids_come_from_the_generation_config(tmp_path):
    text = json.dumps(hf_config())
    assert read_config(write(tmp_path, text)).eos_ids == (2,)
    assert read_config(write(tmp_path, text, "{}")).eos_ids == (2,)
    assert read_config(write(tmp_path, text, '{"eos_token_id": null}')).eos_ids == (2,)
    config = read_config(write(tmp_path, text, '{"eos_token_id": [5, 3, 5], "bos_token_id": 7}'))
    assert (config.bos_id, config.eos_ids) == (7, (5, 3))
    with pytest.raises(ConfigError, match="eos_token_id"):
        read_config(write(tmp_path, text, '{"eos_token_id": [99]}'))


def scalings():
    numbers = st.floats(1.0, 1e4)
    lengths = st.integers(1, 2**20)
    linear = st.builds(RopeScaling, kind=st.just("linear"), factor=numbers)
    llama3 = st.builds(
        RopeScaling, kind=st.just("llama3"), factor=numbers, original_max_positions=lengths,
        low_freq_factor=st.floats(0.5, 2.0), high_freq_factor=st.floats(2.5, 9.0),
    )  # fmt: skip
    yarn = st.builds(
        RopeScaling, kind=st.just("yarn"), factor=numbers, original_max_positions=lengths,
        beta_fast=st.floats(8.0, 1e4), beta_slow=st.floats(0.5, 7.0), truncate=st.booleans(),
        attention_factor=st.none() | st.floats(0.1, 10.0),
    )  # fmt: skip
    return st.none() | linear | llama3 | yarn


@given(
    scaling=scalings(),
    theta=st.floats(1.01, 1e12),
    window=st.none() | st.integers(1, 2**31 - 1),
    ids=st.lists(st.integers(0, 39), unique=True),
    bos=st.none() | st.integers(0, 39),
    tied=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_there_and_back(scaling, theta, window, ids, bos, tied, dtype):
    config = dataclasses.replace(
        TINY, rope_scaling=scaling, rope_theta=theta, window=window, eos_ids=tuple(ids), bos_id=bos,
        tie_embeddings=tied, dtype=dtype,
    )  # fmt: skip
    data = json.loads(json.dumps(config_to_hf(config), allow_nan=False))
    assert config_from_hf(data, PATH) == config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_there_and_back(name):
    config = LlamaConfig.preset(name)
    assert config_from_hf(config_to_hf(config), PATH) == config


def test_generation_config_of_several_ids():
    config = dataclasses.replace(TINY, eos_ids=(2, 3))
    assert generation_config_to_hf(config) == {"bos_token_id": 1, "eos_token_id": [2, 3]}
    assert generation_config_to_hf(TINY)["eos_token_id"] == 2
