"""Loading onto a mesh and saving from one: bits, places, and how many bytes are read for them."""

from __future__ import annotations

import dataclasses
import functools
import math

import gguf_writing
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from jax.sharding import Mesh
from meshes import make_mesh, size_name
from tiny_hf import BFLOAT16, TINY, assert_same_params, hf_tensors, our_params, write_model

import jaxdecode as jd
from jaxdecode.checkpoint import arrays, export_safetensors, hf_layout, open_source
from jaxdecode.checkpoint.gguf_header import GgufHeader
from jaxdecode.checkpoint.safetensors_file import SafetensorsFile
from jaxdecode.errors import RequestError
from jaxdecode.models.params import param_letters, param_shapes
from jaxdecode.models.random_model import random_model
from jaxdecode.models.sharding import Sharding, fit_mesh

CONFIG = dataclasses.replace(TINY, num_q_heads=8, num_kv_heads=4, head_dim=8, ffw_dim=48)
ONE, HEADS, MIXED, LENGTH = (1, 1, 1), (1, 4, 2), (2, 2, 2), (1, 1, 8)
MESHES = pytest.mark.parametrize("sizes", [ONE, HEADS, MIXED, LENGTH], ids=size_name)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "model"
    return write_model(path, CONFIG, hf_tensors(CONFIG, BFLOAT16), shards=2)


@functools.cache
def expected():
    return our_params(hf_tensors(CONFIG, BFLOAT16), CONFIG)


def assert_placed(model, mesh) -> None:
    """Every weight lies as the table of letters says."""
    letters = param_letters(model.config)
    assert model.sharding == fit_mesh(model.config, mesh)
    for name, x in model.params().items():
        assert x.sharding.is_equivalent_to(model.sharding.named(letters[name]), x.ndim), name
        parts = {shard.data.shape for shard in x.addressable_shards}
        assert parts == {model.sharding.local_shape(letters[name], x.shape)}


@pytest.fixture
def bytes_read(monkeypatch):
    """Bytes of tensors that are read from safetensors and GGUF files from now on."""
    count = [0]
    slices, ranges = SafetensorsFile.read, GgufHeader.read_bytes

    def read(self, name, index):
        piece = slices(self, name, index)
        count[0] += piece.nbytes
        return piece

    def read_bytes(self, offset, num_bytes):
        count[0] += num_bytes
        return ranges(self, offset, num_bytes)

    monkeypatch.setattr(SafetensorsFile, "read", read)
    monkeypatch.setattr(GgufHeader, "read_bytes", read_bytes)
    return count


@MESHES
@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
def test_a_hugging_face_directory(directory, monkeypatch, bytes_read, sizes, block_bytes):
    monkeypatch.setattr(hf_layout, "_BLOCK_BYTES", block_bytes)
    model, _ = jd.load(directory, mesh=make_mesh(sizes))
    assert_same_params(model.params(), expected())
    assert_placed(model, make_mesh(sizes))
    # Once in all, whatever the number of devices.
    assert bytes_read == [sum(x.nbytes for x in expected().values())]


@MESHES
@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0], ids=["F32", "Q8_0"])
def test_a_gguf_file(tmp_path, bytes_read, sizes, kind):
    path = tmp_path / "model.gguf"
    gguf_writing.write_model(path, kind, tokenizer__ggml__tokens=None)
    single, _ = jd.load(path)
    sizes = (1, 2, 4) if sizes == HEADS else sizes  # it has two KV heads
    with open_source(path) as source:
        num_bytes = sum(info.num_bytes for info in source.tensors.values())
    bytes_read[0] = 0
    model = jd.load(path, mesh=make_mesh(sizes))[0]
    assert 0 <= bytes_read[0] - num_bytes < 10  # and a word of the metadata
    assert_same_params(model.params(), {k: np.asarray(x) for k, x in single.params().items()})
    assert_placed(model, make_mesh(sizes))


def test_another_dtype_on_the_way(directory):
    model, _ = jd.load(directory, mesh=make_mesh(MIXED), dtype="float32")
    assert_same_params(
        model.params(), {name: x.astype(np.float32) for name, x in expected().items()}
    )


@MESHES
def test_each_device_reads_its_own_bytes(directory, bytes_read, sizes):
    """As if each device were alone in its process, and as if four were."""
    source = open_source(directory)
    sharding, letters = fit_mesh(CONFIG, make_mesh(sizes)), param_letters(CONFIG)
    for name, shape in param_shapes(CONFIG).items():
        places = sharding.named(letters[name]).devices_indices_map(shape)
        spans = [
            tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))
            for index in places.values()
        ]
        share = math.prod(sharding.local_shape(letters[name], shape)) * 2
        groups = [[span] for span in spans]
        groups += [spans[i : i + 4] for i in range(0, len(spans), 4)]
        for group in groups:
            bytes_read[0] = 0
            pieces = arrays.read_pieces(source, name, shape, set(group), BFLOAT16)
            assert bytes_read == [share * len(set(group))], name
            for span, piece in pieces.items():
                cuts = tuple(slice(*ends) for ends in span)
                np.testing.assert_array_equal(piece, expected()[name][cuts])
    source.close()


