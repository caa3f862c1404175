"""GGUF models as a source of weights: layout, types, slices, and tensors that do not fit."""

from __future__ import annotations

import contextlib
import os
import sys
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_writing import (
    ALL,
    SHAPES,
    D,
    F,
    H,
    L,
    ggml_tensors,
    metadata,
    ours,
    random_weights,
    read,
    write,
    write_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from smollm2 import smollm2_gguf
from test_gguf_header import assert_same_as_the_gguf_package

from jaxdecode.checkpoint.gguf_file import open_gguf
from jaxdecode.checkpoint.source import TensorInfo, WeightSource
from jaxdecode.errors import CheckpointError


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "model.gguf"
    weights = write_model(path)
    with open_gguf(path) as source:
        yield source, weights


def test_layout_of_every_parameter(plain):
    source, weights = plain
    for name, shape in SHAPES.items():
        array = read(source, name)
        assert array.shape == shape
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, ours(weights, name), err_msg=name)


def test_what_an_opened_file_says(plain):
    opened, _ = plain
    source: WeightSource = opened
    assert not source.quantised
    assert source.config.dtype == "float32"
    assert source.path.name == "model.gguf"
    assert len(source.tensors) == 3 + 9 * L
    assert source.tensors["blk.1.ffn_down.weight"] == TensorInfo((D, F), "float32", 4 * D * F)


def random_index(rng, shape):
    ends = [sorted(rng.integers(0, size + 1, 2).tolist()) for size in shape]
    return tuple(slice(*pair) for pair in ends)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_slices_equal_the_whole(tmp_path, kind):
    path = tmp_path / "model.gguf"
    write_model(path, Kind[kind])
    rng = np.random.default_rng(0)
    with open_gguf(path) as source:
        for name, shape in SHAPES.items():
            whole = read(source, name)
            assert whole.shape == shape
            for _ in range(20):
                index = random_index(rng, shape)
                np.testing.assert_array_equal(source.read(name, index), whole[index], err_msg=name)


def test_large_tensor_is_read_in_pieces(tmp_path):
    """More numbers than are unpacked at a time, and rows longer than that."""
    for sizes in [(32, 1, 1, 32, 9000, 3, 1), (32, 1, 1, 32, 32, 9001, 1)]:
        weights = random_weights(0, sizes)
        path = tmp_path / "model.gguf"
        values = metadata(
            **{
                "llama.block_count": 1,
                "llama.embedding_length": 32,
                "llama.feed_forward_length": sizes[4],
                "llama.attention.head_count": 1,
                "llama.attention.head_count_kv": 1,
                "tokenizer.ggml.tokens": None,
            }
        )
        write(path, values, ggml_tensors(weights, 1, 1))
        with open_gguf(path) as source:
            np.testing.assert_array_equal(source.read("embed", (ALL, ALL)), weights["embed_tokens"])
            down = weights["layers.0.mlp.down_proj"].T
            np.testing.assert_array_equal(source.read("layers.0.mlp.down", (ALL, ALL)), down)
            part = source.read("layers.0.mlp.down", (slice(17, 40), slice(3, 30)))
            np.testing.assert_array_equal(part, down[17:40, 3:30])


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F16", np.float16), ("BF16", ml_dtypes.bfloat16), ("F32", np.float32)]
)
def test_plain_weights_keep_their_type(tmp_path, kind, dtype):
    path = tmp_path / "model.gguf"
    weights = write_model(path, Kind[kind])
    with open_gguf(path) as source:
        assert not source.quantised
        assert source.config.dtype == np.dtype(dtype).name
        for name in SHAPES:
            expected = ours(weights, name)
            if "norm" not in name:
                expected = expected.astype(dtype)
            assert read(source, name).dtype == expected.dtype
            np.testing.assert_array_equal(read(source, name), expected)


