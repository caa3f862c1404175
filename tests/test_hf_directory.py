"""Hugging Face model directories as a source of weights."""

from __future__ import annotations

import dataclasses
import os

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file
from tiny_hf import (
    BFLOAT16,
    TINY,
    assert_same_params,
    bits,
    hf_tensors,
    our_params,
    write_model,
)

from jaxdecode.checkpoint import hf_layout
from jaxdecode.checkpoint.arrays import load_params
from jaxdecode.checkpoint.hf_directory import open_hf_directory
from jaxdecode.checkpoint.source import WeightSource
from jaxdecode.errors import CheckpointError, ConfigError
from jaxdecode.models.params import param_shapes

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
TIED = dataclasses.replace(TINY, tie_embeddings=True)


def read_all(source):
    return {
        name: source.read(name, (slice(None),) * len(shape))
        for name, shape in param_shapes(source.config).items()
    }


def test_every_weight(tmp_path):
    source: WeightSource = open_hf_directory(write_model(tmp_path))
    assert source.config == TINY
    assert (source.path, source.quantised) == (tmp_path, False)
    assert source.tensors[HEAD].shape == (40, 16)
    assert source.tokenizer() is None
    assert_same_params(read_all(source), our_params(hf_tensors()))
    source.close()


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
def test_every_dtype(tmp_path, dtype, shards):
    tensors = hf_tensors(dtype=dtype)
    # What config.json says of the dtype is not what counts.
    source = open_hf_directory(write_model(tmp_path, tensors=tensors, shards=shards))
    assert source.config.dtype == np.dtype(dtype).name
    assert_same_params(read_all(source), our_params(tensors))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_hf_directory(write_model(tmp_path_factory.mktemp("model")))


@given(data=st.data(), name=st.sampled_from(list(param_shapes(TINY))))
def test_any_slice(source, data, name):
    whole = our_params(hf_tensors())[name]
    index = []
    for size in whole.shape:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    np.testing.assert_array_equal(source.read(name, tuple(index)), whole[tuple(index)])


def test_slices_that_make_no_sense(source):
    with pytest.raises(ValueError, match="one slice of step 1 for each axis"):
        source.read("embed", (slice(0, 4, 2), slice(None)))
    with pytest.raises(ValueError, match="one slice of step 1 for each axis"):
        source.read("embed", (slice(0, 4),))


@pytest.mark.parametrize(
    ("name", "index", "num_bytes"),
    [
        ("embed", (slice(3, 5), slice(0, 16)), 2 * 16),
        ("layers.0.attn.q", (slice(0, 16), slice(1, 2), slice(0, 6)), 6 * 16),
        ("layers.0.attn.q", (slice(2, 4), slice(0, 4), slice(0, 6)), 24 * 2),
        ("layers.1.attn.kv", (slice(0, 16), slice(1, 2), slice(0, 1), slice(0, 6)), 6 * 16),
        ("layers.1.attn.o", (slice(3, 4), slice(0, 6), slice(0, 8)), 8 * 6),
        # Some dimensions of each head.
        ("layers.0.attn.q", (slice(0, 16), slice(0, 4), slice(2, 3)), 4 * 16),
        ("layers.1.attn.kv", (slice(0, 8), slice(0, 2), slice(1, 2), slice(3, 6)), 2 * 3 * 8),
        ("layers.1.attn.o", (slice(1, 4), slice(0, 3), slice(0, 16)), 3 * 3 * 16),
        ("layers.0.mlp.gate_up", (slice(0, 16), slice(0, 2), slice(0, 12)), 2 * 12 * 16),
        ("layers.0.mlp.down", (slice(0, 8), slice(0, 16)), 16 * 8),
        ("head", (slice(0, 16), slice(7, 8)), 16),
    ],
)
def test_slices_read_only_their_own_bytes(tmp_path, name, index, num_bytes):
    source = open_hf_directory(write_model(tmp_path))
    source.read(name, index)
    (file,) = set(source._files.values())
    assert file._num_bytes_read == 4 * num_bytes


def damaged(tmp_path, tensors, config=TINY, **changes):
    with pytest.raises(CheckpointError) as caught:
        open_hf_directory(write_model(tmp_path, config, tensors, **changes))
    message = str(caught.value)
    assert message.isprintable()
    assert str(tmp_path) in message
    return message


