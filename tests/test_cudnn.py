"""implementation="cudnn": what it refuses and why, and that nothing else chooses it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxdecode.pallas_kernels import cudnn, decode_attention, explain_attention, flash_decode


def shapes(T=1, H=128, dtype=jnp.bfloat16):
    q = jax.ShapeDtypeStruct((2, T, 8, H), dtype)
    kv = jax.ShapeDtypeStruct((2, 128, 2, H), dtype)
    return q, kv, kv


def explain(q, k, v, **options):
    return explain_attention(q, k, v, 100, implementation="cudnn", **options)


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(cudnn.jax, "default_backend", lambda: "gpu")


REFUSED = {
    "tokens": (shapes(T=2), {}, "one query token, not 2"),
    "lse": (shapes(), {"return_lse": True}, "log-sum-exp has the dtype of q"),
    "window": (shapes(), {"window": 5}, "not called with window"),
    "softcap": (shapes(), {"softcap": 5.0}, "not called with softcap"),
    "sinks": (shapes(), {"sinks": jnp.zeros(8)}, "not called with sinks"),
    "dtype": (shapes(dtype=jnp.float32), {}, "bfloat16 and float16, not float32"),
    "narrow": (shapes(H=20), {}, "multiple of 8 up to 256, not 20"),
    "wide": (shapes(H=512), {}, "multiple of 8 up to 256, not 512"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused(on_gpu, name):
    arrays, options, words = REFUSED[name]
    with pytest.raises(NotImplementedError, match=f"cudnn cannot serve this call: .*{words}"):
        explain(*arrays, **options)


def test_needs_a_gpu():
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU, and JAX runs on cpu"):
        explain(*shapes())
    arrays = (jnp.zeros(x.shape, x.dtype) for x in shapes())
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        decode_attention(*arrays, 100, implementation="cudnn")


def test_goes_without_splits(on_gpu):
    with pytest.raises(ValueError, match="num_splits=2 goes with flash_decode"):
        explain(*shapes(), num_splits=2)


def test_is_never_chosen_unasked(on_gpu, monkeypatch):
    assert str(explain(*shapes())) == "cudnn: asked for"
    for obstacle in (None, "no kernels here"):
        monkeypatch.setattr(flash_decode, "why_not_here", lambda obstacle=obstacle: obstacle)
        assert explain_attention(*shapes(), 100).implementation != "cudnn"
