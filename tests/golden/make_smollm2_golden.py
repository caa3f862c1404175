"""Makes smollm2.json: `python tests/golden/make_smollm2_golden.py SmolLM2-135M-Instruct.Q4_1.gguf`.

transformers reads the very GGUF file that jaxdecode downloads, dequantised to float32, and decodes
greedily, past any end of text. For each prompt the file holds the prompt's ids, the 64 ids that
follow, and at each step the gap between the two highest logits: how far rounding is from changing
the choice. Needs torch, transformers and gguf, none of which the tests need.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
from typing import Any

import torch
import transformers

OUTPUT = pathlib.Path(__file__).parent / "smollm2.json"
NUM_TOKENS = 64
PROMPTS: tuple[str | list[dict[str, str]], ...] = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Zürich, 東京 and São Paulo are three cities. The largest of them",
    [{"role": "user", "content": "How do plants make food?"}],
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=pathlib.Path)
    path = parser.parse_args().gguf.resolve()
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    cases = [greedy_case(model, tokenizer, prompt) for prompt in PROMPTS]
    OUTPUT.write_text(one_line_per_case(digest, cases), encoding="utf-8")


def one_line_per_case(digest: str, cases: list[dict[str, Any]]) -> str:
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    head = f'{{"sha256": "{digest}",\n"transformers": "{transformers.__version__}",\n'
    return f'{head}"cases": [\n{lines}\n]}}\n'


def greedy_case(model: Any, tokenizer: Any, prompt: str | list[dict[str, str]]) -> dict[str, Any]:
    if isinstance(prompt, str):
        prompt_ids = tokenizer(prompt)["input_ids"]
    else:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens, gaps = greedy(model, prompt_ids)
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    print(f"smallest gap {min(gaps):.3f}: {prompt!r} -> {text!r}")
    return {
        "prompt": prompt,
        "prompt_ids": prompt_ids,
        "tokens": tokens,
        "gaps": [round(gap, 4) for gap in gaps],
        "text": text,
    }


@torch.no_grad()
def greedy(model: Any, prompt_ids: list[int]) -> tuple[list[int], list[float]]:
    tokens, gaps, step, cache = [], [], prompt_ids, None
    for _ in range(NUM_TOKENS):
        output = model(torch.tensor([step]), past_key_values=cache, use_cache=True)
        best = output.logits[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        step, cache = [tokens[-1]], output.past_key_values
    return tokens, gaps


if __name__ == "__main__":
    main()
