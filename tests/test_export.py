"""Writing Hugging Face directories from models in memory and from opened files."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny_hf import (
    BFLOAT16,
    TINY,
    assert_same_params,
    bits,
    hf_tensors,
    our_params,
    read_index,
    write_model,
)

from jaxdecode.checkpoint import export, export_safetensors, hf_layout, load, open_source, save
from jaxdecode.errors import CheckpointError, RequestError
from jaxdecode.models.config import RopeScaling
from jaxdecode.models.llama import Llama


class FakeTokenizer:
    def __init__(self, text):
        self.text = text

    def save(self, directory):
        (directory / "tokenizer.json").write_text(self.text)


def model_of(tensors, config=TINY):
    params = our_params(tensors, config)
    return Llama.from_params(config, {name: jnp.asarray(a) for name, a in params.items()})


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(bits(found[name]), bits(array), err_msg=name)


@pytest.mark.parametrize("block_bytes", [1, 300, 1 << 20])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
def test_files_to_files(tmp_path, monkeypatch, dtype, block_bytes):
    monkeypatch.setattr(hf_layout, "_BLOCK_BYTES", block_bytes)
    tensors = hf_tensors(dtype=dtype)
    source = open_source(write_model(tmp_path / "in", tensors=tensors, shards=2))
    export_safetensors(source, tmp_path / "out")
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == np.dtype(dtype).name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_load_and_export_again_and_again(tmp_path, dtype):
    tensors = hf_tensors(dtype=dtype)
    write_model(
        tmp_path / "0", tensors=tensors, model_type="mistral", sliding_window=8,
        rope_scaling={"type": "linear", "factor": 2.0},
    )  # fmt: skip
    models = []
    for i in range(3):
        model, _ = load(tmp_path / str(i))
        models.append(model)
        export_safetensors(model, tmp_path / str(i + 1))
    assert models[0].config.rope_scaling == RopeScaling(kind="linear", factor=2.0)
    assert models[0].config.window == 8
    assert models[0].config == models[1].config == models[2].config
    for model in models:
        params = {name: np.asarray(array) for name, array in model.params().items()}
        assert_same_params(params, our_params(tensors))
    files = [(tmp_path / str(i) / "model.safetensors").read_bytes() for i in (1, 2, 3)]
    assert files[0] == files[1] == files[2]


def test_orbax_to_files(tmp_path):
    tensors = hf_tensors()
    save(model_of(tensors), tmp_path / "orbax")
    source = open_source(tmp_path / "orbax")
    export_safetensors(source, tmp_path / "out")
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), tensors)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied(tmp_path, tied):
    config = dataclasses.replace(TINY, tie_embeddings=tied)
    tensors = hf_tensors(config)
    export_safetensors(model_of(tensors, config), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in found) is not tied
    assert_same_tensors(found, tensors)


def test_model_spread_over_devices(tmp_path):
    mesh = Mesh(np.array(jax.devices()), ("x",))
    tensors = hf_tensors()
    params = {
        name: jax.device_put(array, NamedSharding(mesh, P("x") if array.shape[0] % 8 == 0 else P()))
        for name, array in our_params(tensors).items()
    }
    model = Llama.from_params(TINY, params)
    export_safetensors(model, tmp_path / "out")
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), tensors)


def test_host_copies_do_not_stay():
    array = jax.device_put(
        np.arange(64.0, dtype=np.float32),
        NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P("x")),
    )
    np.testing.assert_array_equal(export._host_copy(array), np.arange(64.0, dtype=np.float32))
    assert array._npy_value is None
    np.asarray(array)
    assert array._npy_value is not None  # what would stay otherwise


def test_shards(tmp_path):
    tensors = hf_tensors()
    export_safetensors(model_of(tensors), tmp_path / "out", max_shard_bytes=4000)
    weight_map = read_index(tmp_path / "out")
    names = sorted(set(weight_map.values()))
    assert len(names) > 3
    assert names == [
        f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))
    ]
    found = {}
    for name in names:
        part = load_file(tmp_path / "out" / name)
        assert sum(array.nbytes for array in part.values()) <= 4000
        assert all(weight_map[tensor] == name for tensor in part)
        found |= part
    assert_same_tensors(found, tensors)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    params = load(tmp_path / "out")[0].params()
    assert_same_params({k: np.asarray(v) for k, v in params.items()}, our_params(tensors))


def test_tensor_larger_than_a_shard(tmp_path):
    tensors = hf_tensors()
    export_safetensors(model_of(tensors), tmp_path / "out", max_shard_bytes=1)
    assert len(set(read_index(tmp_path / "out").values())) == len(tensors)


def test_header_is_the_kind_that_other_readers_expect(tmp_path):
    export_safetensors(model_of(hf_tensors()), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
    # The data begins at a multiple of eight bytes, so that it can be mapped as any type.
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16, np.dtype(np.float32)])
def test_other_dtype(tmp_path, dtype):
    tensors = hf_tensors()
    source = open_source(write_model(tmp_path / "in", tensors=tensors))
    export_safetensors(source, tmp_path / "out", dtype=dtype)
    name = np.dtype(dtype).name
    expected = {key: array.astype(np.dtype(dtype)) for key, array in tensors.items()}
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == name


def test_quantised_weights_become_bfloat16(tmp_path):
    source = open_source(write_model(tmp_path / "in"))
    source.quantised = True
    export_safetensors(source, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {array.dtype for array in found.values()} == {BFLOAT16}


@pytest.mark.parametrize("dtype", ["int8", "float64", "auto", 7, object()])
def test_dtype_that_no_weights_have(tmp_path, dtype):
    source = open_source(write_model(tmp_path / "in"))
    with pytest.raises(RequestError, match="dtype must be one of float32, bfloat16, float16"):
        export_safetensors(source, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_weights_beyond_float16(tmp_path):
    tensors = hf_tensors()
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = -1e5
    source = open_source(write_model(tmp_path / "in", tensors=tensors))
    with pytest.raises(CheckpointError, match=r"layers.1.attn.kv has values beyond 65504"):
        export_safetensors(source, tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_side_files_and_tokenizer(tmp_path):
    source = open_source(write_model(tmp_path / "in"))
    own = FakeTokenizer("the source's own")
    source.tokenizer = lambda: own
    export_safetensors(source, tmp_path / "a")
    assert (tmp_path / "a" / "tokenizer.json").read_text() == own.text
    export_safetensors(source, tmp_path / "b", FakeTokenizer("another"))
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "another"
    export_safetensors(model_of(hf_tensors()), tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    generation = json.loads((tmp_path / "c" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2}


def test_progress(tmp_path):
    steps = []
    export_safetensors(
        model_of(hf_tensors()), tmp_path / "out", on_progress=lambda *step: steps.append(step)
    )
    total = sum(array.nbytes for array in hf_tensors().values())
    assert steps[-1] == ("writing", total, total)
    assert [step[1] for step in steps] == sorted(step[1] for step in steps)


def test_nothing_is_overwritten(tmp_path):
    source = open_source(write_model(tmp_path / "in"))
    before = (tmp_path / "in" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="in exists already"):
        export_safetensors(source, tmp_path / "in")
    assert (tmp_path / "in" / "model.safetensors").read_bytes() == before


def test_source_that_breaks_leaves_nothing(tmp_path):
    source = open_source(write_model(tmp_path / "in"))
    shutil.rmtree(tmp_path / "in")
    read = source.read
    calls = []

    def breaking(name, index):
        calls.append(name)
        if len(calls) > 5:
            raise CheckpointError("the file has gone")
        return read(name, index)

    source.read = breaking
    with pytest.raises(CheckpointError, match="the file has gone"):
        export_safetensors(source, tmp_path / "out", FakeTokenizer(""))
    assert list(tmp_path.iterdir()) == []


def test_result_is_checked_before_it_gets_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_header", lambda tensors, dtype: b"\2\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        export_safetensors(model_of(hf_tensors()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