def test_fused_weights_of_two_types_become_float32(tmp_path):
    weights = random_weights()
    tensors = ggml_tensors(weights)
    for name in ("blk.0.attn_k.weight", "blk.1.ffn_up.weight"):
        tensors[name] = (tensors[name].astype(np.float16), Kind.F16)
    path = write(tmp_path / "model.gguf", metadata(), tensors, Kind.BF16)
    with open_gguf(path) as source:
        assert source.config.dtype == "float32"
        assert not source.quantised
        for name, half, dtype in [
            ("layers.0.attn.kv", 0, np.float16),
            ("layers.0.attn.kv", 1, ml_dtypes.bfloat16),
            ("layers.1.mlp.gate_up", 0, ml_dtypes.bfloat16),
            ("layers.1.mlp.gate_up", 1, np.float16),
        ]:
            array, expected = read(source, name), ours(weights, name)[:, half]
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array[:, half], expected.astype(dtype).astype("f4"))


@pytest.mark.parametrize("tied", [False, True])
def test_tied_head(tmp_path, tied):
    path = tmp_path / "model.gguf"
    write_model(path, tied=tied)
    with open_gguf(path) as source:
        assert source.config.tie_embeddings == tied
        with pytest.raises(KeyError, match="output") if tied else contextlib.nullcontext():
            source.read("head", (ALL, ALL))


def test_index_that_does_not_fit(plain):
    source, _ = plain
    with pytest.raises(
        ValueError, match=r"only slices of step 1 can be read, found slice\(0, 4, 2"
    ):
        source.read("embed", (slice(0, 4, 2), ALL))
    with pytest.raises(ValueError, match="zip"):
        source.read("embed", (ALL,))
    with pytest.raises(KeyError, match="nothing"):
        source.read("layers.0.nothing", (ALL,))
    assert source.read("embed", (slice(9, 3), ALL)).shape == (0, D)


@pytest.mark.parametrize("name", ggml_tensors(random_weights()))
def test_each_tensor_must_be_there_in_its_shape(tmp_path, name):
    path = tmp_path / "model.gguf"
    tensors = ggml_tensors(random_weights())
    array = tensors.pop(name)
    missing, renamed = f"1 missing: {name} ", r"1 unexpected: 'new\\n' "
    if name == "token_embd.weight":
        missing = renamed = "no tensor 'token_embd.weight'"
    if name != "output.weight":  # without it the head is tied
        refuse(path, tensors, missing)
    refuse(path, tensors | {"new\n": array}, renamed)
    refuse(path, tensors | {name: array[..., :-2]}, f"of another shape: .*{name} ")


def refuse(path, tensors, words):
    write(path, metadata(), tensors)
    with pytest.raises(CheckpointError, match=words) as caught:
        open_gguf(path)
    assert str(caught.value).isprintable()


def test_the_first_ten_are_listed(tmp_path):
    path = tmp_path / "model.gguf"
    write_model(path, llama__block_count=L + 3)
    words = r"27 missing: blk.2.attn_norm.weight.* and 17 more; the file is damaged"
    with pytest.raises(CheckpointError, match=words):
        open_gguf(path)
    extra = {f"blk.0.attn_{part}.bias": np.ones(H, np.float32) for part in "qkv"}
    write_model(path, extra=extra)
    with pytest.raises(CheckpointError, match=r"3 unexpected: 'blk.0.attn_q.bias'"):
        open_gguf(path)


