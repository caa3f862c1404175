"""What the tests of the command line share: a tiny model on disk, and the command as a process.

conftest.py has the fixtures: `model`, `cli` and `ask`.
"""

from __future__ import annotations

import os
import string
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers

from jaxdecode.checkpoint import export_safetensors
from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.llama import Llama
from jaxdecode.tokenizer import Tokenizer

MAX_POSITIONS = 2048
# Turns follow each other without a sign between them, and each begins with <s>, which is also BOS.
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
SPECIAL = ("<s>", "</s>")


def make_model(
    directory: Path, *, template: str | None = TEMPLATE, tokenizer: bool = True, more_rows: int = 0
) -> Path:
    """A model with random weights, a token per byte; at temperature 0 it writes letters only. Rows
    that no token has are often the likeliest."""
    backend = _byte_tokenizer()
    bos, eos = map(backend.token_to_id, SPECIAL)
    config = LlamaConfig(
        vocab_size=backend.get_vocab_size() + more_rows, embed_dim=32, ffw_dim=64, num_layers=2,
        num_q_heads=4, num_kv_heads=2, head_dim=8, max_positions=MAX_POSITIONS, dtype="float32",
        bos_id=bos, eos_ids=(eos,),
    )  # fmt: skip
    made = Tokenizer(backend, bos_id=bos, eos_ids=(eos,), chat_template=template)
    params = Llama(config, rngs=nnx.Rngs(7), dtype=jnp.float32).params()
    letters = jnp.array([backend.token_to_id(letter) for letter in string.ascii_letters])
    head = jnp.zeros_like(params["head"]).at[:, letters].set(params["head"][:, letters])
    if more_rows:
        head = head.at[:, -more_rows:].set(2 * head[:, letters[:1]])
    params["head"] = head
    model = Llama.from_params(config, params)
    export_safetensors(model, directory, made if tokenizer else None)
    return directory


def _byte_tokenizer() -> tokenizers.Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return backend


def start(
    arguments: list[str], cache: Path, *, prelude: str = "", platforms: str = "cpu", **pipes
) -> subprocess.Popen[bytes]:
    """Starts `jaxdecode` as a process. `prelude` is Python that it runs first."""
    code = (
        # A shell may have started the tests with SIGINT ignored, which children inherit.
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"{prelude}\nfrom jaxdecode.cli import main\nraise SystemExit(main())\n"
    )
    environment = {
        **os.environ, "XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": platforms,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, **pipes)


def fails(result, code=2):
    """The error line of a run that must fail with `code`, saying nothing on stdout."""
    found, out, err = result
    assert (found, out) == (code, ""), err
    lines = err.splitlines()
    assert lines[-1].startswith("error: "), err
    return lines[-1]
