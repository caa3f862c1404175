"""Gradients of sharded_decode_attention are those of decode_attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import dealt, seq_mesh

from jaxdecode.pallas_kernels import decode_attention, sharded_decode_attention

S = 64
SINKS = np.array([-1.0, 0.5, 2.0, 6.0], np.float32)
GRADIENTS = {
    "plain": ({}, 4, 8),
    "all": (dict(window=40, softcap=8.0, sinks=SINKS, scale=0.3), 2, None),
}


@pytest.mark.parametrize(("options", "count", "block"), GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_are_those_of_one_device(options, count, block):
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.standard_normal(shape, np.float32)
        for shape in ((3, 2, 4, 8), (3, S, 2, 8), (3, S, 2, 8))
    )
    d_out, d_lse = (rng.standard_normal(shape, np.float32) for shape in (q.shape, q.shape[:-1]))
    kv_len = jnp.asarray([0, 20, S], jnp.int32)
    learned = {"q": q, "k": k, "v": v} | {x: options[x] for x in options if x == "sinks"}
    fixed = {x: options[x] for x in options if x != "sinks"}

    def gradient_of(attention, **where):
        def total(learned):
            out, lse = attention(kv_len=kv_len, return_lse=True, **learned, **fixed, **where)
            return jnp.sum(out * d_out) + jnp.sum(jnp.where(lse == -jnp.inf, 0.0, lse) * d_lse)

        return jax.jit(jax.grad(total))

    def deal(arrays):
        return {
            name: dealt(x, count, block or S // count) if name in "kv" else np.asarray(x)
            for name, x in arrays.items()
        }

    expected = deal(gradient_of(decode_attention)(learned))
    sharded = gradient_of(sharded_decode_attention, mesh=seq_mesh(count), block=block)
    for name, got in sharded(deal(learned)).items():
        np.testing.assert_allclose(got, expected[name], atol=2e-6, err_msg=name)
        assert expected[name].any()
        # The first row sees nothing.
        assert name == "sinks" or not np.asarray(got)[0].any()
