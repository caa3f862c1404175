"""GGUF metadata becomes a LlamaConfig, or an error that names the key and what was found."""

from __future__ import annotations

import numpy as np
import pytest
from gguf_writing import D, F, H, K, L, N, V, write_model

from jaxdecode.checkpoint.gguf_config import llama3_divisors
from jaxdecode.checkpoint.gguf_file import open_gguf
from jaxdecode.errors import CheckpointError, ConfigError, UnsupportedRopeError
from jaxdecode.models.config import PRESETS, LlamaConfig, RopeScaling

SCALING = "llama__rope__scaling__"


def config_of(tmp_path, **changed):
    path = tmp_path / "model.gguf"
    write_model(path, **changed)
    with open_gguf(path) as source:
        return source.config


def test_metadata_becomes_the_config(tmp_path):
    assert config_of(tmp_path, llama__attention__sliding_window=100) == LlamaConfig(
        vocab_size=V,
        embed_dim=D,
        ffw_dim=F,
        num_layers=L,
        num_q_heads=N,
        num_kv_heads=K,
        head_dim=H,
        max_positions=512,
        norm_eps=float(np.float32(1e-5)),
        rope_theta=50000.0,
        window=100,
        tie_embeddings=False,
        dtype="float32",
        bos_id=1,
        eos_ids=(2,),
    )


def test_what_may_be_left_out(tmp_path):
    config = config_of(
        tmp_path,
        tied=True,
        llama__rope__freq_base=None,
        llama__rope__dimension_count=None,
        llama__attention__value_length=None,
        llama__attention__sliding_window=0,
        tokenizer__ggml__bos_token_id=None,
        tokenizer__ggml__eos_token_id=None,
        tokenizer__ggml__tokens=None,
    )
    assert config.rope_theta == 10_000.0
    assert config.tie_embeddings
    assert (config.window, config.bos_id, config.eos_ids) == (None, None, ())


def test_values_given_per_layer(tmp_path):
    config = config_of(tmp_path, llama__attention__head_count_kv=[K] * L)
    assert config.num_kv_heads == K
    with pytest.raises(ConfigError, match=r"head_count_kv must be one integer.*found \[2, 1\]"):
        config_of(tmp_path, llama__attention__head_count_kv=[2, 1])


@pytest.mark.parametrize(("eot", "eos_ids"), [(7, (2, 7)), (2, (2,)), (None, (2,))])
def test_eot_ends_a_text_too(tmp_path, eot, eos_ids):
    assert config_of(tmp_path, tokenizer__ggml__eot_token_id=eot).eos_ids == eos_ids


