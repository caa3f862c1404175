"""Gradients of decode_attention, against numbers and against a dense attention of a few lines."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_runs import IMPLEMENTATIONS
from jax.test_util import check_grads
from reference import make_case, visible_slots

from jaxdecode.pallas_kernels.decode_attention import decode_attention

pytestmark = [
    pytest.mark.contract,
    pytest.mark.parametrize("implementation", IMPLEMENTATIONS),
]

SINKS = np.array([-1.0, 0.5, 2.0, 6.0], np.float32)
OPTIONS = {
    "plain": {},
    "window": dict(window=5),
    "softcap": dict(softcap=8.0),
    "sinks": dict(sinks=SINKS),
    "all": dict(window=40, softcap=8.0, sinks=SINKS, scale=0.3),
}


def dense_attention(q, k, v, sinks, visible, scale, softcap):
    """(out, lse) with all logits in memory and K/V repeated. visible [B, T, S]: no empty row."""
    G = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, G, axis=2) for x in (k, v))
    logits = scale * jnp.einsum("btnh,bsnh->btns", q, k, precision="highest")
    logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
    logits = jnp.where(visible[:, :, None, :], logits, -jnp.inf)
    sink = jnp.broadcast_to(sinks[None, None, :, None], (*logits.shape[:3], 1))
    lse = jax.nn.logsumexp(jnp.concatenate([logits, sink], axis=-1), axis=-1)
    weights = jnp.exp(logits - lse[..., None])
    return jnp.einsum("btns,bsnh->btnh", weights, v, precision="highest"), lse


def inputs(kv_len, T, S, H=16, dtype="float32", seed=0):
    case = make_case(kv_len, T, 4, 2, H, S=S, dtype=dtype, seed=seed)
    # Values of ordinary size: needles and poison make numeric derivatives meaningless.
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal(x.shape).astype(x.dtype) for x in (case.q, case.k, case.v))
    return tuple(map(jnp.asarray, (q, k, v))), jnp.asarray(case.kv_len)


def attention_of(implementation, kv_len, **options):
    """A function of (q, k, v, sinks) that returns (out, lse)."""
    has_sinks = "sinks" in options
    options = {key: value for key, value in options.items() if key != "sinks"}

    def call(q, k, v, sinks):
        return decode_attention(
            q, k, v, kv_len, **options, sinks=sinks if has_sinks else None,
            implementation=implementation, return_lse=True,
        )  # fmt: skip

    return jax.jit(call)


def weighted_sum(function, d_out, d_lse):
    """A scalar whose gradient sends these cotangents into (out, lse), empty rows' lse left out."""

    def total(*args):
        out, lse = function(*args)
        lse = jnp.where(lse == -jnp.inf, 0.0, lse)
        return jnp.sum(out.astype(jnp.float32) * d_out) + jnp.sum(lse * d_lse)

    return total


def gradient_of(function, d_out, d_lse, argnums=(0, 1, 2)):
    return jax.jit(jax.grad(weighted_sum(function, d_out, d_lse), argnums))


def pullback(function, *args):
    return jax.jit(lambda *cotangent: jax.vjp(function, *args)[1](cotangent))


def cotangents(shape, seed=1):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (shape, shape[:-1]))


@pytest.mark.parametrize("name", ["plain", "all"])
def test_numeric_gradient(implementation, name):
    options = OPTIONS[name]
    (q, k, v), kv_len = inputs([9, 4], T=2, S=11, H=4)
    call = attention_of(implementation, kv_len, **options)
    args = (q, k, v, jnp.asarray(SINKS)) if "sinks" in options else (q, k, v)
    function = call if "sinks" in options else lambda q, k, v: call(q, k, v, None)
    check_grads(function, args, order=1, modes=["rev"], atol=3e-3, rtol=3e-3, eps=1e-2)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradient_equals_dense(implementation, options):
    T, S = 3, 1100  # several blocks
    (q, k, v), kv_len = inputs([700, 1100, 33], T, S)
    visible = np.zeros((3, T, S), bool)
    for b, t in np.ndindex(3, T):
        visible[b, t, visible_slots(b, t, T, S, kv_len, None, options.get("window"))] = True
    sinks = jnp.asarray(SINKS) if "sinks" in options else jnp.full(4, -jnp.inf)
    scale, softcap = options.get("scale", q.shape[-1] ** -0.5), options.get("softcap")

    def dense(q, k, v, sinks):
        return dense_attention(q, k, v, sinks, visible, scale, softcap)

    d_out, d_lse = cotangents(q.shape)
    wanted = (0, 1, 2, 3) if "sinks" in options else (0, 1, 2)
    ours, theirs = (
        gradient_of(function, d_out, d_lse, wanted)(q, k, v, sinks)
        for function in (attention_of(implementation, kv_len, **options), dense)
    )
    for got, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)


def test_gradient_without_lse(implementation):
    (q, k, v), kv_len = inputs([20, 31], T=2, S=31)
    d_out, d_lse = cotangents(q.shape)
    both = gradient_of(attention_of(implementation, kv_len), d_out, d_lse * 0, 0)

    def out_only(q):
        return jnp.sum(decode_attention(q, k, v, kv_len, implementation=implementation) * d_out)

    np.testing.assert_allclose(jax.jit(jax.grad(out_only))(q), both(q, k, v, None), atol=1e-6)