@pytest.mark.parametrize("name", hf_tensors())
def test_any_tensor_missing_renamed_or_of_another_shape(tmp_path, name):
    whole = hf_tensors()
    rest = {key: array for key, array in whole.items() if key != name}
    shape = whole[name].shape
    assert f"1 missing: {name} {shape};" in damaged(tmp_path, rest)

    message = damaged(tmp_path, rest | {f"{name}.old": whole[name]})
    assert f"1 missing: {name} {shape}; 1 unexpected: {name}.old {shape};" in message

    wrong = (*shape[:-1], shape[-1] + 1)
    message = damaged(tmp_path, rest | {name: np.zeros(wrong, np.float32)})
    assert f"1 of another shape: {name} {wrong}, expected {shape};" in message
    turned = np.ascontiguousarray(whole[name][None])
    assert f"{name} {turned.shape}, expected {shape}" in damaged(tmp_path, rest | {name: turned})

    message = damaged(tmp_path, rest | {name: whole[name].astype(np.int8)})
    assert f"{name} is stored as int8, supported are float32, bfloat16, float16" in message


def test_first_ten_problems_of_each_kind(tmp_path):
    tensors = hf_tensors()
    message = damaged(tmp_path, tensors, num_hidden_layers=4)
    assert "18 missing: model.layers.2.input_layernorm.weight (16,)," in message
    assert "and 8 more" in message
    message = damaged(tmp_path, tensors, num_hidden_layers=1)
    assert "9 unexpected" in message
    assert "more" not in message
    assert "of another shape" in damaged(tmp_path, tensors, hidden_size=32)
    assert len(damaged(tmp_path, tensors, num_hidden_layers=4096)) < 2000


def test_names_of_strangers_stay_harmless(tmp_path):
    tensors = hf_tensors() | {"\x1b[2J" + "x" * 5000: np.zeros(1, np.float32)}
    assert len(damaged(tmp_path, tensors)) < 1000


def test_tied_model(tmp_path):
    tensors = hf_tensors(TIED)
    source = open_hf_directory(write_model(tmp_path / "without", TIED, tensors))
    assert source.config.tie_embeddings
    assert_same_params(read_all(source), our_params(tensors, TIED))
    # Some tied models carry the head once more.
    twice = tensors | {HEAD: tensors[EMBED]}
    source = open_hf_directory(write_model(tmp_path / "with", TIED, twice))
    assert_same_params(read_all(source), our_params(tensors, TIED))


def test_tied_model_with_another_head(tmp_path):
    tensors = hf_tensors(TIED)
    other = hf_tensors(TINY, seed=1)[HEAD]
    message = damaged(tmp_path, tensors | {HEAD: other}, TIED)
    assert "lm_head.weight differs from model.embed_tokens.weight" in message
    assert "set tie_word_embeddings to false" in message
    assert "1 unexpected: lm_head.weight (4, 4)" in damaged(
        tmp_path, tensors | {HEAD: np.zeros((4, 4), np.float32)}, TIED
    )


def test_untied_model_without_head(tmp_path):
    message = damaged(tmp_path, hf_tensors(TIED), TINY)
    assert "1 missing: lm_head.weight (40, 16)" in message
    assert "set tie_word_embeddings to true" in message


def test_rotary_buffers_are_ignored(tmp_path):
    buffers = {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32) for i in range(2)
    }
    source = open_hf_directory(write_model(tmp_path, tensors=hf_tensors() | buffers))
    assert_same_params(read_all(source), our_params(hf_tensors()))


def test_biases_are_not_dropped_silently(tmp_path):
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(24, np.float32)}
    assert "1 unexpected: model.layers.0.self_attn.q_proj.bias" in damaged(
        tmp_path, hf_tensors() | bias
    )


