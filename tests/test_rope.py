"""Rotary embeddings against formulas written out in plain Python."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive_llama import CONFIG, naive_frequencies

from jaxdecode.models.config import PRESETS, LlamaConfig, RopeScaling
from jaxdecode.models.rope import rope_frequencies, rope_table
from jaxdecode.pallas_kernels.rope_append import apply_rope

POSITIONS = np.array([[0, 1, 2, 63, 64, 8191, 8192], [131_071, 1, 999_999, 5, 2**20, 7, 2**23]])


def scaled(kind: str | None, *, theta: float = 1e4, head_dim: int = 64, **fields) -> LlamaConfig:
    scaling = None if kind is None else RopeScaling(kind=kind, **fields)
    return dataclasses.replace(CONFIG, rope_theta=theta, head_dim=head_dim, rope_scaling=scaling)


CASES = {
    "plain": scaled(None),
    "plain, theta 5e5": scaled(None, theta=5e5, head_dim=128),
    "plain, smallest head": scaled(None, head_dim=2),
    "linear": scaled("linear", factor=4.0),
    "linear, factor 1": scaled("linear", factor=1),
    "llama 3.1": PRESETS["llama-3.1-8b"],
    "llama 3.2": scaled("llama3", theta=5e5, factor=32.0, original_max_positions=8192),
    "llama3, other bands": scaled(
        "llama3", factor=2.5, original_max_positions=512, low_freq_factor=2.0, high_freq_factor=3.0
    ),
    "yarn": scaled("yarn", factor=16.0, original_max_positions=4096, head_dim=128),
    "yarn, theta 1e6": scaled("yarn", theta=1e6, factor=4.0, original_max_positions=32_768),
    "yarn, untruncated": scaled("yarn", factor=32.0, original_max_positions=4096, truncate=False),
    "yarn, other betas": scaled(
        "yarn", factor=8.0, original_max_positions=2048, beta_fast=64.0, beta_slow=2.0
    ),
    "yarn, given factor": scaled(
        "yarn", factor=8.0, original_max_positions=2048, attention_factor=1.25
    ),
    "yarn, factor 1": scaled("yarn", factor=1.0, original_max_positions=2048),
    "yarn, short trained length": scaled("yarn", factor=4.0, original_max_positions=32),
}  # fmt: skip


@pytest.fixture(params=CASES.values(), ids=CASES)
def config(request) -> LlamaConfig:
    return request.param


def test_frequencies_are_those_of_the_formula(config):
    frequency, factor = rope_frequencies(config)
    expected, expected_factor = naive_frequencies(config)
    assert frequency.dtype == np.float32
    assert frequency.shape == (config.head_dim // 2,)
    np.testing.assert_allclose(frequency, expected, rtol=1e-6)
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_table_is_cos_and_sin_of_position_times_frequency(config):
    cos, sin = rope_table(config, jnp.asarray(POSITIONS, jnp.int32))
    assert cos.shape == sin.shape == (*POSITIONS.shape, 1, config.head_dim // 2)
    assert cos.dtype == sin.dtype == jnp.float32
    frequency, factor = naive_frequencies(config)
    angle = POSITIONS[:, :, None, None] * np.array(frequency)
    # An angle in float32 is off by half a unit in its last place, and so is the frequency.
    tolerance = 1e-6 + angle * 2.0**-23
    assert (np.abs(cos - np.cos(angle) * factor) <= tolerance * factor).all()
    assert (np.abs(sin - np.sin(angle) * factor) <= tolerance * factor).all()


def test_the_table_check_would_notice_a_position_off_by_one():
    config = CASES["llama 3.1"]
    cos, _ = rope_table(config, jnp.asarray(POSITIONS, jnp.int32))
    angle = (POSITIONS[:, :, None, None] + 1) * np.array(naive_frequencies(config)[0])
    assert (np.abs(cos - np.cos(angle)) > 1e-6 + angle * 2.0**-23).any()


def test_large_angles_are_reduced_exactly():
    frequency, _ = rope_frequencies(CASES["plain"])
    angle = POSITIONS.astype(np.float32)[:, :, None, None] * frequency
    cos, sin = rope_table(CASES["plain"], jnp.asarray(POSITIONS, jnp.int32))
    np.testing.assert_allclose(cos, np.cos(angle.astype(np.float64)), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angle.astype(np.float64)), atol=1e-6)


def test_scaling_kinds_differ_from_each_other():
    tables = [tuple(naive_frequencies(c)[0]) for c in CASES.values()]
    assert len(set(tables)) >= len(CASES) - 3  # factor 1 changes nothing, attention_factor only cos


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones():
    config = CASES["llama 3.1"]
    plain, _ = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    frequency, _ = rope_frequencies(config)
    wavelength = 2 * math.pi / plain
    np.testing.assert_array_equal(frequency[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    np.testing.assert_allclose(
        frequency[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6
    )
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert between.any()
    assert (frequency[between] < plain[between]).all()
    assert (frequency[between] > plain[between] / 8).all()


def test_first_half_turns_with_second_half():
    H = 8
    config = scaled(None, head_dim=H)
    cos, sin = rope_table(config, jnp.full((1, 1), 3, jnp.int32))
    for i in range(H):
        turned = apply_rope(jnp.eye(H, dtype=jnp.float32)[i].reshape(1, 1, 1, H), cos, sin)
        turned = np.asarray(turned).reshape(-1)
        partner = (i + H // 2) % H
        angle = 3 * 1e4 ** (-2 * (i % (H // 2)) / H)
        assert turned[i] == pytest.approx(math.cos(angle), abs=1e-6)
        assert turned[partner] == pytest.approx(
            math.sin(angle) * (1 if i < H // 2 else -1), abs=1e-6
        )
        others = np.delete(turned, [i, partner])
        np.testing.assert_array_equal(others, 0)


def test_only_the_distance_matters():
    config, rng = scaled("linear", factor=2.0, head_dim=16), np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 2, 16)), jnp.float32) for _ in range(2))

    def score(q_position, k_position):
        tables = [
            rope_table(config, jnp.full((1, 1), p, jnp.int32)) for p in (q_position, k_position)
        ]
        return np.asarray(jnp.sum(apply_rope(q, *tables[0]) * apply_rope(k, *tables[1]), axis=-1))

    near = score(5, 2)
    np.testing.assert_allclose(score(1005, 1002), near, atol=1e-3)
    assert np.abs(score(5, 3) - near).max() > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_turning_keeps_lengths_and_dtype(dtype):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((2, 7, 3, 64)), dtype)
    turned = apply_rope(x, *rope_table(CASES["plain"], jnp.asarray(POSITIONS, jnp.int32)))
    assert turned.shape == x.shape
    assert turned.dtype == x.dtype
    before, after = (np.linalg.norm(np.asarray(a, np.float64), axis=-1) for a in (x, turned))
    np.testing.assert_allclose(after, before, rtol=1e-6 if dtype == "float32" else 1e-2)
    # Computed in float32 and rounded once.
    exact = apply_rope(
        x.astype(jnp.float32), *rope_table(CASES["plain"], jnp.asarray(POSITIONS, jnp.int32))
    )
    np.testing.assert_array_equal(turned, exact.astype(dtype))


def test_position_zero_is_left_alone():
    x = jnp.ones((1, 1, 1, 64), jnp.float32)
    cos, sin = rope_table(CASES["plain"], jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_array_equal(apply_rope(x, cos, sin), x)


def test_positions_may_be_traced():
    config = CASES["yarn"]
    positions = jnp.asarray(POSITIONS, jnp.int32)
    eager, traced = (
        rope_table(config, positions),
        jax.jit(lambda p: rope_table(config, p))(positions),
    )
    for a, b in zip(eager, traced, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
