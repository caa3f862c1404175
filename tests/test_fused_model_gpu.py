"""A decoder with fused layers on a GPU, beside the same one without: its options, and how it is
called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from naive_llama import naive_logits
from test_fused_model import CONFIG, WHOLE, assert_close, make_model

from jaxdecode.models import fused_layers
from jaxdecode.models.config import LlamaConfig
from jaxdecode.pallas_kernels import fused_layer

pytestmark = pytest.mark.gpu

TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 24)
ALL_REAL = (1,) * len(TOKENS)


class Case(NamedTuple):
    """A decoder, the dtype of its cache, each call's num_tokens, and what its calls go through."""

    config: LlamaConfig = WHOLE
    cache_dtype: str | None = None
    num_tokens: tuple[int, ...] = ALL_REAL
    transform: Callable = jax.jit


CASES = {
    "whole": Case(),
    "attention apart": Case(CONFIG),
    "window": Case(dataclasses.replace(WHOLE, window=5)),
    "tied embeddings": Case(dataclasses.replace(WHOLE, tie_embeddings=True)),
    # The kernel neither appends these nor attends to them.
    "heads of 64": Case(dataclasses.replace(WHOLE, num_q_heads=16, num_kv_heads=8, head_dim=64)),
    # It does not attend to these.
    "float32 cache": Case(cache_dtype="float32"),
    # At the end too: what an idle call wrote there, no later one would overwrite.
    "idle calls": Case(num_tokens=(0, 1, 1, 0, 0, *ALL_REAL[6:], 0)),
    "outside of jit": Case(transform=lambda call: call),
}


@pytest.fixture
def turns(monkeypatch):
    """Of the fused layers that are traced or, outside of a jit, run."""
    found, run = [], fused_layer.run

    def counted(*operands, **options):
        found.append(operands[4])
        return run(*operands, **options)

    monkeypatch.setattr(fused_layer, "run", counted)
    return found


def logits_of(case: Case):
    """[calls, V] of TOKENS one after the other, and the cache."""
    model = make_model(case.config)
    graph, state = nnx.split(model)

    def step(state, token, cache, num_tokens):
        return nnx.merge(graph, state)(token, cache, num_tokens=num_tokens)

    call = case.transform(step)
    cache, rows = model.init_cache(1, 128, case.cache_dtype), []
    for token, count in zip(TOKENS, case.num_tokens, strict=True):
        one, num_tokens = jnp.full((1, 1), token, jnp.int32), jnp.full(1, count, jnp.int32)
        logits, cache = call(state, one, cache, num_tokens)
        rows.append(np.asarray(logits[0, 0]))
    return np.stack(rows), cache


def check(found, expected, case: Case) -> None:
    """The calls that are not idle, against those without fused layers and float64."""
    assert np.isfinite(found).all()
    real = np.flatnonzero(case.num_tokens)
    exact = naive_logits(make_model(case.config).params(), case.config, TOKENS[real])
    assert_close(found[real], expected[real], exact)


def without_fused_layers(monkeypatch, case: Case):
    monkeypatch.setattr(fused_layers, "why_not", lambda *_: "not here")
    return logits_of(case._replace(transform=jax.jit))


@pytest.mark.parametrize("name", CASES)
def test_says_the_same_as_without_fused_layers(monkeypatch, turns, name):
    case = CASES[name]
    found, filled = logits_of(case)
    assert set(turns) == {1, 2, 3}
    turns.clear()
    expected, cache = without_fused_layers(monkeypatch, case)
    assert turns == []
    check(found, expected, case)
    count = sum(case.num_tokens)
    assert filled.lengths.tolist() == cache.lengths.tolist() == [count]
    for each in (*filled.keys, *filled.values):
        assert each.dtype == (case.cache_dtype or case.config.dtype)
        written = (np.asarray(each, np.float32) != 0).any(axis=(0, 2, 3))
        assert np.flatnonzero(written).tolist() == list(range(count))


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("window", {"config": WHOLE}),
        ("tied embeddings", {"config": WHOLE}),
        ("idle calls", {"num_tokens": ALL_REAL}),
    ],
)
def test_the_check_sees_what_is_lost(monkeypatch, name, lost):
    case = CASES[name]
    found, _ = logits_of(case._replace(**lost))
    expected, _ = without_fused_layers(monkeypatch, case)
    check(expected, expected, case)
    with pytest.raises(AssertionError):
        check(found, expected, case)
