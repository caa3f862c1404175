"""Golden tokenizers, and small ones made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, processors

GOLDEN = Path(__file__).parent / "golden"
SMOLLM2 = json.loads((GOLDEN / "smollm2_tokens.json").read_text(encoding="utf-8"))
SENTENCEPIECE = json.loads((GOLDEN / "sentencepiece_tokens.json").read_text(encoding="utf-8"))


def words(*tokens, bos=None):
    """A tokenizer of whole words."""
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=tokens[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
        )
    return backend


def write_directory(path, backend=None, **files):
    """Writes tokenizer.json and other files, dicts as JSON; "__" in a keyword stands for "."."""
    backend = words("<unk>", "<s>", "</s>", "a", "b", bos="<s>") if backend is None else backend
    files = {"tokenizer__json": backend.to_str()} | files
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (path / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return path


def names_in(path):
    return sorted(entry.name for entry in path.iterdir())
