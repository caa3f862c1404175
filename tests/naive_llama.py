"""A tiny LLaMA with random weights, the same decoder in float64 NumPy, and a toy tokenizer.

The NumPy decoder has no cache, no batch and no padding, and shares no code with the package.
"""

from __future__ import annotations

import functools
import math
import string

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.llama import Llama
from jaxdecode.models.params import param_shapes

BOS, EOS = 62, 63
CONFIG = LlamaConfig(
    vocab_size=64, embed_dim=32, ffw_dim=48, num_layers=2, num_q_heads=4, num_kv_heads=2,
    max_positions=512, dtype="float32", bos_id=BOS, eos_ids=(EOS,),
)  # fmt: skip


class ToyTokenizer:
    """One letter or digit per id; 62 begins a text and 63 ends one."""

    bos_id = BOS
    eos_ids = (EOS,)
    letters = string.ascii_letters + string.digits

    def encode(self, text: str) -> list[int]:
        return [BOS, *(self.letters.index(letter) for letter in text)]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.letters[i] for i in ids if i < len(self.letters))


class ChatTokenizer(ToyTokenizer):
    """Frames each message with the first letter of its role, and ends with an A for the answer."""

    def apply_chat_template(self, messages: list[dict[str, str]]) -> list[int]:
        return self.encode("".join(m["role"][0] + m["content"] for m in messages) + "A")


@functools.cache
def random_params(config: LlamaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 weights that spread logits over several nats: greedy choices are clear."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in param_shapes(config).items():
        if name.endswith("scale"):
            params[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            scale = 0.5 if name in ("head", "embed") else 0.25
            params[name] = (scale * rng.standard_normal(shape)).astype(np.float32)
    return params


@functools.cache
def random_model(config: LlamaConfig = CONFIG, seed: int = 0) -> Llama:
    params = random_params(config, seed)
    return Llama.from_params(config, {k: jnp.asarray(v, config.dtype) for k, v in params.items()})


@functools.cache
def jitted(model: Llama):
    """model(tokens, cache, num_tokens, logits), compiled: logits in NumPy, and a new cache."""
    graph, state = nnx.split(model)

    @functools.partial(jax.jit, static_argnames="logits")
    def call(state, tokens, cache, num_tokens, logits):
        return nnx.merge(graph, state)(tokens, cache, num_tokens=num_tokens, logits=logits)

    def run(tokens, cache, num_tokens=None, logits="all"):
        tokens = jnp.asarray(tokens, jnp.int32)
        if num_tokens is None:
            num_tokens = np.full(tokens.shape[0], tokens.shape[1])
        num_tokens = jnp.asarray(num_tokens, jnp.int32)
        out, cache = call(state, tokens, cache, num_tokens, logits)
        return np.asarray(out), cache

    return run


def naive_frequencies(config: LlamaConfig) -> tuple[list[float], float]:
    """Radians per position of each pair of dimensions, and the factor on cos and sin."""
    H, scaling = config.head_dim, config.rope_scaling
    plain = [1.0 / config.rope_theta ** (2 * i / H) for i in range(H // 2)]
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return [f / scaling.factor for f in plain], 1.0
    if scaling.kind == "llama3":
        return [_llama3_frequency(f, scaling) for f in plain], 1.0
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return [_yarn_frequency(i, f, config) for i, f in enumerate(plain)], factor


def _llama3_frequency(frequency, scaling):
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_max_positions / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_max_positions / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = scaling.original_max_positions / wavelength - scaling.low_freq_factor
    smooth /= scaling.high_freq_factor - scaling.low_freq_factor
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def _yarn_frequency(i, frequency, config):
    scaling, H = config.rope_scaling, config.head_dim

    def dimension_that_turns(times):
        # theta ** (2 i / H) = original / (2 pi times), solved for i.
        wavelength = scaling.original_max_positions / times
        return H * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_theta))

    first = dimension_that_turns(scaling.beta_fast)
    last = dimension_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, H - 1)
    if first == last:
        last += 0.001
    stretched = min(max((i - first) / (last - first), 0.0), 1.0)
    return stretched * frequency / scaling.factor + (1 - stretched) * frequency


def naive_logits(params: dict[str, np.ndarray], config: LlamaConfig, tokens) -> np.ndarray:
    """[T, V] float64 logits of one sequence."""
    weights = {name: np.asarray(w, np.float64) for name, w in params.items()}
    x = weights["embed"][np.asarray(tokens)]
    for i in range(config.num_layers):
        layer = {
            name.removeprefix(f"layers.{i}."): w
            for name, w in weights.items()
            if name.startswith(f"layers.{i}.")
        }
        x = x + _attention(_norm(x, layer["attn_norm.scale"], config), layer, config)
        normed = _norm(x, layer["mlp_norm.scale"], config)
        gate, up = (normed @ layer["mlp.gate_up"][:, part] for part in (0, 1))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp.down"]
    head = weights["embed"].T if config.tie_embeddings else weights["head"]
    return _norm(x, weights["final_norm.scale"], config) @ head


def _norm(x, scale, config):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps) * scale


def _attention(x, layer, config):
    T, H, G = len(x), config.head_dim, config.num_q_heads // config.num_kv_heads
    position = np.arange(T)
    seen = position[None, :] <= position[:, None]
    if config.window is not None:
        seen &= position[None, :] > position[:, None] - config.window
    total = 0
    for n in range(config.num_q_heads):
        q = _turn(x @ layer["attn.q"][:, n], config)
        k = _turn(x @ layer["attn.kv"][:, 0, n // G], config)
        v = x @ layer["attn.kv"][:, 1, n // G]
        score = np.where(seen, q @ k.T / math.sqrt(H), -np.inf)
        weight = np.exp(score - score.max(axis=-1, keepdims=True))
        weight /= weight.sum(axis=-1, keepdims=True)
        total = total + weight @ v @ layer["attn.o"][n]
    return total


def _turn(x, config):
    """Pairs (i, i + H/2) as complex numbers, multiplied by exp(i * angle)."""
    T, H = x.shape
    frequency, factor = naive_frequencies(config)
    pair = x[:, : H // 2] + 1j * x[:, H // 2 :]
    turned = pair * factor * np.exp(1j * np.outer(np.arange(T), frequency))
    return np.concatenate([turned.real, turned.imag], axis=-1)
