"""Tiny Hugging Face model directories, and what our weights must be for them, spelt out by hand."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxdecode.models.config import LlamaConfig

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# N * H is not D, so that no two axes can be mistaken for each other.
TINY = LlamaConfig(
    vocab_size=40, embed_dim=16, ffw_dim=24, num_layers=2, num_q_heads=4, num_kv_heads=2,
    head_dim=6, max_positions=128, dtype="float32", bos_id=1, eos_ids=(2,),
)  # fmt: skip


def hf_config(config=TINY, **changes):
    """config.json of `config`; a change to None deletes the key."""
    data = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.ffw_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": config.dtype,
    }
    return {key: value for key, value in (data | changes).items() if value is not None}


def hf_shapes(config=TINY):
    """Shapes by Hugging Face's names."""
    D, F, V = config.embed_dim, config.ffw_dim, config.vocab_size
    N, K, H = config.num_q_heads, config.num_kv_heads, config.head_dim
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (V, D)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (D,),
            f"{layer}.self_attn.q_proj.weight": (N * H, D),
            f"{layer}.self_attn.k_proj.weight": (K * H, D),
            f"{layer}.self_attn.v_proj.weight": (K * H, D),
            f"{layer}.self_attn.o_proj.weight": (D, N * H),
            f"{layer}.post_attention_layernorm.weight": (D,),
            f"{layer}.mlp.gate_proj.weight": (F, D),
            f"{layer}.mlp.up_proj.weight": (F, D),
            f"{layer}.mlp.down_proj.weight": (D, F),
        }
    return shapes


def hf_tensors(config=TINY, dtype=np.float32, seed=0):
    """Random tensors by Hugging Face's names."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=shape).astype(np.float32).astype(dtype)
        for name, shape in hf_shapes(config).items()
    }


def our_params(tensors, config=TINY):
    """Our weights for Hugging Face's tensors, by their definition rather than by the package."""
    D = config.embed_dim
    N, K, H = config.num_q_heads, config.num_kv_heads, config.head_dim
    params = {"embed": tensors["model.embed_tokens.weight"]}
    for i in range(config.num_layers):
        theirs = {
            name.removeprefix(f"model.layers.{i}.").removesuffix(".weight"): array
            for name, array in tensors.items()
            if name.startswith(f"model.layers.{i}.")
        }
        k, v = (theirs[f"self_attn.{name}_proj"].T.reshape(D, K, H) for name in "kv")
        gate, up = (theirs[f"mlp.{name}_proj"].T for name in ("gate", "up"))
        params |= {
            f"layers.{i}.attn_norm.scale": theirs["input_layernorm"],
            f"layers.{i}.attn.q": theirs["self_attn.q_proj"].T.reshape(D, N, H),
            f"layers.{i}.attn.kv": np.stack([k, v], axis=1),
            f"layers.{i}.attn.o": theirs["self_attn.o_proj"].T.reshape(N, H, D),
            f"layers.{i}.mlp_norm.scale": theirs["post_attention_layernorm"],
            f"layers.{i}.mlp.gate_up": np.stack([gate, up], axis=1),
            f"layers.{i}.mlp.down": theirs["mlp.down_proj"].T,
        }
    params["final_norm.scale"] = tensors["model.norm.weight"]
    if not config.tie_embeddings:
        params["head"] = tensors["lm_head.weight"].T
    return params


def write_model(directory, config=TINY, tensors=None, shards=1, **changes):
    """A model directory; the tensors are dealt out to `shards` files. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(config, **changes)))
    tensors = hf_tensors(config) if tensors is None else tensors
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        names = list(tensors)[i::shards]
        save_file({name: tensors[name] for name in names}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    write_index(directory, weight_map)
    return directory


def write_index(directory, weight_map):
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def read_index(directory):
    return json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]


def assert_same_params(found, expected):
    """Bit for bit the same weights, whatever arrays hold them."""
    assert list(found) == list(expected)
    for name, array in expected.items():
        given = np.asarray(found[name])
        assert given.dtype == array.dtype, name
        assert given.shape == array.shape, name
        np.testing.assert_array_equal(bits(given), bits(np.asarray(array)), err_msg=name)


# The largest memory that a process had, in bytes. Linux counts a parent's into ru_maxrss.
PEAK_MEMORY = """
import pathlib, resource, sys
def peak_memory():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
"""


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)