def test_rotary_tables_of_old_files_are_ignored(tmp_path):
    path = tmp_path / "model.gguf"
    write_model(path, extra={"blk.0.attn_rot_embd.weight": np.ones(H // 2, np.float32)})
    with open_gguf(path) as source:
        assert source.config.rope_scaling is None


def test_a_refused_file_is_closed(tmp_path):
    path = tmp_path / "model.gguf"
    write_model(path, drop=("blk.0.ffn_up.weight",))
    before = len(list(Path("/dev/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(CheckpointError, match="missing"):
            open_gguf(path)
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_nothing_is_read_after_close_or_truncation(tmp_path):
    path = tmp_path / "model.gguf"
    write_model(path)
    source = open_gguf(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="became shorter while it was read; fetch it again"):
        read(source, "layers.1.mlp.gate_up")
    source.close()
    with pytest.raises(ValueError, match="closed file"):
        read(source, "embed")


@pytest.fixture
def fake_tokenizer(monkeypatch):
    tokenizer = types.SimpleNamespace(from_gguf_metadata=lambda meta: meta)
    module = types.SimpleNamespace(Tokenizer=tokenizer)
    monkeypatch.setitem(sys.modules, "jaxdecode.tokenizer", module)


@pytest.mark.usefixtures("fake_tokenizer")
def test_tokenizer_gets_plain_values(plain):
    source, _ = plain
    expected = metadata(tokenizer__ggml__model="gpt2")
    assert source.tokenizer() == {
        key: value for key, value in expected.items() if key.startswith("tokenizer.")
    }


@pytest.mark.usefixtures("fake_tokenizer")
def test_file_without_a_tokenizer(tmp_path):
    path = tmp_path / "model.gguf"
    write_model(path, tokenizer__ggml__tokens=None)
    with open_gguf(path) as source:
        assert source.tokenizer() is None


@settings(max_examples=200)
@given(data=st.data())
def test_mutated_model_is_refused_or_loads(tiny_model, tmp_path_factory, data):
    content, header_bytes = tiny_model
    mutated = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, header_bytes - 1))
        new = data.draw(
            st.sampled_from([1, 4, 8]).flatmap(lambda n: st.binary(min_size=n, max_size=n))
        )
        mutated[position : position + len(new)] = new
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(mutated)
    try:
        source = open_gguf(path)
    except CheckpointError:
        return
    with source:
        assert source.read("embed", (ALL, ALL)).shape[1] == source.config.embed_dim
        for i in range(source.config.num_layers):
            assert source.read(f"layers.{i}.attn.kv", (ALL,) * 4).shape[1] == 2


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "model.gguf"
    sizes = 8, 2, 1, 4, 12, 5, 1
    values = metadata(
        **{
            "llama.block_count": 1,
            "llama.embedding_length": 8,
            "llama.feed_forward_length": 12,
            "llama.attention.head_count": 2,
            "llama.attention.head_count_kv": 1,
            "llama.attention.key_length": 4,
            "llama.attention.value_length": 4,
            "llama.rope.dimension_count": 4,
            "tokenizer.ggml.tokens": ["a"] * 5,
            "tokenizer.ggml.token_type": [1] * 5,
        }
    )
    write(path, values, ggml_tensors(random_weights(0, sizes), 2, 1))
    with open_gguf(path) as source:
        first = min(tensor.offset for tensor in source._header.tensors.values())
    return path.read_bytes(), first


# Weights of layer 0 of SmolLM2 as transformers 5 reads them from the same file, in its order:
# [row, column] of q_proj, k_proj and v_proj.
SMOLLM2 = {
    ("q_proj", 1, 0): -0.1591796875,
    ("q_proj", 40, 7): 0.23419189453125,
    ("q_proj", 575, 100): 0.1810302734375,
    ("k_proj", 1, 0): 0.203369140625,
    ("k_proj", 97, 9): 0.0167236328125,
    ("k_proj", 130, 575): -0.32196044921875,
    ("v_proj", 1, 0): 0.0530853271484375,
    ("v_proj", 97, 9): -0.01495361328125,
}


@pytest.mark.network
def test_smollm2():
    path = smollm2_gguf()
    assert_same_as_the_gguf_package(path)
    with open_gguf(path) as source:
        assert source.quantised
        assert (source.config.num_layers, source.config.head_dim) == (30, 64)
        q, kv = (
            source.read("layers.0.attn.q", (ALL,) * 3),
            source.read("layers.0.attn.kv", (ALL,) * 4),
        )
        rows = {
            "q_proj": q.reshape(576, 576).T,
            "k_proj": kv[:, 0].reshape(576, 192).T,
            "v_proj": kv[:, 1].reshape(576, 192).T,
        }
        for (name, row, column), value in SMOLLM2.items():
            np.testing.assert_allclose(rows[name][row, column], value, rtol=1e-6)
