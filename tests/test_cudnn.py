"""cuDNN: what it refuses and why, when it is chosen, and the gradient that it gets."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
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
    "result": (shapes(), {"out_dtype": "float32"}, "the dtype of q, bfloat16, not float32"),
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


def test_asked_for(on_gpu):
    assert str(explain(*shapes())) == "cudnn: asked for"


def many(B=256, S=256, T=1, K=2, dtype=jnp.bfloat16):
    q = jax.ShapeDtypeStruct((B, T, 8 * K, 128), dtype)
    kv = jax.ShapeDtypeStruct((B, S, K, 128), dtype)
    return q, kv, kv


# Microseconds per call on an H200 with 16/2 heads of 128, back to back: (B, S, cuDNN, the split
# kernels). With lengths, as decode_attention has them always.
MEASURED = [
    (256, 256, 29.8, 30.3), (128, 512, 28.5, 28.2), (64, 1024, 26.9, 26.6), (32, 2048, 32.3, 26.3),
    (16, 4096, 30.9, 26.9), (8, 2048, 24.8, 13.9), (1, 512, 12.3, 10.4),
]  # fmt: skip


@pytest.mark.parametrize(("B", "S", "by_cudnn", "split"), MEASURED)
def test_chosen_where_it_was_faster(on_gpu, monkeypatch, B, S, by_cudnn, split):
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: None)
    chosen = explain_attention(*many(B, S), S).implementation
    assert chosen == ("cudnn" if by_cudnn < split else "flash_decode")


@pytest.mark.parametrize(
    "options",
    [{"return_lse": True}, {"window": 100}, {"softcap": 9.0}, {"out_dtype": "float32"}],
    ids=str,
)
def test_chosen_only_where_it_is_exact(on_gpu, monkeypatch, options):
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: None)
    assert explain_attention(*many(), 100).implementation == "cudnn"
    assert explain_attention(*many(), 100, **options).implementation == "flash_decode"
    assert explain_attention(*many(T=2), 100).implementation == "flash_decode"
    assert explain_attention(*many(dtype=jnp.float32), 100).implementation == "xla"


def test_not_chosen_where_the_kernels_cannot_run(on_gpu, monkeypatch):
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: "no kernels here")
    assert explain_attention(*many(), 100).implementation == "xla"


def test_a_chosen_call_may_be_lowered_for_another_platform(on_gpu, monkeypatch):
    """A process with a GPU may run it on its CPU, and differentiate it there."""
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: None)
    q, k, v = (jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(many()))
    kv_len = jnp.arange(256) % 257
    monkeypatch.setattr(cudnn, "attend", cudnn.portable)  # jax.nn looks for cuDNN when traced
    out = decode_attention(q, k, v, kv_len)
    ref = decode_attention(q, k, v, kv_len, implementation="xla")
    np.testing.assert_array_equal(np.asarray(out), np.asarray(ref))


def test_the_gradient_is_that_of_the_portable_implementation():
    def sums(attend):
        def loss(q, k, v):
            out = attend(q, k, v, jnp.zeros((2, 1), jnp.int32), hi, 0.1)
            return jnp.sum(out.astype(jnp.float32) ** 2)

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    q, k, v = (
        jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(shapes())
    )
    k, v = k.at[:, 100:].set(jnp.nan), v.at[:, 100:].set(jnp.nan)
    hi = jnp.array([[100], [0]], jnp.int32)
    got = sums(cudnn.attend)
    for ours, theirs in zip(got, sums(cudnn.portable), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
        assert np.isfinite(np.asarray(ours)).all()