REFUSED = {
    "architecture": (
        {"general.architecture": "gpt2"},
        "the architecture is 'gpt2', supported is only 'llama'",
    ),
    "no heads": ({"llama.attention.head_count": None}, "head_count must be one integer.* nothing"),
    "0 heads": ({"llama.attention.head_count": 0}, "num_q_heads must be an integer from 1"),
    "heads do not divide": (
        {"llama.attention.head_count_kv": 3},
        "num_q_heads=4 must be a multiple of num_kv_heads=3",
    ),
    "negative layers": ({"llama.block_count": -1}, "num_layers must be an integer from 1"),
    "layers as text": ({"llama.block_count": "2"}, "block_count must be one integer.*found '2'"),
    "layers as bool": ({"llama.block_count": True}, "block_count must be one integer.*found True"),
    "layers as float": ({"llama.block_count": 2.0}, "block_count must be one integer.*found 2.0"),
    "long array": (
        {"llama.block_count": [2] * 5000},
        "block_count must be one value or one per layer, found an array of 5000",
    ),
    "width": ({"llama.embedding_length": 2**31}, "embed_dim must be an integer from 1"),
    "no epsilon": (
        {"llama.attention.layer_norm_rms_epsilon": None},
        "layer_norm_rms_epsilon must be a number, found nothing",
    ),
    "epsilon NaN": (
        {"llama.attention.layer_norm_rms_epsilon": float("nan")},
        "layer_norm_rms_epsilon must be a finite number, found nan",
    ),
    "epsilon 2": ({"llama.attention.layer_norm_rms_epsilon": 2.0}, "norm_eps must be a number"),
    "theta": ({"llama.rope.freq_base": -1.0}, "rope_theta must be a number from 1"),
    "odd head": (
        {"llama.attention.key_length": 33, "llama.attention.value_length": 33}
        | {"llama.rope.dimension_count": 33},
        "head_dim=33 must be even",
    ),
    "values of another width": (
        {"llama.attention.value_length": 64},
        "value_length must be the head dimension 32, found 64",
    ),
    "partial rotary": (
        {"llama.rope.dimension_count": 16},
        "dimension_count must be the head dimension 32, found 16",
    ),
    "experts": (
        {"llama.expert_count": 8},
        "llama.expert_count must be absent or 0.*found 8",
    ),
    "softcap": ({"llama.final_logit_softcapping": 30.0}, "softcapping must be absent or 0"),
    "encoder": ({"llama.attention.causal": False}, "causal must be true"),
    "vocabulary size": (
        {"llama.vocab_size": 41},
        "vocab_size must be 40, the rows of 'token_embd.weight', found 41",
    ),
    "more tokens than rows": (
        {"tokenizer.ggml.tokens": ["x"] * 41},
        "the tokenizer has 41 tokens, the embedding 40 rows",
    ),
    "eos outside": ({"tokenizer.ggml.eos_token_id": 40}, "eos_ids must be an integer from 0 to 39"),
    "bos negative": ({"tokenizer.ggml.bos_token_id": -1}, "bos_id must be an integer from 0 to 39"),
    "eos as text": ({"tokenizer.ggml.eos_token_id": "x"}, "eos_token_id must be one integer"),
    "context": ({"llama.context_length": 0}, "max_positions must be an integer from 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_metadata_is_refused(tmp_path, case):
    changed, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words) as caught:
        config_of(tmp_path, **changed)
    assert str(caught.value).startswith(f"{tmp_path / 'model.gguf'}: ")
    assert str(caught.value).isprintable()


def test_architecture_must_be_text(tmp_path):
    from gguf_writing import U32, pair, raw_file, u32

    path = tmp_path / "model.gguf"
    path.write_bytes(raw_file([pair("general.architecture", U32, u32(1))]))
    with pytest.raises(ConfigError, match=r"general.architecture must be a string, found 1"):
        open_gguf(path)


def test_one_part_of_several_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"one of 3 parts of a model; join them with"):
        config_of(tmp_path, split__count=3)
    assert config_of(tmp_path, split__count=1).num_layers == L


