"""Makes sentencepiece_tokens.json: a small SentencePiece BPE model and what it makes of many texts.

    python make_sentencepiece_tokens.py sentencepiece_tokens.json

Needs sentencepiece (and what make_smollm2_tokens.py needs, whose texts are used). The model is
trained here with the settings of Llama 2's; the file holds its pieces, scores and types under the
names that a GGUF file gives them, the ids that SentencePiece itself finds for each text, and the
text that it finds for those ids. Random ids are decoded too: SentencePiece judges every byte alone.
"""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path

import sentencepiece
from make_smollm2_tokens import texts

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def train() -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in texts() if text.strip() and "\0" not in text] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=1000,
        byte_fallback=True,
        character_coverage=0.98,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def token_type(model: sentencepiece.SentencePieceProcessor, token_id: int) -> int:
    if model.is_unknown(token_id):
        return UNKNOWN
    if model.is_control(token_id):
        return CONTROL
    return BYTE if model.is_byte(token_id) else NORMAL


def main(output: str) -> None:
    model = train()
    ids = range(model.get_piece_size())
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [float(model.get_score(i)) for i in ids],
        "tokenizer.ggml.token_type": [token_type(model, i) for i in ids],
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
    }
    # Names of control tokens in a text are text for SentencePiece, so such texts are left out.
    plain = [text for text in texts() if not any(n in text for n in ("<s>", "</s>", "<unk>"))]
    cases = []
    for text in plain:
        encoded = model.encode(text)
        cases.append({"text": text, "ids": encoded, "decoded": model.decode(encoded)})
    rng = random.Random(0)
    bytes_first = [i for i in ids if token_type(model, i) == BYTE]
    for _ in range(100):
        some = rng.choices(bytes_first, k=6) + rng.choices(ids, k=6)
        some = [i for i in rng.sample(some, len(some)) if not model.is_unknown(i)]
        cases.append({"ids": some, "decoded": model.decode(some)})
    golden = {"metadata": metadata, "cases": cases}
    Path(output).write_text(json.dumps(golden, separators=(",", ":")) + "\n", encoding="utf-8")
    print(len(cases), "cases,", len(ids), "tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
