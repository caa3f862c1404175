"""LlamaConfig and RopeScaling: what they refuse, what they derive, and the presets."""

from __future__ import annotations

import dataclasses
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from jaxdecode.models.config import PRESETS, LlamaConfig, RopeScaling

SMALL = dict(
    vocab_size=64, embed_dim=32, ffw_dim=48, num_layers=2, num_q_heads=4, num_kv_heads=2
)  # fmt: skip
YARN = dict(kind="yarn", factor=4.0, original_max_positions=64)
SIZES = ["vocab_size", "embed_dim", "ffw_dim", "num_layers", "num_q_heads", "num_kv_heads"]
NOT_A_SIZE = [0, -1, 2**31, 1.0, 2.5, math.nan, math.inf, True, "4", None, np.int64(4)]


# Counted from the published checkpoints.
@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes"),
    [
        ("smollm2-135m", 134_515_008, 23_040),
        ("tinyllama", 1_100_048_384, 22_528),
        ("llama-2-7b", 6_738_415_616, 524_288),
        ("llama-2-70b", 68_976_648_192, 327_680),
        ("llama-3.1-8b", 8_030_261_248, 131_072),
        ("codellama-7b", 6_738_546_688, 524_288),
        ("codellama-34b", 33_743_970_304, 196_608),
    ],
)
def test_presets_have_the_published_sizes(name, parameters, kv_bytes):
    config = LlamaConfig.preset(name)
    assert config is PRESETS[name]
    assert config.num_parameters == parameters
    assert config.kv_bytes_per_token(2) == kv_bytes
    assert config.embed_dim == config.num_q_heads * config.head_dim


def test_there_are_no_other_presets():
    assert len(PRESETS) == 7
    with pytest.raises(ValueError, match="unknown preset 'gpt-2'; known: smollm2-135m, tinyllama"):
        LlamaConfig.preset("gpt-2")


def test_head_dim_is_derived_and_may_be_given():
    assert LlamaConfig(**SMALL).head_dim == 8
    assert LlamaConfig(**SMALL, head_dim=16).head_dim == 16
    assert LlamaConfig(**SMALL | {"embed_dim": 30}, head_dim=16).head_dim == 16


def test_configs_are_hashable_values():
    config = LlamaConfig(**SMALL, rope_scaling=RopeScaling(**YARN))
    assert config == LlamaConfig(**SMALL, rope_scaling=RopeScaling(**YARN))
    assert len({config, dataclasses.replace(config), dataclasses.replace(config, window=3)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.embed_dim = 1


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", NOT_A_SIZE, ids=repr)
def test_sizes_are_checked(field, value):
    with pytest.raises(ValueError, match=f"{field} must be an integer from 1 to"):
        LlamaConfig(**SMALL | {field: value})


@pytest.mark.parametrize("field", ["head_dim", "max_positions", "window", "bos_id"])
@pytest.mark.parametrize("value", [v for v in NOT_A_SIZE if v not in (None, 0)], ids=repr)
def test_optional_sizes_are_checked(field, value):
    with pytest.raises(ValueError, match=f"{field} must be an integer from"):
        LlamaConfig(**SMALL | {field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_q_heads": 3}, "num_q_heads=3 must be a multiple of num_kv_heads=2"),
        ({"embed_dim": 34}, "embed_dim=34 is not a multiple of num_q_heads=4; give head_dim"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"window": 0}, "window must be an integer from 1"),
        ({"dtype": "float64"}, "dtype must be one of .*'float64'"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"bos_id": 64}, "bos_id must be an integer from 0 to 63, found 64"),
        ({"eos_ids": (1, -2)}, "eos_ids must be an integer from 0 to 63, found -2"),
        ({"eos_ids": (1, 64)}, "eos_ids must be an integer from 0 to 63, found 64"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**SMALL | fields)


@pytest.mark.parametrize("field", ["norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, 1e30, True, "1", None], ids=repr)
def test_numbers_are_checked(field, value):
    with pytest.raises(ValueError, match=f"{field} must be a number from"):
        LlamaConfig(**SMALL | {field: value})


def test_limits_themselves_are_allowed():
    config = LlamaConfig(**SMALL, bos_id=0, eos_ids=(0, 63), window=1, head_dim=2, max_positions=1)
    assert config.eos_ids == (0, 63)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "default", "", None, 3], ids=repr)
def test_unknown_rope_kinds_are_refused_by_name(kind):
    with pytest.raises(
        ValueError, match=r"rope kind must be one of \('linear', 'llama3', 'yarn'\)"
    ):
        RopeScaling(kind=kind, factor=2.0, original_max_positions=64)


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_rope_kinds_that_need_the_trained_length_say_so(kind):
    with pytest.raises(ValueError, match=f"rope kind '{kind}' needs original_max_positions"):
        RopeScaling(kind=kind, factor=2.0)
    assert RopeScaling(kind="linear", factor=2.0).original_max_positions is None


@pytest.mark.parametrize(
    "field",
    ["factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"],
)
@pytest.mark.parametrize("value", [0.0, -2.0, math.nan, math.inf, 1e7, True, "2"], ids=repr)
def test_rope_numbers_are_checked(field, value):
    with pytest.raises(ValueError, match=f"{field} must be a number from"):
        RopeScaling(**YARN | {field: value})


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "64", 2**31], ids=repr)
def test_rope_trained_length_is_checked(value):
    with pytest.raises(ValueError, match="original_max_positions must be an integer"):
        RopeScaling(**YARN | {"original_max_positions": value})


def test_llama3_needs_its_factors_in_order():
    with pytest.raises(
        ValueError, match=r"low_freq_factor=4.0 must be below\s+high_freq_factor=4.0"
    ):
        RopeScaling(**YARN | {"kind": "llama3"}, low_freq_factor=4.0)


def made(kind, fields):
    """(what was made, None), or (None, the message of the ValueError)."""
    try:
        return kind(**fields), None
    except ValueError as error:
        return None, str(error)


# Integers that a float can hold: larger ones have a test of their own.
scalars = st.one_of(
    st.integers(-(2**1000), 2**1000), st.floats(), st.booleans(), st.none(), st.text(max_size=3)
)


@given(st.dictionaries(st.sampled_from([*SIZES, "head_dim", "norm_eps", "rope_theta"]), scalars))
def test_anything_else_is_a_value_error(fields):
    config, message = made(LlamaConfig, SMALL | fields)
    if config is None:
        assert any(name in message for name in fields)
    else:
        assert config.num_parameters > 0
        assert 0 < config.rope_theta < math.inf


def test_an_integer_too_large_for_a_float_is_a_value_error():
    with pytest.raises(ValueError, match="rope_theta must be a number from"):
        LlamaConfig(**SMALL, rope_theta=10**400)


@given(st.dictionaries(st.sampled_from(["factor", "beta_fast", "attention_factor"]), scalars))
def test_any_other_rope_value_is_a_value_error(fields):
    scaling, message = made(RopeScaling, YARN | fields)
    if scaling is None:
        assert any(name in message for name in fields)
    else:
        assert 1 <= scaling.factor <= 1e6


def test_yarn_needs_a_range_to_ramp_over():
    yarn = dict(kind="yarn", factor=2.0, original_max_positions=64)
    with pytest.raises(ValueError, match=r"beta_slow=32\.0 must be below beta_fast=32\.0"):
        RopeScaling(**yarn, beta_slow=32.0)
    RopeScaling(**yarn, beta_slow=31.0)
