"""A layer in one kernel that begins with its attention.

The letters are those of fused_layer.py; S is the capacity of the cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from test_fused_layer import (
    EPS,
    MODELS,
    distance,
    gradient,
    kernels_in,
    operands,
    plainly,
    pretend_gpu,
    structs,
    traced,
    with_kernels,
)

from jaxdecode.pallas_kernels import fused_layer, xla
from jaxdecode.pallas_kernels.fused_layer import Attend
from jaxdecode.pallas_kernels.layer_config import layer_config

__all__ = ["pretend_gpu", "traced"]  # fixtures

H = 128
# Models whose heads can be those of the kernel, with their KV heads.
HEADS = {"llama-3.1-8b": 8, "codellama-34b": 8, "llama-2-7b": 32, "odd": 2, "few": 8}


def attend_to(name: str, lo: int, hi: int, S: int = 256, dtype="bfloat16", seed: int = 0) -> Attend:
    """Queries, a cache of random values, and NaN wherever they do not see."""
    N, K = MODELS[name][2] // H, HEADS[name]
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (1, 1, N, H), (1, S, K, H), (1, S, K, H)
    q, k, v = (
        jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)
    )
    slot = jnp.arange(S)[None, :, None, None]
    k, v = (jnp.where((slot >= lo) & (slot < hi), x, jnp.nan) for x in (k, v))
    return Attend(q, k, v, *(jnp.full((1, 1), x, jnp.int32) for x in (lo, hi)))


def attended_of(attend: Attend):
    """What the heads find, [N * H] float32."""
    return xla.attend(*attend, scale=H**-0.5)[0].reshape(-1)


def layer_of(name: str, dtype="bfloat16"):
    """x and weights."""
    return operands(name, dtype)[1:]


def run_once(attend, x, weights):
    """x and the projections."""
    return fused_layer.run(attend, x, weights, fused_layer.new_slots(attend, weights), 1, EPS)[:2]


@pytest.mark.parametrize(("lo", "hi"), [(0, 256), (0, 1), (70, 199), (0, 0)])
def test_attends_as_apart(traced, lo, hi):
    attend, (x, weights) = attend_to("odd", lo, hi), layer_of("odd")
    attended = attended_of(attend).astype(x.dtype)
    for found, expected in zip(
        run_once(attend, x, weights), plainly(attended, x, weights), strict=True
    ):
        assert distance(found, expected) <= 2e-3


def test_gradient_is_that_of_the_plain_formula(traced):
    attend, (x, weights) = attend_to("odd", 0, 256), layer_of("odd")

    def apart(attend, x, weights):
        return plainly(attended_of(attend).astype(x.dtype), x, weights)

    def of_floats(call):
        def on_floats(floats, x, weights):
            return call(Attend(*floats, *attend[3:]), x, weights)

        return jax.tree.leaves(gradient(on_floats, attend[:3], x, weights))

    for one, other in zip(of_floats(run_once), of_floats(apart), strict=True):
        assert jnp.abs(other).max() > 1e-4
        assert distance(one, other) <= 1e-2


@pytest.mark.parametrize("name", HEADS)
def test_memory_is_as_large_as_what_is_put_there(name):
    K = HEADS[name]
    config = layer_config(*MODELS[name], EPS, 132, K)
    plain = layer_config(*MODELS[name], EPS, 132)
    NH = MODELS[name][2]
    heads, chunks, kinds, columns = config.chunks_shape
    assert (heads * columns, chunks, kinds) == (NH, 132 // K, 2)
    # A result and a log-sum-exp in float32 for each column, and the turn beside; then the vector.
    assert config.slots == (2 * 2 * NH * (132 // K), NH, *plain.slots[2:])
    assert plain.slots[:2] == (0, 0)
    assert config.stages == plain.stages
    # What attention needs has room where the multiplied vector will be, or beside the ring.
    attention = config.attention
    needed = 2 * attention.rows * (H + attention.block_kv)
    used = 2 * (config.stages * 64 * 128 + config.width) + max(2 * config.widest, needed)
    assert used + 4 * 2 * 128 + 16 * config.stages + 8 < 227 * 1024 - 2048


def cache(K: int, dtype="bfloat16", H: int = H, S: int = 256):
    return jax.ShapeDtypeStruct((1, S, K, H), jnp.dtype(dtype))


@pytest.mark.parametrize(
    ("heads", "keys", "can"),
    [
        (32, cache(8), True),
        (64, cache(8), True),
        (32, cache(32), True),
        (32, cache(2), False),  # 16 heads of a KV head
        (24, cache(8), False),  # 3 of them: some lie in two rows of tiles
        (4, cache(1), False),
        (32, cache(8, "float32"), False),
        (32, cache(8, "float16"), False),
        (32, cache(8, H=64), False),
        (32, cache(8, S=252), False),
    ],
)
def test_which_heads_attend_in_the_kernel(pretend_gpu, heads, keys, can):
    q = jax.ShapeDtypeStruct((1, 1, heads, keys.shape[3]), jnp.bfloat16)
    assert fused_layer.can_attend(structs("llama-3.1-8b")[2], q, keys) == can


@with_kernels
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", fused_layer.DTYPES)
def test_lowers_for_cuda(pretend_gpu, name, dtype):
    shapes = jax.eval_shape(lambda: (attend_to(name, 0, 9, dtype=dtype), *layer_of(name, dtype)))
    assert fused_layer.can_attend(shapes[2], shapes[0].q, shapes[0].keys)
    assert kernels_in(run_once, *shapes) == (1, 1)
