"""cuDNN: what it refuses and why, that it must be asked for, and the gradient that it gets."""

from __future__ import annotations

import types

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
    pretend(monkeypatch, "H200", "9.0")


def pretend(monkeypatch, name, capability):
    device = types.SimpleNamespace(device_kind=name, compute_capability=capability)
    monkeypatch.setattr(cudnn.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn.jax, "devices", lambda platform: {"gpu": [device]}[platform])


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


# Name, compute capability, and the largest head_dim that jax.nn lets cuDNN have there.
@pytest.mark.parametrize(
    ("name", "capability", "most"),
    [("A100", "8.0", 128), ("H200", "9.0", 256), ("B200", "10.0", 256), ("MI300X", "gfx942", 128)],
)
def test_the_head_dims_are_those_of_jax_nn(monkeypatch, name, capability, most):
    pretend(monkeypatch, name, capability)
    for H in range(8, 257, 8):
        if H <= most:
            assert explain(*shapes(H=H)).implementation == "cudnn"
        else:
            words = f"on {name} it takes a head_dim up to {most}, not {H}; leave out"
            with pytest.raises(NotImplementedError, match=words):
                explain(*shapes(H=H))
    for H in (most + 4, 264):
        with pytest.raises(NotImplementedError, match=f"a multiple of 8 up to 256, not {H}"):
            explain(*shapes(H=H))


def test_jax_nn_has_the_same_limits(monkeypatch):
    """Held against the function that checks them there."""
    from jax._src.cudnn import fused_attention_stablehlo as theirs

    monkeypatch.setattr(theirs, "is_cuda_compute_capability_equal", lambda _: False)
    for name, capability in (("A100", "8.0"), ("H200", "9.0")):
        pretend(monkeypatch, name, capability)
        monkeypatch.setattr(
            theirs, "check_compute_capability", lambda asked, has=capability: has >= asked
        )
        for H in range(4, 301, 4):
            q, kv, _ = shapes(H=H)
            ours = cudnn.why_not(q, None, None, None, q.dtype, False)
            assert (ours is None) == jax_takes(theirs, q, kv), (name, H, ours)


def jax_takes(theirs, q, kv):
    layout = theirs.AttentionLayout.BTNH.value
    try:
        theirs.check_is_flash_attention(q, kv, kv, layout, 91000, False, False)
    except NotImplementedError:
        return False
    return True


def test_goes_without_splits(on_gpu):
    with pytest.raises(ValueError, match="num_splits=2 goes with flash_decode"):
        explain(*shapes(), num_splits=2)


def test_asked_for(on_gpu):
    assert str(explain(*shapes())) == "cudnn: asked for"


# Microseconds of kernels on an H200, heads of 128: (B, S, N, K, cuDNN with lengths and its empty
# rows zeroed, the split kernels).
MEASURED = [
    (512, 128, 16, 2, 31.8, 22.7), (256, 256, 16, 2, 24.4, 21.6), (128, 512, 16, 2, 22.7, 21.3),
    (64, 1024, 16, 2, 21.4, 20.8), (64, 8192, 16, 2, 123.4, 123.2),
    (16, 8192, 32, 32, 473.7, 475.4), (64, 256, 32, 8, 24.8, 20.8),
    (128, 256, 32, 32, 128.8, 126.6),
]  # fmt: skip


@pytest.mark.parametrize(("B", "S", "N", "K", "by_cudnn", "split"), MEASURED)
def test_not_chosen_unasked_because_with_lengths_it_gains_at_most_little(
    on_gpu, monkeypatch, B, S, N, K, by_cudnn, split
):
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: None)
    q, kv = (jax.ShapeDtypeStruct((B, n, m, 128), jnp.bfloat16) for n, m in ((1, N), (S, K)))
    assert by_cudnn > 0.99 * split
    assert explain_attention(q, kv, kv, S).implementation == "flash_decode"


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
