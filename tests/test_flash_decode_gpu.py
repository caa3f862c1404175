"""The split-KV kernels on a GPU: a grid of shapes and options, and what only real hardware shows.

All go through the door. The oracle is float64 NumPy; it computes a KV head at a time, because the
loops of reference.py would take minutes at these lengths. test_gpu_oracle.py holds it against them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import covering
from gpu_oracle import attention_oracle
from reference import DTYPES, Case, assert_close, low_precision_attention, make_case

from jaxdecode.pallas_kernels import decode_attention, flash_decode

pytestmark = pytest.mark.gpu

HEAD_DIMS = (64, 80, 96, 128, 192, 256)


def refusal(head_dim: int, dtype: str) -> str | None:
    """Why the kernels do not take this head_dim and dtype."""
    q = jax.ShapeDtypeStruct((1, 1, 8, head_dim), dtype)
    return flash_decode.why_not(q, jax.ShapeDtypeStruct((1, 128, 8, head_dim), dtype))


# By name, the capacity and the length of each sequence: around the edges of tiles, empty, full,
# far below the capacity, and long.
LENGTHS = {
    "one tile": (72, (1, 15, 63, 64, 65)),
    "two tiles": (136, (127, 128)),
    "three tiles": (256, (129, 0, 256)),
    "sixteen": (1000, (1, 15, 63, 64, 65, 127, 128, 129, 0, 1000, 999, 500, 300, 200, 100, 17)),
    "thousand": (1000, (1000,)),
    "pages": (4096, (4095, 4096)),
    "nearly empty": (65536, (1000,)),
    "long": (32768, (8191, 32768)),
    "longest": (131072, (131072,)),
}
DIMENSIONS = {
    "heads": ((8, 8), (8, 1), (32, 8), (9, 3), (64, 8), (28, 4), (71, 1)),
    "lengths": tuple(LENGTHS),
    "num_splits": (None, 1, 2, 3, 5, 17, 64),
    "head_dim": tuple(d for d in HEAD_DIMS if refusal(d, "bfloat16") is None),
    "T": (1, 2, 4, 5, 16),
    "dtype": tuple(d for d in DTYPES if refusal(128, d) is None),
    "softcap": (None, 30.0),
    "window": (None, 256),
    "sinks": (False, True),
}
# Twice, so that more than pairs meet.
GRID = covering(DIMENSIONS) + covering({name: x[::-1] for name, x in DIMENSIONS.items()})
REFUSED = [(d, x) for d in HEAD_DIMS for x in DTYPES if refusal(d, x) is not None]


def name_of(x: dict) -> str:
    N, K = x["heads"]
    options = [name for name in ("softcap", "window", "sinks") if x[name]]
    shape = f"{x['lengths']}, {N}/{K} heads of {x['head_dim']}, T {x['T']}"
    return ", ".join([shape, f"{x['num_splits'] or 'auto'} splits", x["dtype"], *options])


@functools.partial(
    jax.jit,
    static_argnames=("num_splits", "window", "softcap", "scale", "out_dtype", "implementation"),
)
def attend(q, k, v, kv_len, *, implementation="flash_decode", **options):
    """(out, lse) of the kernels."""
    return decode_attention(
        q, k, v, kv_len, implementation=implementation, return_lse=True, **options
    )


def arrays(case: Case):
    return [jnp.asarray(x) for x in (case.q, case.k, case.v, case.kv_len)]


def inputs(B, S, N, K, T=1, H=128, seed=0, dtype=jnp.bfloat16):
    """Random inputs made on the device, every sequence full."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def check(case: Case, **options) -> None:
    """Runs the kernels and holds out and lse against the oracle."""
    num_splits = options.pop("num_splits", None)
    on_device = options | ({"sinks": jnp.asarray(options["sinks"])} if "sinks" in options else {})
    out, lse = attend(*arrays(case), num_splits=num_splits, out_dtype="float32", **on_device)
    ref, ref_lse = attention_oracle(case.q, case.k, case.v, case.kv_len, **options)
    low = low_precision_attention(
        case.q, case.k, case.v, case.kv_len, **options, out_dtype=np.float32
    )
    assert_close(np.asarray(out), ref, low, case.q.dtype, lse=np.asarray(lse), ref_lse=ref_lse)
    np.testing.assert_array_equal(np.asarray(out)[np.isneginf(ref_lse)], 0)


