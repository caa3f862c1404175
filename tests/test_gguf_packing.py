"""Every packing of GGUF: through the gguf package, and two of them unpacked by hand."""

from __future__ import annotations

import struct
import warnings

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_writing import (
    ALL,
    SHAPES,
    D,
    V,
    ggml_tensors,
    metadata,
    ours,
    random_weights,
    read,
    write,
    write_model,
)

from jaxdecode.checkpoint.gguf_file import open_gguf

# Half a step of the packing in units of the block's largest value, plus the scale's rounding.
STEPS = {"Q8_0": 0.5 / 127, "Q4_0": 1 / 8, "Q4_1": 1 / 15, "Q5_0": 1 / 16, "Q5_1": 1 / 31}


@pytest.mark.parametrize("kind", STEPS)
def test_packed_weights_come_back(tmp_path, kind):
    path = tmp_path / "model.gguf"
    weights = write_model(path, Kind[kind])
    with open_gguf(path) as source:
        assert source.quantised
        assert source.config.dtype == "float32"
        assert source.tensors["token_embd.weight"].dtype_name == kind
        for name in SHAPES:
            array, original = read(source, name), ours(weights, name)
            assert array.dtype == np.float32
            limit = (STEPS[kind] * 1.01 + 2e-3) * np.abs(original).max()
            np.testing.assert_allclose(array, original, rtol=0, atol=limit, err_msg=name)


def half(raw, offset):
    return struct.unpack_from("<e", raw, offset)[0]


def unpack_q4_k(raw):
    """One block of 144 bytes: d, dmin, 8 scales and 8 minima of 6 bits each, 256 nibbles."""
    d, dmin, packed = half(raw, 0), half(raw, 2), raw[4:16]
    numbers = []
    for block in range(8):
        if block < 4:
            scale, minimum = packed[block] & 63, packed[block + 4] & 63
        else:
            scale = packed[block + 4] & 15 | packed[block - 4] >> 6 << 4
            minimum = packed[block + 4] >> 4 | packed[block] >> 6 << 4
        for j in range(32):
            byte = raw[16 + 32 * (block // 2) + j]
            nibble = byte >> 4 if block % 2 else byte & 15
            numbers.append(d * scale * nibble - dmin * minimum)
    return numbers


def unpack_q6_k(raw):
    """One block of 210 bytes: low nibbles, high bit pairs, 16 signed scales, d."""
    numbers = []
    for i in range(256):
        part, rest = divmod(i, 128)
        quarter, j = divmod(rest, 32)
        low = raw[64 * part + 32 * (quarter % 2) + j] >> (4 * (quarter // 2)) & 15
        high = raw[128 + 32 * part + j] >> (2 * quarter) & 3
        scale = struct.unpack_from("<b", raw, 192 + i // 16)[0]
        numbers.append(half(raw, 208) * scale * ((low | high << 4) - 32))
    return numbers


K_HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


@pytest.fixture(scope="module", params=K_HALVES)
def packed_by_hand(request, tmp_path_factory):
    """A model of one layer whose matrices are random blocks: the gguf package cannot pack these."""
    kind, rng = Kind[request.param], np.random.default_rng(0)
    tensors = ggml_tensors(random_weights(0, (256, 4, 2, 64, 512, 5, 1)))
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    for name, array in tensors.items():
        if array.ndim == 2:
            blocks = rng.integers(0, 256, (array.size // 256, block_bytes), np.uint8)
            for offset in K_HALVES[request.param]:
                scales = rng.uniform(-1, 1, (len(blocks), 1)).astype("<f2")
                blocks[:, offset : offset + 2] = scales.view(np.uint8)
            tensors[name] = (blocks.reshape(array.shape[0], -1), kind)
    values = metadata(
        **{
            "llama.block_count": 1,
            "llama.embedding_length": 256,
            "llama.feed_forward_length": 512,
            "llama.attention.key_length": 64,
            "llama.attention.value_length": 64,
            "llama.rope.dimension_count": 64,
            "tokenizer.ggml.tokens": None,
        }
    )
    path = write(tmp_path_factory.mktemp("packed") / "model.gguf", values, tensors)
    with open_gguf(path) as source:
        yield source, tensors, request.param


def test_k_packings(packed_by_hand):
    source, tensors, kind = packed_by_hand
    assert source.quantised
    embed = source.read("embed", (ALL, ALL))
    raw, packing = tensors["token_embd.weight"]
    np.testing.assert_array_equal(embed, gguf.quants.dequantize(raw, packing))
    by_hand = {"Q4_K": unpack_q4_k, "Q6_K": unpack_q6_k}.get(kind)
    if by_hand:
        expected = [by_hand(row.tobytes()) for row in raw]
        np.testing.assert_allclose(embed, expected, rtol=1e-5, atol=1e-4)
    down = gguf.quants.dequantize(tensors["blk.0.ffn_down.weight"][0], packing).T
    np.testing.assert_array_equal(source.read("layers.0.mlp.down", (ALL, ALL)), down)
    part = source.read("layers.0.mlp.down", (slice(250, 260), slice(7, 9)))
    np.testing.assert_array_equal(part, down[250:260, 7:9])
    q = gguf.quants.dequantize(tensors["blk.0.attn_q.weight"][0], packing)
    q = q.reshape(4, 32, 2, 256).swapaxes(1, 2).reshape(4, 64, 256).transpose(2, 0, 1)
    np.testing.assert_array_equal(source.read("layers.0.attn.q", (ALL,) * 3), q)
    part = source.read("layers.0.attn.q", (slice(3, 200), slice(1, 3), slice(20, 50)))
    np.testing.assert_array_equal(part, q[3:200, 1:3, 20:50])


def test_infinite_scales_are_read_without_a_warning(tmp_path):
    tensors = ggml_tensors(random_weights())
    blocks = np.full((V, D // 32 * 18), 0xFF, np.uint8)
    blocks[:, :2] = np.array([0x00, 0x7C], np.uint8)
    path = write(
        tmp_path / "model.gguf", metadata(), tensors | {"token_embd.weight": (blocks, Kind.Q4_0)}
    )
    with open_gguf(path) as source, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not np.isfinite(source.read("embed", (ALL, ALL))).any(axis=0)[0]
