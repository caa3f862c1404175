"""The gradient that callers of the GPU kernels share; the portable attention stands in for them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdecode.pallas_kernels import xla
from jaxdecode.pallas_kernels.kernel_call import differentiable

SCALE = 0.3
# The first query sees nothing, the second a part, the third all.
LO, HI = jnp.array([[0, 1, 0]], jnp.int32), jnp.array([[0, 3, 5]], jnp.int32)


def stand_in(q, k, v, lo, hi, sinks, *, out_dtype, softcap):
    out, lse = xla.attend(q, k, v, lo, hi, scale=SCALE, softcap=softcap, sinks=sinks)
    return out.astype(out_dtype), lse


def through_kernels(q, k, v, sinks, softcap):
    forward = functools.partial(stand_in, softcap=softcap)
    return differentiable(forward, (q, k, v, LO, HI, sinks), SCALE, softcap, jnp.float32)


def portable(q, k, v, sinks, softcap):
    return xla.attend(q, k, v, LO, HI, scale=SCALE, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [None, [0.5, -1.0], [-np.inf, 0.5]], ids=["none", "two", "one"])
def test_gradient_is_that_of_the_portable_attention(sinks, softcap):
    q, k, v = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(1, 3, 2, 8), (1, 5, 1, 8), (1, 5, 1, 8)])
    )
    arguments = (q, k, v, None if sinks is None else jnp.array(sinks, jnp.float32))

    def loss(attend, *arguments):
        out, lse = attend(*arguments, softcap)
        return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))

    wanted = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
    found, expected = (
        jax.grad(functools.partial(loss, attend), wanted)(*arguments)
        for attend in (through_kernels, portable)
    )
    for one, other in zip(found, expected, strict=True):
        assert np.isfinite(other).all()
        assert np.abs(other).max() > 0.01
        np.testing.assert_allclose(one, other, atol=1e-5)
