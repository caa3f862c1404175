"""A layer in one kernel that begins with its attention, on a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_fused_attend import H, attend_to, layer_of, run_once
from test_fused_layer import EPS
from test_fused_layer_gpu import assert_same_bits, check

from jaxdecode.pallas_kernels import fused_layer

pytestmark = pytest.mark.gpu

run = jax.jit(run_once)


def exact(attend):
    """What the heads find, from float64."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in attend[:3])
    lo, hi = (int(x[0, 0]) for x in attend[3:])
    out = np.zeros(q.shape[2:])
    for n in range(q.shape[2]) if hi > lo else ():
        head = n // (q.shape[2] // k.shape[2])
        logits = k[0, lo:hi, head] @ q[0, 0, n] * H**-0.5
        weights = np.exp(logits - logits.max())
        out[n] = weights @ v[0, lo:hi, head] / weights.sum()
    return jnp.asarray(out.reshape(-1), attend.q.dtype)


@pytest.mark.parametrize(
    ("lo", "hi"),
    [(0, 1), (0, 64), (0, 65), (100, 101), (63, 129), (5, 2000), (0, 2048), (1000, 2048), (0, 0)],
)
@pytest.mark.parametrize("name", ["llama-3.1-8b", "codellama-34b", "llama-2-7b", "odd", "few"])
def test_against_the_reference(name, lo, hi):
    attend, (x, weights) = attend_to(name, lo, hi, S=2048), layer_of(name)
    check(run(attend, x, weights), exact(attend), x, weights)


def test_half_precision():
    attend = attend_to("llama-3.1-8b", 3, 500, S=504, dtype="float16")
    x, weights = layer_of("llama-3.1-8b", "float16")
    check(run(attend, x, weights), exact(attend), x, weights)


def test_a_long_cache():
    attend, (x, weights) = attend_to("llama-3.1-8b", 0, 70_001, S=70_400), layer_of("llama-3.1-8b")
    check(run(attend, x, weights), exact(attend), x, weights)


def test_the_check_sees_a_slot_too_many():
    attend, (x, weights) = attend_to("odd", 0, 40, S=64), layer_of("odd")
    fewer = attend._replace(hi=attend.hi - 1)
    with pytest.raises(AssertionError):
        check(run(fewer, x, weights), exact(attend), x, weights)


def test_repeats_have_equal_bits():
    attend, (x, weights) = attend_to("llama-3.1-8b", 0, 2000, S=2048), layer_of("llama-3.1-8b")

    @jax.jit
    def repeat(attend, x, weights):
        def turn(slots, number):
            *found, slots = fused_layer.run(attend, x, weights, slots, number, EPS)
            return slots, found

        slots = fused_layer.new_slots(attend, weights)
        return jax.lax.scan(turn, slots, jnp.arange(1, 251, dtype=jnp.int32))[1]

    for each in map(np.asarray, repeat(attend, x, weights)):
        assert_same_bits([each], [np.broadcast_to(each[:1], each.shape)])
