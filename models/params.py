"""The weights of a decoder: their names, shapes and dimension letters, without a model."""

from __future__ import annotations

from jaxdecode.models.config import LlamaConfig


def param_letters(config: LlamaConfig) -> dict[str, str]:
    """Dotted name -> dimension letters of every weight, from the embedding to the head.

    "2" is the fused dimension of keys and values, and of gate and up."""
    letters = {"embed": "VD"}
    for i in range(config.num_layers):
        letters |= {
            f"layers.{i}.attn_norm.scale": "D",
            f"layers.{i}.attn.q": "DNH",
            f"layers.{i}.attn.kv": "D2KH",
            f"layers.{i}.attn.o": "NHD",
            f"layers.{i}.mlp_norm.scale": "D",
            f"layers.{i}.mlp.gate_up": "D2F",
            f"layers.{i}.mlp.down": "FD",
        }
    letters["final_norm.scale"] = "D"
    if not config.tie_embeddings:
        letters["head"] = "DV"
    return letters


def param_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Dotted name -> shape of every weight of `Llama(config)`, in the order of `param_letters`."""
    sizes = {
        "D": config.embed_dim, "F": config.ffw_dim, "V": config.vocab_size, "2": 2,
        "N": config.num_q_heads, "K": config.num_kv_heads, "H": config.head_dim,
    }  # fmt: skip
    return {
        name: tuple(sizes[letter] for letter in letters)
        for name, letters in param_letters(config).items()
    }