@pytest.mark.parametrize("x", GRID, ids=name_of)
def test_grid(x):
    S, kv_len = LENGTHS[x["lengths"]]
    N, K = x["heads"]
    case = make_case(
        kv_len, x["T"], N, K, x["head_dim"], S=S, dtype=x["dtype"], edge=64 if S < 2000 else 1024
    ).with_dead_slots(np.nan, np.nan)
    options = {name: x[name] for name in ("num_splits", "softcap", "window")}
    if x["sinks"]:
        options["sinks"] = np.random.default_rng(1).normal(size=N).astype(np.float32)
    check(case, **options)


@pytest.mark.filterwarnings("ignore")  # that the portable implementation serves it may be said
@pytest.mark.parametrize(("head_dim", "dtype"), REFUSED)
def test_what_the_kernels_refuse_runs_elsewhere(head_dim, dtype):
    case = make_case((100, 37), 1, 8, 2, head_dim, S=128, dtype=dtype)
    with pytest.raises(NotImplementedError, match="flash_decode cannot serve this call"):
        attend(*arrays(case))
    out = decode_attention(*arrays(case), out_dtype=jnp.float32)
    ref, _ = attention_oracle(case.q, case.k, case.v, case.kv_len)
    low = low_precision_attention(case.q, case.k, case.v, case.kv_len, out_dtype=np.float32)
    assert_close(np.asarray(out), ref, low, case.q.dtype)


def test_the_check_notices_a_lost_token():
    case = make_case((1000,), 1, 8, 2, 128, S=1024, dtype="bfloat16")
    check(case)
    short = Case(case.q, case.k, case.v, case.kv_len - 1)
    out, _ = attend(*arrays(short), out_dtype="float32")
    ref, _ = attention_oracle(case.q, case.k, case.v, case.kv_len)
    low = low_precision_attention(case.q, case.k, case.v, case.kv_len, out_dtype=np.float32)
    with pytest.raises(AssertionError, match="max error"):
        assert_close(np.asarray(out), ref, low, case.q.dtype)


@pytest.mark.parametrize("num_splits", [None, 5])
def test_repeats_are_bit_equal(num_splits):
    q, k, v = inputs(60, 2048, 16, 2)
    kv_len = jnp.arange(60, dtype=jnp.int32) * 34 + 5
    first = attend(q, k, v, kv_len, num_splits=num_splits)
    for _ in range(250):
        again = attend(q, k, v, kv_len, num_splits=num_splits)
        assert all(bool((x == y).all()) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("T", "heads", "num_splits", "dtype"),
    [
        (1, (32, 4), 6, "bfloat16"),
        (1, (9, 3), 17, "bfloat16"),
        (4, (9, 3), 1, "float16"),
        (4, (9, 3), 17, "float16"),
    ],
)
def test_rows_do_not_depend_on_the_batch(T, heads, num_splits, dtype):
    q, k, v = inputs(16, 8192, *heads, T, dtype=dtype)
    kv_len = jnp.asarray([8192, 0, 1, 63, 64, 65, 4096, 8191] * 2, jnp.int32)
    whole = attend(q, k, v, kv_len, num_splits=num_splits)

    def check_rows(rows):
        some = attend(*(x[rows] for x in (q, k, v, kv_len)), num_splits=num_splits)
        for x, y in zip(some, whole, strict=True):
            np.testing.assert_array_equal(x, y[rows])

    for row in range(16):
        check_rows(slice(row, row + 1))
    check_rows(slice(None, None, -1))