def test_devices_that_lie_apart_get_their_own_all_the_same(directory):
    source = open_source(directory)
    name, shape = "layers.0.attn.q", param_shapes(CONFIG)["layers.0.attn.q"]
    spans = {((0, 16), (0, 2), (0, 4)), ((0, 16), (5, 8), (2, 8)), ((3, 9), (2, 4), (0, 1))}
    for span, piece in arrays.read_pieces(source, name, shape, spans, BFLOAT16).items():
        cuts = tuple(slice(*ends) for ends in span)
        np.testing.assert_array_equal(piece, expected()[name][cuts])
    source.close()


def test_axes_in_any_order_and_explicit_ones(directory):
    for mesh in (
        Mesh(np.array(jax.devices()[:2]), ("tensor",)),
        Mesh(np.array(jax.devices()[::-1]).reshape(4, 2), ("seq", "tensor")),
        jax.make_mesh((2, 2), ("tensor", "seq")),
    ):
        model, _ = jd.load(directory, mesh=mesh)
        assert_same_params(model.params(), expected())
        assert_placed(model, mesh)


@pytest.mark.parametrize(
    ("source", "target"),
    [(None, HEADS), (HEADS, None), (MIXED, LENGTH), (LENGTH, MIXED)],
    ids=lambda sizes: size_name(sizes or ONE),
)
def test_saved_from_one_mesh_and_loaded_onto_another(directory, tmp_path, source, target):
    meshes = [None if sizes is None else make_mesh(sizes) for sizes in (source, target)]
    jd.save(jd.load(directory, mesh=meshes[0])[0], tmp_path / "saved")
    model, _ = jd.load(tmp_path / "saved", mesh=meshes[1])
    assert_same_params(model.params(), expected())
    if meshes[1] is None:
        assert model.sharding == Sharding()
        assert all(len(x.sharding.device_set) == 1 for x in model.params().values())
    else:
        assert_placed(model, meshes[1])


def test_copies_along_data_are_saved_once(tmp_path):
    config = dataclasses.replace(CONFIG, vocab_size=800, embed_dim=256)
    model = random_model(config, mesh=make_mesh((8, 1, 1)))
    jd.save(model, tmp_path / "saved")
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    assert size == pytest.approx(sum(x.nbytes for x in model.params().values()), rel=0.1)


def test_exported_from_a_mesh(directory, tmp_path):
    for sizes in (MIXED, None):
        model, _ = jd.load(directory, mesh=None if sizes is None else make_mesh(sizes))
        export_safetensors(model, tmp_path / str(sizes))
    found, wanted = (
        (tmp_path / str(sizes) / "model.safetensors").read_bytes() for sizes in (MIXED, None)
    )
    assert found == wanted


def test_a_vocabulary_that_does_not_divide_is_said_once(tmp_path, capsys):
    odd = dataclasses.replace(CONFIG, vocab_size=42)
    path = write_model(tmp_path / "odd", odd)
    model, _ = jd.load(path, mesh=make_mesh(HEADS))
    assert_placed(model, make_mesh(HEADS))
    assert model.params()["embed"].sharding.is_fully_replicated
    line = (
        "embedding and output are whole on each device, as 8 does not divide the vocabulary of 42"
    )
    assert capsys.readouterr().err.count(line) == 1
    jd.load(path, mesh=make_mesh((1, 2, 1)))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (
            lambda: make_mesh((1, 8, 1)),
            "tensor=8 does not divide num_kv_heads=4 .*; tensor=4,seq=2 fits",
        ),
        (lambda: make_mesh((1, 1, 6)), r"seq=6 does not divide head_dim=8 .*; tensor=4,seq=1 fits"),
        (lambda: Mesh(np.array(jax.devices()), ("model",)), "data, tensor, seq; found model"),
        (lambda: "auto", "mesh must be a jax.sharding.Mesh or None, found 'auto'"),
        (lambda: {"tensor": 2}, "mesh must be a jax.sharding.Mesh or None, found {'tensor': 2}"),
    ],
    ids=["tensor", "seq", "name", "str", "dict"],
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_read(
    directory, bytes_read, mesh, message
):
    with pytest.raises(RequestError, match=message):
        jd.load(directory, mesh=mesh())
    assert bytes_read == [0]