def test_empty_rows_give_zero(implementation):
    (q, k, v), kv_len = inputs([0, 2, 9], T=3, S=12)
    d_out, d_lse = cotangents(q.shape)
    function = attention_of(implementation, kv_len)
    dq, dk, dv = gradient_of(function, d_out, d_lse)(q, k, v, None)
    for grad in (dq, dk, dv):
        assert np.isfinite(grad).all()
        assert not grad[0].any()
    assert not dq[1, 0].any()  # three queries, two slots: the first sees nothing
    assert dq[1, 1:].any(axis=(1, 2)).all()
    for grad in pullback(function, q, k, v, None)(d_out, d_lse)[
        :3
    ]:  # a cotangent that does reach an lse of -inf
        assert np.isfinite(grad).all()
        assert not grad[0].any()


def test_sinks_of_empty_rows(implementation):
    (q, k, v), kv_len = inputs([0, 0], T=1, S=12)
    function = attention_of(implementation, kv_len, sinks=SINKS)
    d_out, d_lse = cotangents(q.shape)
    *zero, d_sinks = pullback(function, q, k, v, jnp.asarray(SINKS))(d_out, d_lse)
    assert not any(grad.any() for grad in zero)
    np.testing.assert_allclose(d_sinks, d_lse.sum((0, 1)), rtol=1e-6)


@pytest.mark.parametrize("T", [1, 3])
def test_dead_slots_never_matter(implementation, T):
    (q, k, v), kv_len = inputs([0, 5, 12], T, S=600)
    dead = np.arange(600)[None, :] >= np.asarray(kv_len)[:, None]
    d_out, d_lse = cotangents(q.shape)
    gradient = gradient_of(attention_of(implementation, kv_len), d_out, d_lse)
    expected = gradient(q, k, v, None)
    bad_k, bad_v = (jnp.where(dead[..., None, None], x, y) for x, y in ((np.nan, k), (np.inf, v)))
    for got, want in zip(gradient(q, bad_k, bad_v, None), expected, strict=True):
        np.testing.assert_array_equal(got, want)
    for grad in expected[1:]:
        assert not np.asarray(grad)[dead].any()


def test_nan_stays_with_the_queries_that_see_it(implementation):
    (q, k, v), kv_len = inputs([20], T=3, S=20)
    d_out, d_lse = cotangents(q.shape)
    gradient = gradient_of(attention_of(implementation, kv_len), d_out, d_lse, 0)
    clean = gradient(q, k, v, None)
    spoilt = gradient(q, k, v.at[0, 19].set(jnp.nan), None)
    np.testing.assert_allclose(spoilt[:, :2], clean[:, :2], atol=1e-6)
    assert np.isnan(spoilt[:, 2]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradient_in_16_bits(implementation, dtype):
    args, kv_len = inputs([70, 9], T=2, S=70, dtype=dtype)
    d_out, d_lse = cotangents(args[0].shape)
    gradient = gradient_of(attention_of(implementation, kv_len), d_out, d_lse)
    exact = gradient(*(x.astype(jnp.float32) for x in args), None)
    rounding = {"float16": 2e-3, "bfloat16": 2e-2}[dtype]
    for got, expected in zip(gradient(*args, None), exact, strict=True):
        assert got.dtype == dtype
        error = abs(got.astype(jnp.float32) - expected).max()
        assert error <= rounding * max(1, abs(expected).max())


def test_gradient_under_vmap(implementation):
    (q, k, v), kv_len = inputs([9, 20], T=2, S=20)
    d_out, d_lse = cotangents(q.shape)
    gradient = gradient_of(attention_of(implementation, kv_len), d_out, d_lse)
    queries = jnp.stack([q, 2 * q, -q])
    got = jax.jit(jax.vmap(lambda q: gradient(q, k, v, None)))(queries)
    expected = [gradient(q, k, v, None) for q in queries]
    for x, y in zip(got, map(jnp.stack, zip(*expected, strict=True)), strict=True):
        np.testing.assert_allclose(x, y, atol=3e-6)


def test_the_comparison_rejects_a_missing_cotangent(implementation):
    (q, k, v), kv_len = inputs([20, 31], T=2, S=31)
    d_out, d_lse = cotangents(q.shape)
    function = attention_of(implementation, kv_len)
    right = gradient_of(function, d_out, d_lse)(q, k, v, None)
    wrong = gradient_of(function, d_out, d_lse * 0)(q, k, v, None)
    for name, x, y in zip("qk", right, wrong, strict=False):  # lse does not depend on v
        assert abs(x - y).max() > 1e-3, name
    np.testing.assert_allclose(right[2], wrong[2], atol=1e-6)


def test_dense_rival_is_right(implementation):
    (q, k, v), kv_len = inputs([20, 31], T=1, S=31)
    visible = np.arange(31)[None, None, :] < np.asarray(kv_len)[:, None, None]
    dense = dense_attention(q, k, v, jnp.asarray(SINKS), visible, 0.25, 9.0)
    options = dict(scale=0.25, softcap=9.0, sinks=SINKS)
    ours = attention_of(implementation, kv_len, **options)(q, k, v, jnp.asarray(SINKS))
    for got, expected in zip(ours, dense, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-6)