def test_no_embedding(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tensor 'token_embd.weight' among 20"):
        config_of(tmp_path, drop=("token_embd.weight",))


ROPES = {
    "none": ({"type": "none", "factor": 4.0}, None),
    "factor 1": ({"type": "linear", "factor": 1.0}, None),
    "factor 0": ({"type": "linear", "factor": 0.0}, None),
    "linear": ({"type": "linear", "factor": 4.0}, RopeScaling(kind="linear", factor=4.0)),
    "no type": ({"factor": 4.0}, RopeScaling(kind="linear", factor=4.0)),
    "yarn": (
        {"type": "yarn", "factor": 4.0, "original_context_length": 128},
        RopeScaling(kind="yarn", factor=4.0, original_max_positions=128),
    ),
    "yarn by default from the context": (
        {"type": "yarn", "factor": 4.0, "yarn_ext_factor": 1.0},
        RopeScaling(kind="yarn", factor=4.0, original_max_positions=512),
    ),
    "yarn with betas": (
        {"type": "yarn", "factor": 4.0, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0}
        | {"attn_factor": 0.5},
        RopeScaling(
            kind="yarn",
            factor=4.0,
            original_max_positions=512,
            beta_fast=16.0,
            beta_slow=2.0,
            attention_factor=0.5 * (0.1 * np.log(4.0) + 1),
        ),
    ),
}


@pytest.mark.parametrize("case", ROPES)
def test_rope_scaling(tmp_path, case):
    keys, expected = ROPES[case]
    changed = {SCALING + key: value for key, value in keys.items()}
    assert config_of(tmp_path, **changed).rope_scaling == expected


def test_old_spelling_of_the_linear_factor(tmp_path):
    config = config_of(tmp_path, llama__rope__scale_linear=2.0)
    assert config.rope_scaling == RopeScaling(kind="linear", factor=2.0)


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "x\n"])
def test_unknown_rope_scaling_is_refused_by_name(tmp_path, kind):
    words = rf"scaled by {ascii(kind)!s}, known are none, linear, llama3, yarn".replace("\\", r"\\")
    with pytest.raises(UnsupportedRopeError, match=words):
        config_of(tmp_path, **{SCALING + "type": kind, SCALING + "factor": 2.0})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"type": "linear", "factor": -2.0}, "rope factor must be a number from 1"),
        ({"type": "yarn", "factor": 0.5, "attn_factor": 0.5}, "rope factor must be a number from"),
        ({"type": "yarn", "factor": 2.0, "yarn_ext_factor": 0.5}, "ext_factor must be absent or 1"),
        ({"type": 3}, "scaling.type must be a string, found 3"),
        ({"type": "yarn", "factor": "2"}, "scaling.factor must be a number, found '2'"),
        ({"yarn_log_multiplier": 0.1}, "yarn_log_multiplier must be absent or 0"),
    ],
)
def test_wrong_rope_values(tmp_path, keys, words):
    with pytest.raises(ConfigError, match=words):
        config_of(tmp_path, **{SCALING + key: value for key, value in keys.items()})


def divisors_one_by_one(theta, head_dim, factor, original=8192, low=1.0, high=4.0):
    divisors = []
    for j in range(head_dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * j / head_dim)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors)


def test_llama3_divisors():
    scaling = PRESETS["llama-3.1-8b"].rope_scaling
    ours = llama3_divisors(scaling, 500_000.0, 128)
    np.testing.assert_allclose(ours, divisors_one_by_one(500_000.0, 128, 8.0), rtol=1e-12)
    assert ours[0] == 1
    assert ours[-1] == 8
    assert np.any((ours > 1.5) & (ours < 7.5))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised_by_its_divisors(tmp_path, factor):
    freqs = divisors_one_by_one(500_000.0, H, factor).astype(np.float32)
    config = config_of(
        tmp_path, llama__rope__freq_base=500_000.0, extra={"rope_freqs.weight": freqs}
    )
    assert config.rope_scaling == RopeScaling(
        kind="llama3",
        factor=factor,
        original_max_positions=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )


def test_divisors_of_one_scale_nothing(tmp_path):
    ones = np.ones(H // 2, np.float32)
    assert config_of(tmp_path, extra={"rope_freqs.weight": ones}).rope_scaling is None


@pytest.mark.parametrize(
    "freqs",
    [
        divisors_one_by_one(500_000.0, H, 16.0),
        divisors_one_by_one(500_000.0, H, 8.0, original=4096),
        divisors_one_by_one(500_000.0, H, 8.0, high=8.0),
        divisors_one_by_one(500_000.0, 2 * H, 8.0),
        np.full(H // 2, np.nan),
        np.ones((2, H // 2)),
        np.ones(5000),
    ],
    ids=["factor", "original", "high", "length", "nan", "matrix", "long"],
)
def test_other_divisors_are_refused(tmp_path, freqs):
    extra = {"rope_freqs.weight": freqs.astype(np.float32)}
    with pytest.raises(
        UnsupportedRopeError, match=r"divisors in 'rope_freqs.weight' are not those"
    ):
        config_of(tmp_path, llama__rope__freq_base=500_000.0, extra=extra)


def test_divisors_beside_a_scaling_are_refused(tmp_path):
    extra = {"rope_freqs.weight": np.ones(H // 2, np.float32)}
    changed = {SCALING + "type": "linear", SCALING + "factor": 2.0}
    with pytest.raises(UnsupportedRopeError, match=r"both llama.rope.scaling.type 'linear' and"):
        config_of(tmp_path, extra=extra, **changed)
