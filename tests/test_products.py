"""The products of attention in all their forms, on a CPU, and which of them a GPU is given."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from kernel_runs import lowered_for_cuda
from meshes import make_mesh
from reference import Case, assert_close, low_precision_attention, make_case, reference_attention

from jaxdecode.pallas_kernels import xla
from jaxdecode.pallas_kernels.decode_attention import visible_ranges
from jaxdecode.pallas_kernels.products import ALL_HEADS, PLAIN, SUMMED, best_products

pytestmark = pytest.mark.contract

FORMS = {"plain": PLAIN, "summed": SUMMED, "all_heads": ALL_HEADS}
HEADS = [(4, 4), (12, 3), (14, 2), (3, 1)]
DTYPES = ["float32", "float16", "bfloat16"]
S = 200
LENGTHS = [0, 1, 64, 130, 200]


# The plain one is what the contract suite runs on a CPU.
@pytest.fixture(params=["summed", "all_heads"])
def form(request):
    return FORMS[request.param]


@functools.partial(jax.jit, static_argnames=("form", "block", "window", "softcap"))
def attend(q, k, v, kv_len, *, form, block, window, softcap):
    lo, hi = visible_ranges(kv_len, 1, k.shape[1], window=window)
    return xla._forward(q, k, v, lo, hi, q.shape[-1] ** -0.5, softcap, block, False, form)


def run(case: Case, form, *, block=S, window=None, softcap=None):
    arrays = [jnp.asarray(x) for x in dataclasses.astuple(case)]
    results = attend(*arrays, form=form, block=block, window=window, softcap=softcap)
    return [np.asarray(x) for x in results]


def check(case: Case, form, *, block=S, **options):
    inputs = dataclasses.astuple(case)
    out, lse = run(case, form, block=block, **options)
    ref, ref_lse = reference_attention(*inputs, **options)
    low = low_precision_attention(*inputs, **options, out_dtype="float32")
    assert_close(out, ref, low, case.q.dtype, lse=lse, ref_lse=ref_lse)


def decode_case(heads=(12, 3), dtype="float32", **options) -> Case:
    return make_case(LENGTHS, 1, *heads, S=S, dtype=dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS, ids="N{0[0]}-K{0[1]}".format)
def test_a_decode_step(form, heads, dtype):
    check(decode_case(heads, dtype), form)


@pytest.mark.parametrize("options", [{"block": 64}, {"window": 50}, {"softcap": 3.0}], ids=str)
def test_options(form, options):
    check(decode_case(), form, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dead", [(np.nan, np.inf), (-np.inf, np.nan)], ids=str)
def test_dead_slots_never_matter(form, dtype, dead):
    case = decode_case(dtype=dtype)
    for block in (64, S):
        got = run(case.with_dead_slots(*dead), form, block=block)
        expected = run(case.with_dead_slots(0, 0), form, block=block)
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_value_that_is_not_finite_shows_in_its_own_head_only(form):
    case = decode_case()
    clean, _ = run(case, form)
    case.v[2, 60, 1] = np.nan
    out, _ = run(case, form)
    expected = clean.copy()
    expected[2, 0, 4:8, :] = np.nan
    np.testing.assert_array_equal(out, expected)


def shapes(B, T, N, K, dtype="bfloat16", capacity=640, place=None):
    """q, k, v and two limits, none of which is made."""
    q, kv = (
        jax.ShapeDtypeStruct((B, *x, 64), dtype, sharding=place) for x in ((T, N), (capacity, K))
    )
    limit = jax.ShapeDtypeStruct((B, T), jnp.int32)
    return q, kv, kv, limit, limit


@pytest.mark.parametrize(
    ("sizes", "dtype", "name"),
    [
        ((1, 1, 32, 32), "bfloat16", "plain"), ((16, 1, 8, 1), "bfloat16", "plain"),
        ((16, 2, 32, 32), "bfloat16", "plain"), ((2, 1, 32, 32), "bfloat16", "summed"),
        ((16, 1, 32, 8), "float16", "summed"), ((16, 1, 64, 8), "bfloat16", "all_heads"),
        ((16, 1, 64, 8), "float32", "summed"),
    ],
    ids=str,
)  # fmt: skip
def test_the_form_for_a_gpu(sizes, dtype, name):
    q, k, *_ = shapes(*sizes, dtype)
    chosen = []
    jax.eval_shape(lambda q, k: chosen.append(best_products(q, k)), q, k)
    assert chosen == [FORMS[name]]


# On a GPU, products of cache and queries that have both sequences and KV heads as batch dimensions,
# [B, s, K, H] -> [B, K, s, H], copy the cache.
def copying_products(hlo: str) -> list[str]:
    return re.findall(r"dot_general.*batching_dims = \[\d, \d\].*", hlo)


attend_all = functools.partial(xla.attend, scale=0.1)


@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (64, 8)], ids="N{0[0]}-K{0[1]}".format)
@pytest.mark.parametrize("capacity", [640, 2**20], ids=["whole", "in parts"])
def test_a_decode_step_for_a_gpu_takes_the_cache_as_it_lies(heads, capacity):
    hlo = lowered_for_cuda(attend_all, *shapes(4, 1, *heads, capacity=capacity))
    assert copying_products(hlo) == []
    assert hlo.count("@LayoutConstraint") == 2  # keys and values
    assert ("stablehlo.while" in hlo) == (capacity > 640)
    assert len(copying_products(lowered_for_cuda(attend_all, *shapes(4, 2, *heads)))) >= 2


def test_a_cpu_keeps_the_plain_form():
    hlo = jax.jit(attend_all).lower(*shapes(4, 1, 8, 8)).as_text()
    assert len(copying_products(hlo)) == 2
    assert "LayoutConstraint" not in hlo


@pytest.mark.parametrize("heads", [(8, 8), (64, 8)], ids="N{0[0]}-K{0[1]}".format)
def test_heads_that_are_explicitly_sharded(heads):
    mesh = make_mesh((2, 2), ("data", "tensor"), kind=AxisType.Explicit)
    place = jax.NamedSharding(mesh, P("data", None, "tensor"))
    hlo = lowered_for_cuda(attend_all, *shapes(4, 1, *heads, place=place))
    assert "LayoutConstraint" in hlo
