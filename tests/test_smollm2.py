"""The default model writes what transformers writes from the same GGUF (golden/smollm2.json)."""

from __future__ import annotations

import hashlib
import json
import pathlib

import pytest
from smollm2 import smollm2_gguf

from jaxdecode.checkpoint import load
from jaxdecode.generation import generate
from jaxdecode.sampling import SamplingParams

GOLDEN = json.loads(
    (pathlib.Path(__file__).parent / "golden" / "smollm2.json").read_text(encoding="utf-8")
)
CASES = GOLDEN["cases"]

pytestmark = [pytest.mark.network, pytest.mark.slow]


@pytest.fixture(scope="module")
def path():
    return smollm2_gguf()


@pytest.fixture(scope="module")
def loaded(path):
    return load(path, dtype="float32")


def greedy(loaded, prompts, **changes):
    model, tokenizer = loaded
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    return generate(model, tokenizer, prompts, params, **changes)


def test_file_is_the_one_the_golden_tokens_came_from(path):
    assert hashlib.sha256(path.read_bytes()).hexdigest() == GOLDEN["sha256"]


def test_golden_choices_are_not_ties():
    # Rounding in float32 moves logits by about 1e-4: each choice must have far more room.
    assert min(gap for case in CASES for gap in case["gaps"]) > 0.01
    assert [len(case["tokens"]) for case in CASES] == [64] * 4


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["prompt_ids"][:3]))
def test_greedy_tokens_equal(loaded, case):
    (result,) = greedy(loaded, [case["prompt_ids"]])
    assert result.tokens == case["tokens"]
    assert result.finish_reason == "length"


def test_a_batch_of_all_prompts_equals_single_runs(loaded):
    results = greedy(loaded, [case["prompt_ids"] for case in CASES])
    assert [result.tokens for result in results] == [case["tokens"] for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["prompt_ids"][:3]))
def test_tokenizer_and_template_give_the_golden_prompt(loaded, case):
    tokenizer = loaded[1]
    prompt = case["prompt"]
    encode = tokenizer.encode if isinstance(prompt, str) else tokenizer.apply_chat_template
    assert encode(prompt) == case["prompt_ids"]
    assert tokenizer.decode(case["tokens"]) == case["text"]


def test_capital_of_france(loaded):
    model, tokenizer = loaded
    params = SamplingParams(max_tokens=4)
    (result,) = generate(model, tokenizer, "The capital of France is", params)
    assert result.text.startswith(" Paris")
