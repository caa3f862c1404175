"""What decode_attention refuses, in which words, before anything is compiled."""

from __future__ import annotations

import re
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_runs import IMPLEMENTATIONS, count_compiles
from reference import DTYPES

from jaxdecode.pallas_kernels import flash_decode
from jaxdecode.pallas_kernels.decode_attention import decode_attention, explain_attention

pytestmark = pytest.mark.contract

BF16, F16, F32 = (DTYPES[name] for name in ("bfloat16", "float16", "float32"))


def arguments(q=(2, 3, 4, 8), k=(2, 16, 2, 8), v=None, dtypes=(F32, F32, F32), kv_len=5, **options):
    """Keyword arguments of a good call, with shapes, dtypes or options changed."""
    shapes = (q, k, k if v is None else v)
    q, k, v = (np.ones(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    return dict(q=q, k=k, v=v, kv_len=kv_len, **options)


SHAPES = {
    "q_rank_3": (dict(q=(2, 4, 8)), r"q must have 4 dimensions.*\(2, 4, 8\)"),
    "q_rank_5": (dict(q=(1, 2, 3, 4, 8)), r"q must have 4 dimensions.*\(1, 2, 3, 4, 8\)"),
    "k_rank_3": (dict(k=(2, 16, 8), v=(2, 16, 2, 8)), r"k must have 4 dimensions.*\(2, 16, 8\)"),
    "v_rank_3": (dict(v=(2, 16, 8)), r"v must have 4 dimensions.*\(2, 16, 8\)"),
    "v_shorter": (dict(v=(2, 15, 2, 8)), r"k and v .*\(2, 16, 2, 8\).*\(2, 15, 2, 8\)"),
    "v_other_heads": (dict(v=(2, 16, 4, 8)), r"k and v .*\(2, 16, 4, 8\)"),
    "v_other_head_dim": (dict(v=(2, 16, 2, 4)), r"k and v .*\(2, 16, 2, 4\)"),
    "batch": (dict(q=(3, 3, 4, 8)), r"q and k .*\(3, 3, 4, 8\).*\(2, 16, 2, 8\)"),
    "head_dim": (dict(q=(2, 3, 4, 16)), r"q and k .*head_dim.*\(2, 3, 4, 16\)"),
    "heads": (dict(q=(2, 3, 5, 8)), r"num_q_heads=5 must be a multiple of num_kv_heads=2"),
    "fewer_query_heads": (dict(q=(2, 3, 1, 8)), r"num_q_heads=1 .* num_kv_heads=2"),
    "no_query": (dict(q=(2, 0, 4, 8)), r"at least 1.*\(2, 0, 4, 8\)"),
    "no_batch": (dict(q=(0, 3, 4, 8), k=(0, 16, 2, 8)), r"at least 1.*\(0, 3, 4, 8\)"),
    "no_slots": (dict(k=(2, 0, 2, 8)), r"at least 1.*\(2, 0, 2, 8\)"),
    "no_heads": (dict(q=(2, 3, 0, 8)), r"at least 1.*\(2, 3, 0, 8\)"),
    "no_kv_heads": (dict(k=(2, 16, 0, 8)), r"at least 1.*\(2, 16, 0, 8\)"),
    "no_head_dim": (dict(q=(2, 3, 4, 0), k=(2, 16, 2, 0)), r"at least 1.*\(2, 3, 4, 0\)"),
    "sinks_count": (dict(sinks=np.ones(2, F32)), r"sinks must have shape \(4,\).*\(2,\)"),
    "sinks_rank": (dict(sinks=np.ones((1, 4), F32)), r"sinks must have shape \(4,\).*\(1, 4\)"),
    "kv_len_count": (dict(kv_len=np.array([1, 2, 3])), r"kv_len .* shape \(2,\).*\(3,\)"),
    "kv_len_rank": (dict(kv_len=np.array([[1, 2]])), r"kv_len .* shape \(2,\).*\(1, 2\)"),
    "q_start_count": (dict(q_start=np.array([1])), r"q_start .* shape \(2,\).*\(1,\)"),
}

TYPES = {
    "q_k_differ": (dict(dtypes=(F16, BF16, BF16)), r"one dtype.*q float16, k bfloat16"),
    "k_v_differ": (dict(dtypes=(F32, F32, F16)), r"one dtype.*v float16"),
    "float64": (dict(dtypes=(np.float64,) * 3), r"float32.*bfloat16.*float16.*found q float64"),
    "integers": (dict(dtypes=(np.int8,) * 3), r"must be one of .*found q int8"),
    "complex": (dict(dtypes=(np.complex64,) * 3), r"must be one of .*found q complex64"),
    "float8": (dict(dtypes=(F32, *[jnp.float8_e4m3fn] * 2)), r"k float8_e4m3fn"),
    "bool": (dict(dtypes=(np.bool_,) * 3), r"must be one of .*found q bool"),
    "sinks": (dict(sinks=np.ones(4, np.int32)), r"sinks must be one of .*found int32"),
    "kv_len_float": (dict(kv_len=5.0), r"kv_len must be integers.*float64"),
    "kv_len_bool": (dict(kv_len=True), r"kv_len must be integers.*bool"),
    "q_start_float": (dict(q_start=np.ones(2, F32)), r"q_start must be integers.*float32"),
    "out_dtype": (dict(out_dtype=np.int32), r"out_dtype must be one of .*found int32"),
    "scale_text": (dict(scale="1"), r"scale must be a number.*'1'"),
    "scale_bool": (dict(scale=True), r"scale must be a number.*True"),
    "softcap_array": (dict(softcap=np.ones(4)), r"softcap must be a number"),
}

VALUES = {
    "window_zero": (dict(window=0), r"window must be an integer >= 1 or None, found 0"),
    "window_negative": (dict(window=-3), r"window must be .* found -3"),
    "window_float": (dict(window=2.0), r"window must be .* found 2.0"),
    "window_bool": (dict(window=True), r"window must be .* found True"),
    "softcap_zero": (dict(softcap=0.0), r"softcap must be > 0 or None, found 0.0"),
    "softcap_nan": (dict(softcap=float("nan")), r"softcap must be finite, found nan"),
    "scale_inf": (dict(scale=float("inf")), r"scale must be finite, found inf"),
    "num_splits_zero": (dict(num_splits=0), r"num_splits must be .* found 0"),
    "num_splits_with_xla": (dict(num_splits=4, implementation="xla"), r"num_splits=4 .*'xla'"),
    "implementation": (dict(implementation="fast"), r"implementation must be .* found 'fast'"),
}

LENGTHS = {
    "one_past": 17,
    "negative": -1,
    "numpy": np.array([3, 17], np.int32),
    "numpy_negative": np.array([-1, 3]),
    "jax": jnp.array([17, 3]),
    "jax_scalar": jnp.asarray(-(2**31)),
    "wider_than_int32": 2**40,
    "unsigned_64": np.array([2**63, 3], np.uint64),
}


def refuses(error, call, match):
    """The call raises this error with these words, and nothing was compiled before it did."""

    def attempt():
        with pytest.raises(error, match=re.compile(match, re.DOTALL)):
            call()

    assert count_compiles(attempt) == 0


@pytest.mark.parametrize(("changes", "match"), SHAPES.values(), ids=SHAPES)
def test_shapes(changes, match):
    refuses(ValueError, lambda: decode_attention(**arguments(**changes)), match)


@pytest.mark.parametrize(("changes", "match"), TYPES.values(), ids=TYPES)
def test_types(changes, match):
    refuses(TypeError, lambda: decode_attention(**arguments(**changes)), match)


@pytest.mark.parametrize(("changes", "match"), VALUES.values(), ids=VALUES)
def test_values(changes, match):
    refuses(ValueError, lambda: decode_attention(**arguments(**changes)), match)


def test_shape_errors_show_every_shape():
    with pytest.raises(ValueError, match=r"q \(2, 3, 4, 8\), k \(2, 16, 3, 8\), v \(2, 16, 3, 8\)"):
        decode_attention(**arguments(k=(2, 16, 3, 8)))


@pytest.mark.parametrize("kv_len", LENGTHS.values(), ids=LENGTHS)
def test_known_kv_len_outside_the_cache(kv_len):
    call = arguments(kv_len=kv_len)
    refuses(ValueError, lambda: decode_attention(**call), r"kv_len must lie in \[0, 16\].*found")


def test_known_kv_len_inside_a_trace():
    call = arguments(kv_len=17)
    traced = jax.jit(lambda q: decode_attention(**{**call, "q": q}))
    with pytest.raises(ValueError, match=r"kv_len must lie in \[0, 16\].*17"):
        traced(call["q"])


def test_traced_scale_and_window_are_refused():
    call = arguments()
    with pytest.raises(TypeError, match="scale must be a number known at trace time"):
        jax.jit(lambda scale: decode_attention(**call, scale=scale))(1.0)
    with pytest.raises(ValueError, match="window must be an integer"):
        jax.jit(lambda window: decode_attention(**call, window=window))(3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kv_len", [0, 16, np.array([0, 16]), jnp.array([16, 0]), np.uint64(16)])
def test_the_ends_of_the_range_are_allowed(implementation, kv_len):
    out = decode_attention(**arguments(kv_len=kv_len, implementation=implementation))
    assert out.shape == (2, 3, 4, 8)


def test_compiling_would_be_noticed():
    assert (
        count_compiles(lambda: decode_attention(**arguments(q=(2, 3, 4, 24), k=(2, 7, 2, 24)))) > 0
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_explain_names_the_implementation_and_runs_nothing(implementation):
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in arguments().items() if name in ("q", "k", "v")
    }  # fmt: skip
    kv_len = jax.ShapeDtypeStruct((2,), jnp.int32)

    def explain():
        choice = explain_attention(**shapes, kv_len=kv_len, implementation=implementation)
        assert choice.implementation == implementation
        assert str(choice).startswith(f"{implementation}: ")

    assert count_compiles(explain) == 0
    assert explain_attention(**shapes, kv_len=kv_len).implementation == "xla"  # on CPU


@pytest.mark.parametrize(
    "changes", [dict(q=(2, 4, 8)), dict(window=0), dict(implementation="fast")]
)
def test_explain_raises_what_the_call_raises(changes):
    with pytest.raises(ValueError) as called:  # noqa: PT011
        decode_attention(**arguments(**changes))
    with pytest.raises(ValueError, match=re.escape(str(called.value))):
        explain_attention(**arguments(**changes))


def test_a_gpu_that_cannot_run_the_kernels_is_said_once(monkeypatch):
    q, k = jnp.ones((1, 1, 2, 8)), jnp.ones((1, 16, 2, 8))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: "it is of another make")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            decode_attention(q, k, k, 5)
        decode_attention(q, k, k, 5, implementation="xla")
    assert [str(warning.message) for warning in said] == [
        "decode_attention runs its portable implementation on this GPU: it is of another make"
    ]
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: None)
    decode_attention(q, k, k, 5)  # a warning would be an error here


NEEDED = "the kernels need an NVIDIA Hopper GPU"
NOT_9 = f"{NEEDED} (compute capability 9.0), and"
OLD = "GPU kernels need Python >= 3.12 and jax >= 0.11.2, this is jax"
# jax, backend, the GPU's name and compute capability, and what is said of them.
NOT_HERE = {
    "old jax": ("0.10.2", "gpu", "H200", "9.0", f"{OLD} 0.10.2"),
    "the last too old": ("0.11.1", "gpu", "H200", "9.0", f"{OLD} 0.11.1"),
    "old jax and GPU": ("0.10.2", "gpu", "T4", "7.5", f"{NOT_9} T4 has 7.5"),
    "old jax and AMD": ("0.10.2", "gpu", "MI300X", None, f"{NOT_9} MI300X has unknown"),
    "Turing": ("0.11.2", "gpu", "T4", "7.5", f"{NOT_9} T4 has 7.5"),
    "Ampere": ("0.12.0", "gpu", "A100", "8.0", f"{NOT_9} A100 has 8.0"),
    "small Ampere": ("0.11.2", "gpu", "A10", "8.6", f"{NOT_9} A10 has 8.6"),
    "Blackwell": ("0.11.2", "gpu", "B200", "10.0", f"{NOT_9} B200 has 10.0"),
    "AMD": ("0.11.2", "gpu", "MI300X", None, f"{NOT_9} MI300X has unknown"),
    "TPU": ("0.11.2", "tpu", "TPU v5", None, f"{NEEDED}, and JAX runs on tpu"),
    "TPU, old jax": ("0.10.2", "tpu", "TPU v5", None, f"{NEEDED}, and JAX runs on tpu"),
}


@pytest.fixture
def pretend(monkeypatch):
    """pretend(jax, backend, device, capability): what this process seems to run on."""

    def patch(version, backend, kind, capability):
        device = types.SimpleNamespace(device_kind=kind)
        if capability is not None:
            device.compute_capability = capability
        monkeypatch.setattr(jax, "__version__", version)
        monkeypatch.setattr(jax, "__version_info__", tuple(map(int, version.split("."))))
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        monkeypatch.setattr(jax, "devices", lambda platform: {backend: [device]}[platform])

    return patch


def served():
    """q, k and v that the kernels take."""
    return (jnp.ones(shape, BF16) for shape in ((1, 1, 2, 64), (1, 64, 1, 64), (1, 64, 1, 64)))


@pytest.mark.parametrize("name", NOT_HERE)
def test_where_the_kernels_cannot_run_is_said(pretend, name):
    *machine, reason = NOT_HERE[name]
    q, k, v = served()
    pretend(*machine)
    assert flash_decode.why_not_here() == reason
    expected = f"xla: the portable implementation; {reason}"
    assert str(explain_attention(q, k, v, 5)) == expected
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(2):
            out = decode_attention(q, k, v, 5)
    np.testing.assert_array_equal(out, v[:, :1].repeat(2, axis=2))
    warning = f"decode_attention runs its portable implementation on this GPU: {reason}"
    assert [str(x.message) for x in said] == ([warning] if "gpu" in machine else [])
    for asked in ({"implementation": "flash_decode"}, {"num_splits": 2}):
        match = f"^flash_decode cannot serve this call: {re.escape(reason)}; leave out "
        with pytest.raises(NotImplementedError, match=match):
            decode_attention(q, k, v, 5, **asked)


@pytest.mark.parametrize("version", ["0.11.2", "0.12.0.1", "1.0.0"])
def test_on_hopper_the_kernels_run(pretend, version):
    q, k, v = served()
    pretend(version, "gpu", "H200", "9.0")
    assert flash_decode.why_not_here() is None
    assert explain_attention(q, k, v, 5).implementation == "flash_decode"
