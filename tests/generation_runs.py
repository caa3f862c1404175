"""generate and stream_generate on a tiny random model, and a loop that caches nothing.

Most calls share their shapes (one or three prompts in a bucket of 16, 128 slots), so that little is
compiled.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from naive_llama import CONFIG, ToyTokenizer, naive_logits, random_model, random_params

from jaxdecode.generation import generate, stream_generate
from jaxdecode.results import Result
from jaxdecode.sampling import SamplingParams

TOKENIZER = ToyTokenizer()
# Fewer layers, no eos, and not many positions.
SMALL = dataclasses.replace(CONFIG, num_layers=1, eos_ids=(), max_positions=64)
PROMPTS = [[5], [7, 1, 33, 20, 8, 2, 41], list(range(10, 26))]
SAMPLED = {"temperature": 1.2, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "seed": 4}


def run(prompts, tokenizer=None, *, cache=None, model=None, **params) -> list[Result]:
    return generate(
        model or random_model(), tokenizer, prompts, SamplingParams(**params), cache=cache
    )


def run_one(prompt, tokenizer=None, **rest) -> Result:
    (result,) = run([prompt], tokenizer, **rest)
    return result


def stream(prompt, tokenizer=None, *, cache=None, dispatch=8, step=512, on_prefill=None, **params):
    return list(
        stream_generate(
            random_model(), tokenizer, prompt, SamplingParams(**params), cache=cache,
            tokens_per_dispatch=dispatch, prefill_step_size=step, on_prefill=on_prefill,
        )
    )  # fmt: skip


def next_logits(sequence) -> np.ndarray:
    return naive_logits(random_params(CONFIG), CONFIG, sequence)[-1]


@functools.cache
def naive_greedy(prompt: tuple[int, ...], max_tokens: int, penalty: float = 1.0) -> list[int]:
    sequence = list(prompt)
    for _ in range(max_tokens):
        logits = next_logits(sequence)
        for token in set(sequence):
            logits[token] = (
                logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            )
        sequence.append(int(logits.argmax()))
    return sequence[len(prompt) :]


def tokens_until(stop: str, tokens: list[int]) -> int:
    """How many tokens it takes until their text holds the stop string."""
    return next(n for n in range(len(tokens) + 1) if stop in TOKENIZER.decode(tokens[:n]))


def cached(result: Result) -> list[int]:
    return np.asarray(result.cache.lengths).tolist()