def test_mixed_dtypes(tmp_path):
    tensors = hf_tensors(dtype=BFLOAT16)
    scale, value = "model.norm.weight", "model.layers.0.self_attn.v_proj.weight"
    tensors |= {scale: tensors[scale].astype(np.float32), value: tensors[value].astype(np.float16)}
    source = open_hf_directory(write_model(tmp_path, tensors=tensors))
    assert source.config.dtype == "bfloat16"
    params = load_params(source, "bfloat16")
    assert source.read("layers.0.attn.kv", (slice(None),) * 4).dtype == np.float32
    rounded = {name: array.astype(BFLOAT16) for name, array in tensors.items()}
    assert_same_params(params, our_params(rounded))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("block_bytes", [1, 200, 1 << 20])
def test_load_params(source, monkeypatch, dtype, block_bytes):
    monkeypatch.setattr(hf_layout, "_BLOCK_BYTES", block_bytes)
    progress = []
    params = load_params(source, dtype, on_progress=lambda *step: progress.append(step))
    target = np.dtype(jax.numpy.dtype(dtype))
    expected = {name: array.astype(target) for name, array in our_params(hf_tensors()).items()}
    assert_same_params(params, expected)
    assert all(len(array.devices()) == 1 for array in params.values())
    total = sum(array.nbytes for array in expected.values())
    assert progress[-1] == ("loading", total, total)
    assert [step[1] for step in progress] == sorted(step[1] for step in progress)


def test_load_params_onto_many_devices(source):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    specs = {
        "embed": P("x"), "q": P(None, "x"), "kv": P("x", None, "y"), "o": P("x", "y"),
        "gate_up": P(None, None, ("x", "y")), "down": P("y"), "scale": P(), "head": P(None, "x"),
    }  # fmt: skip
    shardings = {
        name: NamedSharding(mesh, specs[name.split(".")[-1]]) for name in param_shapes(TINY)
    }
    params = load_params(source, "float32", shardings=shardings)
    assert_same_params(params, our_params(hf_tensors()))
    for name, array in params.items():
        assert array.sharding == shardings[name]
        assert len(array.sharding.device_set) == 8


def test_load_params_on_the_callers_default_device(source):
    device = jax.devices()[3]
    with jax.default_device(device):
        params = load_params(source, "float32")
    assert all(array.devices() == {device} for array in params.values())


def test_all_devices_together_read_once(tmp_path):
    source = open_hf_directory(write_model(tmp_path))
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    shardings = dict.fromkeys(param_shapes(TINY), NamedSharding(mesh, P("x")))
    load_params(source, "float32", shardings=shardings)
    # Though each weight is cut in two, and four devices hold each piece.
    (file,) = set(source._files.values())
    assert file._num_bytes_read == sum(array.nbytes for array in hf_tensors().values())


def test_weights_beyond_float16(tmp_path):
    tensors = hf_tensors()
    tensors[EMBED][3, 4] = 1e5
    source = open_hf_directory(write_model(tmp_path, tensors=tensors))
    with pytest.raises(CheckpointError, match="weight embed has values beyond 65504"):
        load_params(source, "float16")
    # Infinity that was there before is not the cast's doing.
    tensors[EMBED][3, 4] = np.inf
    source = open_hf_directory(write_model(tmp_path, tensors=tensors))
    assert np.isinf(np.asarray(load_params(source, "float16")["embed"])).sum() == 1


def test_golden_models(project_root):
    """Directories that transformers wrote."""
    directories = sorted((project_root / "tests" / "golden" / "llama").iterdir())
    assert directories
    for directory in directories:
        source = open_hf_directory(directory)
        tensors = load_file(directory / "model.safetensors")
        for name, array in our_params(tensors, source.config).items():
            np.testing.assert_array_equal(
                bits(source.read(name, (slice(None),) * array.ndim)), bits(array)
            )
        source.close()


def test_files_are_closed_after_an_error(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(
        "jaxdecode.checkpoint.safetensors_file.SafetensorsFile.close",
        lambda file: closed.append(file.path.name),
    )
    write_model(tmp_path, tensors=hf_tensors() | {"more": np.zeros(1, np.float32)})
    with pytest.raises(CheckpointError, match="unexpected"):
        open_hf_directory(tmp_path)
    assert "model.safetensors" in closed


def test_config_error_comes_before_the_weights(tmp_path):
    write_model(tmp_path, model_type="gpt2")
    os.truncate(tmp_path / "model.safetensors", 0)
    with pytest.raises(ConfigError, match="model_type must be llama or mistral"):
        open_hf_directory(tmp_path)