@pytest.mark.parametrize("capacity", [2048, 32768])
def test_result_does_not_depend_on_the_capacity(capacity):
    q, k, v = inputs(2, 1024, 16, 2)
    kv_len = jnp.asarray([1024, 1000], jnp.int32)
    padding = [(0, 0), (0, capacity - 1024), (0, 0), (0, 0)]
    more = [jnp.pad(x, padding, constant_values=jnp.nan) for x in (k, v)]
    for x, y in zip(
        attend(q, k, v, kv_len, num_splits=7), attend(q, *more, kv_len, num_splits=7), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def test_dead_slots_change_no_bit():
    case = make_case((1, 0, 63, 64, 1000), 4, 16, 2, 128, S=1024, dtype="bfloat16")
    zeros = attend(*arrays(case.with_dead_slots(0.0, 0.0)))
    for dead in ((np.nan, np.nan), (np.inf, -np.inf), (3e38, 3e38)):
        for x, y in zip(attend(*arrays(case.with_dead_slots(*dead))), zeros, strict=True):
            np.testing.assert_array_equal(x, y)


def test_offsets_past_two_to_the_31():
    """The last row lies past 2^31 elements: a 32-bit offset would read the first one."""
    B, S, K, H = 3, 2**20, 8, 128
    k = jnp.zeros((B, S, K, H), jnp.bfloat16).at[B - 1].set(1.0)
    q = jnp.ones((B, 1, K, H), jnp.bfloat16)
    out, _ = attend(q, k, k, jnp.asarray([1, 1, S], jnp.int32), out_dtype="float32")
    assert out[0, 0, 0, 0] == 0.0
    assert abs(out[B - 1, 0, 0, 0] - 1.0) < 1e-6


def test_sixteen_million_tokens():
    """Slots past 2^24 are no float32 integers any more."""
    S = 2**24 + 64
    v = jnp.zeros((1, S, 1, 128), jnp.bfloat16).at[0, S - 3].set(1.0)
    k = v * 40
    q = jnp.ones((1, 1, 1, 128), jnp.bfloat16)
    for kv_len, expected in ((S, 1.0), (S - 2, 1.0), (S - 3, 0.0)):
        out, _ = attend(q, k, v, jnp.asarray([kv_len], jnp.int32), out_dtype="float32")
        np.testing.assert_allclose(out[0, 0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_extreme_logits(dtype):
    """Logits of 65536 and of 0: one-hot and uniform weights, without inf or NaN."""
    S = 256
    k = np.zeros((2, S, 1, 128), np.float32)
    k[0, :, 0, 0] = np.linspace(-1, 1, S)
    k[0, 17, 0, 0] = 2.0
    v = np.random.default_rng(0).normal(size=k.shape)
    q = np.zeros((2, 1, 8, 128), np.float32)
    q[..., 0] = 2.0**15
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    out, lse = attend(q, k, v, jnp.full(2, S), scale=1.0, out_dtype="float32")
    np.testing.assert_allclose(out[0, 0], jnp.tile(v[0, 17].astype(jnp.float32), (8, 1)), atol=1e-6)
    mean = v[1].astype(jnp.float32).mean(axis=0)
    np.testing.assert_allclose(out[1, 0], jnp.tile(mean, (8, 1)), atol=2e-3)
    np.testing.assert_allclose(lse[:, 0], [[2.0**16] * 8, [np.log(S)] * 8], rtol=1e-5)


def test_one_program_serves_every_length():
    q, k, v = inputs(1, 4096, 16, 2)

    @jax.jit
    def sweep(lengths):
        return jax.lax.map(lambda n: attend(q, k, v, n[None])[0][0], lengths)

    lengths = jnp.asarray([1, 64, 65, 1000, 4095, 4096], jnp.int32)
    for row, length in zip(sweep(lengths), lengths, strict=True):
        np.testing.assert_array_equal(row, attend(q, k, v, length[None])[0][0])


def test_vmap_is_one_call_of_a_larger_batch():
    q, k, v = inputs(3, 1024, 16, 2)
    kv_len = jnp.asarray([1024, 5, 0], jnp.int32)
    call = functools.partial(attend, num_splits=4)
    rows, lses = jax.vmap(call)(*(x[:, None] for x in (q, k, v, kv_len)))
    out, lse = call(q, k, v, kv_len)
    np.testing.assert_array_equal(rows[:, 0], out)
    np.testing.assert_array_equal(lses[:, 0], lse)


def test_gradient_is_that_of_the_portable_implementation():
    q, k, v = inputs(2, 512, 8, 2, T=2)
    kv_len = jnp.asarray([512, 100], jnp.int32)

    def loss(implementation, q, k, v):
        out, lse = attend(q, k, v, kv_len, implementation=implementation, out_dtype="float32")
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse**2)

    found, expected = (
        jax.grad(functools.partial(loss, name), (0, 1, 2))(q, k, v)
        for name in ("flash_decode", "xla")
    )
    for x, y in zip(found, expected, strict=True):
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        assert np.linalg.norm(x - y) <= 0.02 * np.linalg.norm(y)
