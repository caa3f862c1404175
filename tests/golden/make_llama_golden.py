"""Makes the golden LLaMA directories beside this file: `python tests/golden/make_llama_golden.py`.

Each variant becomes a Hugging Face directory, llama/<variant>/, with config.json, random
model.safetensors in float32, and expected.safetensors: token ids [2, 24] and the float32 logits
[2, 24, V] that transformers computes from exactly those two files. Needs torch, transformers and
safetensors, none of which the tests need. The weights come from a fixed seed.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import transformers

ROOT = pathlib.Path(__file__).parent / "llama"
BATCH, TOKENS = 2, 24
_CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "mistral": transformers.MistralForCausalLM,
}


def main() -> None:
    shutil.rmtree(ROOT, ignore_errors=True)
    for index, (name, config) in enumerate(variants().items()):
        directory = ROOT / name
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        rng = np.random.default_rng(1000 + index)
        tensors = random_weights(rng, config)
        safetensors.numpy.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        tokens = rng.integers(0, config["vocab_size"], (BATCH, TOKENS), dtype=np.int32)
        expected = {"tokens": tokens, "logits": transformers_logits(directory, tokens)}
        safetensors.numpy.save_file(expected, directory / "expected.safetensors")
        print(f"{name}: logits std {expected['logits'].std():.3f}")
    print(f"{sum(path.stat().st_size for path in ROOT.rglob('*.*'))} bytes")


def variants() -> dict[str, dict[str, Any]]:
    """config.json of every variant. `_v4` and `_v5` are the two spellings of rotary embeddings."""
    yarn = {"factor": 4.0, "original_max_position_embeddings": 512}
    llama3 = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    wide = {"num_attention_heads": 2, "head_dim": 16}  # N * H = 32 is not the model width, 24
    v4, v5 = rope_v4, rope_v5
    return {
        "mha_untied": base(num_key_value_heads=4) | v4(1e4),
        "mha_implicit": without(base(), "num_key_value_heads", "rope_theta"),
        "gqa_tied": base(tie_word_embeddings=True) | v5(1e6),
        "mqa_untied": base(num_key_value_heads=1) | v5(5e5),
        "head_dim": base(num_key_value_heads=1, **wide) | v4(1e5),
        "rope_linear_v4": small() | v4(1e4, {"type": "linear", "factor": 2.0}),
        "rope_linear_v5": small() | v5(1e4, {"rope_type": "linear", "factor": 4.0}),
        "rope_llama3_v4": small() | v4(1e4, {"rope_type": "llama3"} | llama3),
        "rope_llama3_v5": small() | v5(5e4, {"rope_type": "llama3"} | llama3),
        "rope_yarn_v4": small() | v4(1e4, {"type": "yarn"} | yarn),
        "rope_yarn_v5": small() | v5(1e4, {"rope_type": "yarn", "truncate": False} | yarn),
        "rope_yarn_betas": small()
        | v5(1e4, {"rope_type": "yarn", "beta_fast": 16, "beta_slow": 2, **yarn}),
        "rope_yarn_factor": small()
        | v4(1e4, {"rope_type": "yarn", "attention_factor": 1.5, **yarn}),
        "mistral_window": mistral(sliding_window=8) | v4(1e4),
        "mistral_window_head_dim": mistral(sliding_window=5, **wide) | v5(1e6),
        "mistral_full": mistral(sliding_window=None) | v5(1e5),
    }


def base(**changes: Any) -> dict[str, Any]:
    """A LLaMA of two layers: D = 24, N = 4, K = 2, H = 6, F = 20, V = 40."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    } | changes


def small() -> dict[str, Any]:
    """One layer with H = 16: eight rotary frequencies, so every branch of a scaling is taken."""
    return base(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        tie_word_embeddings=True,
    )


def mistral(**changes: Any) -> dict[str, Any]:
    config = base(model_type="mistral", architectures=["MistralForCausalLM"], **changes)
    return without(config, "attention_bias", "mlp_bias")


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def rope_v4(theta: float, scaling: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_scaling": scaling}


def rope_v5(theta: float, scaling: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": theta} | (scaling or {"rope_type": "default"})}


def random_weights(rng: np.random.Generator, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Weights that make attention choosy and logits of order one, unlike a fresh model's."""
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    N = config["num_attention_heads"]
    K = config.get("num_key_value_heads", N)
    H = config.get("head_dim", D // N)

    def normal(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * gain / columns**0.5).astype(np.float32)

    def norm_scale() -> np.ndarray:
        return (1 + 0.2 * rng.standard_normal(D)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": normal(V, D, gain=2.0),
        "model.norm.weight": norm_scale(),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": norm_scale(),
            f"{prefix}.self_attn.q_proj.weight": normal(N * H, D, gain=1.5),
            f"{prefix}.self_attn.k_proj.weight": normal(K * H, D, gain=1.5),
            f"{prefix}.self_attn.v_proj.weight": normal(K * H, D),
            f"{prefix}.self_attn.o_proj.weight": normal(D, N * H),
            f"{prefix}.post_attention_layernorm.weight": norm_scale(),
            f"{prefix}.mlp.gate_proj.weight": normal(F, D),
            f"{prefix}.mlp.up_proj.weight": normal(F, D),
            f"{prefix}.mlp.down_proj.weight": normal(D, F),
        }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(V, D)
    return tensors


def transformers_logits(directory: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    """[B, T, V] float32, from the files alone, so transformers also judges how they are spelt."""
    model_type = json.loads((directory / "config.json").read_text())["model_type"]
    model, info = _CLASSES[model_type].from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = {key: value for key, value in info.items() if value}
    if problems:
        raise RuntimeError(f"{directory.name}: {problems}")
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens).long()).logits.numpy()


if __name__ == "__main__":
    main()
