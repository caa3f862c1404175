"""Parity with transformers, on tiny random models of every variant (see golden/).

B batch, T tokens, V vocabulary. Each directory under golden/llama is a Hugging Face checkpoint and
the logits that transformers computes from it.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from jaxdecode.checkpoint import load
from jaxdecode.models.llama import Llama

GOLDEN = pathlib.Path(__file__).parent / "golden" / "llama"
VARIANTS = sorted(path.name for path in GOLDEN.iterdir())
TOLERANCE = 1e-4

pytestmark = pytest.mark.contract


@functools.cache
def variant(name):
    """(model, tokens [2, 24], logits [2, 24, V] of transformers)."""
    model, tokenizer = load(GOLDEN / name)
    assert tokenizer is None
    assert model.dtype == np.float32
    expected = safetensors.numpy.load_file(GOLDEN / name / "expected.safetensors")
    return model, expected["tokens"], expected["logits"]


@functools.cache
def jitted(name):
    return compiled(variant(name)[0])


def compiled(model, **options):
    """step(tokens [B, T], cache, num_tokens [B]) -> (logits [B, T, V], cache)."""
    graph, state = nnx.split(model)

    @jax.jit
    def step(state, tokens, cache, num_tokens):
        return nnx.merge(graph, state)(tokens, cache, num_tokens=num_tokens, **options)

    return functools.partial(step, state)


def full(tokens):
    return np.full(tokens.shape[0], tokens.shape[1], np.int32)


def test_every_variant_is_there():
    assert len(VARIANTS) == 16
    assert {"mha_untied", "gqa_tied", "mqa_untied", "head_dim", "mistral_window"} <= set(VARIANTS)
    for rope in ("linear", "llama3", "yarn"):
        assert {f"rope_{rope}_v4", f"rope_{rope}_v5"} <= set(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_those_of_transformers(name):
    model, tokens, expected = variant(name)
    logits, cache = jitted(name)(tokens, model.init_cache(2, 24), full(tokens))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(cache.lengths, [24, 24])


@pytest.mark.parametrize("name", VARIANTS)
def test_token_by_token_equals_prefill(name):
    model, tokens, expected = variant(name)
    cache = model.init_cache(2, 24)
    steps = []
    for t in range(tokens.shape[1]):
        logits, cache = jitted(name)(tokens[:, [t]], cache, np.ones(2, np.int32))
        steps.append(logits)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["gqa_tied", "rope_yarn_v5", "mistral_window"])
def test_ragged_batch_equals_single_rows(name):
    # Row 0 takes 17 + 3 + 4 tokens and row 1 takes 5 + 0 + 16, padded with a token that matters.
    model, tokens, expected = variant(name)
    cache = model.init_cache(2, 24)
    done, logits = np.zeros(2, int), [[], []]
    for num_tokens in ([17, 5], [3, 0], [4, 16]):
        T = max(num_tokens)
        padded = np.full((2, T), 7, np.int32)
        for row, count in enumerate(num_tokens):
            padded[row, :count] = tokens[row, done[row] : done[row] + count]
        got, cache = jitted(name)(padded, cache, np.array(num_tokens, np.int32))
        for row, count in enumerate(num_tokens):
            logits[row].append(np.asarray(got)[row, :count])
        done += num_tokens
    np.testing.assert_array_equal(cache.lengths, [24, 21])
    for row in range(2):
        got = np.concatenate(logits[row])
        np.testing.assert_allclose(got, expected[row, : len(got)], atol=TOLERANCE, rtol=0)


def test_last_logits_are_each_rows_last():
    model, tokens, expected = variant("gqa_tied")
    step = compiled(model, logits="last")
    logits, _ = step(tokens, model.init_cache(2, 24), np.array([24, 9], np.int32))
    assert logits.shape == (2, 1, 40)
    np.testing.assert_allclose(logits[:, 0], expected[[0, 1], [23, 8]], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_both_spellings_are_read(kind):
    old, new = (variant(f"rope_{kind}_{version}")[0].config for version in ("v4", "v5"))
    assert old.rope_scaling.kind == new.rope_scaling.kind == kind
    assert variant("mha_implicit")[0].config.rope_theta == 1e4


CHANGES = {
    "gqa_tied": dict(rope_theta=1e4),
    "rope_linear_v4": dict(rope_scaling=None),
    "rope_linear_v5": dict(rope_scaling=None),
    "rope_llama3_v4": dict(rope_scaling=None),
    "rope_llama3_v5": dict(rope_theta=1e4),
    "rope_yarn_v4": dict(rope_scaling=None),
    "rope_yarn_v5": dict(truncate=True),
    "rope_yarn_betas": dict(beta_fast=32.0, beta_slow=1.0),
    "rope_yarn_factor": dict(attention_factor=None),
    "mistral_window": dict(window=9),
    "mistral_window_head_dim": dict(window=None),
    "mistral_full": dict(window=23),
    "mha_untied": dict(norm_eps=1e-3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_comparison_rejects_another_config(name):
    model, tokens, expected = variant(name)
    changes = CHANGES[name]
    if changes.keys() & {"truncate", "beta_fast", "attention_factor"}:
        changes = {"rope_scaling": dataclasses.replace(model.config.rope_scaling, **changes)}
    other = Llama.from_params(dataclasses.replace(model.config, **changes), model.params())
    logits, _ = compiled(other)(tokens, other.init_cache(2, 24), full(tokens))
    assert abs(logits - expected).max() > 10 * TOLERANCE
