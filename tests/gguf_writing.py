"""Small GGUF files for tests: whole models through the gguf package, and headers byte by byte."""

from __future__ import annotations

import struct

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from tiny_hf import hf_shapes

from jaxdecode.models.config import LlamaConfig

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10

# Every size differs from the others, and N * H from D.
D, N, K, H, F, V, L = 64, 4, 2, 32, 96, 40, 2


def metadata(**changed):
    """Metadata of the small model, by key with __ for the dot; None leaves a key out."""
    values = {
        "general.architecture": "llama",
        "llama.block_count": L,
        "llama.context_length": 512,
        "llama.embedding_length": D,
        "llama.feed_forward_length": F,
        "llama.attention.head_count": N,
        "llama.attention.head_count_kv": K,
        "llama.attention.key_length": H,
        "llama.attention.value_length": H,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": H,
        "llama.rope.freq_base": 50000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"token{i}\u0120" for i in range(V)],
        "tokenizer.ggml.token_type": [1] * V,
        "tokenizer.ggml.merges": ["a b", "\u0120 t"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }
    values |= {key.replace("__", "."): value for key, value in changed.items()}
    return {key: value for key, value in values.items() if value is not None}


def random_weights(seed=0, sizes=(D, N, K, H, F, V, L)):
    """Weights by Hugging Face's names without "model." and ".weight", rows first, float32."""
    D, N, K, H, F, V, L = sizes
    config = LlamaConfig(
        vocab_size=V, embed_dim=D, ffw_dim=F, num_layers=L, num_q_heads=N, num_kv_heads=K,
        head_dim=H,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    return {
        name.removeprefix("model.").removesuffix(".weight"): rng.standard_normal(shape, np.float32)
        for name, shape in hf_shapes(config).items()
    }


def ggml_tensors(weights, num_q_heads=N, num_kv_heads=K):
    """The same weights under llama.cpp's names, Q and K rows in llama.cpp's order."""
    names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    top = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    tensors = {}
    for name, array in weights.items():
        if name in top:
            tensors[f"{top[name]}.weight"] = array
            continue
        _, layer, part = name.split(".", 2)
        heads = {"self_attn.q_proj": num_q_heads, "self_attn.k_proj": num_kv_heads}.get(part)
        if heads:
            pairs = array.reshape(heads, 2, -1, array.shape[1])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        tensors[f"blk.{layer}.{names[part]}.weight"] = array
    return tensors


def pack(array, kind):
    """An array in one of the types that the gguf package can write; vectors stay float32."""
    if array.ndim == 1:
        return array, Kind.F32
    return gguf.quants.quantize(array, kind), kind


def write(path, values, tensors, kind=Kind.F32):
    """Write a file. `tensors`: float32 arrays, packed as `kind`, or (raw bytes array, kind)."""
    writer = gguf.GGUFWriter(path, values.get("general.architecture", "llama"))
    for key, value in values.items():
        if key != "general.architecture":
            add_value(writer, key, value)
    for name, array in tensors.items():
        raw, raw_kind = array if isinstance(array, tuple) else pack(array, kind)
        writer.add_tensor(name, raw, raw_dtype=raw_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer, key, value):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_int32(key, value) if value < 0 else writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def write_model(path, kind=Kind.F32, tied=False, seed=0, extra=None, drop=(), **changed):
    """The small model with random weights. Returns the weights under Hugging Face's names."""
    weights = random_weights(seed)
    if tied:
        del weights["lm_head"]
    tensors = {name: a for name, a in ggml_tensors(weights).items() if name not in drop}
    write(path, metadata(**changed), tensors | (extra or {}), kind)
    return weights


# Headers byte by byte.


def u32(number):
    return struct.pack("<I", number)


def u64(number):
    return struct.pack("<Q", number)


def text(content):
    content = content.encode() if isinstance(content, str) else content
    return u64(len(content)) + content


def pair(key, value_type, content):
    return text(key) + u32(value_type) + content


def array(key, item_type, length, content=b""):
    return pair(key, ARRAY, u32(item_type) + u64(length) + content)


def info(name, dims, kind=0, offset=0):
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def raw_file(pairs=(), infos=(), data=b"", *, magic=b"GGUF", version=3, counts=None, alignment=32):
    """A file of these parts; `counts` (tensors, keys) overrides the numbers that it announces."""
    num_tensors, num_keys = counts or (len(infos), len(pairs))
    head = magic + u32(version) + u64(num_tensors) + u64(num_keys)
    head += b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data if data else head


# What the small model must become.

ALL = slice(None)
SHAPES = {
    "embed": (V, D),
    "layers.0.attn_norm.scale": (D,),
    "layers.0.attn.q": (D, N, H),
    "layers.0.attn.kv": (D, 2, K, H),
    "layers.1.attn.o": (N, H, D),
    "layers.1.mlp_norm.scale": (D,),
    "layers.1.mlp.gate_up": (D, 2, F),
    "layers.0.mlp.down": (F, D),
    "final_norm.scale": (D,),
    "head": (D, V),
}


def ours(weights, name):
    """A parameter in our shape out of weights under Hugging Face's names."""
    if name in ("embed", "final_norm.scale", "head"):
        hf = {"embed": "embed_tokens", "final_norm.scale": "norm", "head": "lm_head"}[name]
        return weights[hf].T if name == "head" else weights[hf]
    _, i, kind = name.split(".", 2)

    def get(part):
        return weights[f"layers.{i}.{part}"].T

    match kind:
        case "attn_norm.scale":
            return get("input_layernorm")
        case "attn.q":
            return get("self_attn.q_proj").reshape(SHAPES["layers.0.attn.q"])
        case "attn.kv":
            pair = [get("self_attn.k_proj"), get("self_attn.v_proj")]
            return np.stack(pair, 1).reshape(SHAPES["layers.0.attn.kv"])
        case "attn.o":
            return get("self_attn.o_proj").reshape(SHAPES["layers.1.attn.o"])
        case "mlp_norm.scale":
            return get("post_attention_layernorm")
        case "mlp.gate_up":
            return np.stack([get("mlp.gate_proj"), get("mlp.up_proj")], 1)
    return get("mlp.down_proj")


def read(source, name, *index):
    return source.read(name, index or (ALL,) * len(SHAPES[name]))
