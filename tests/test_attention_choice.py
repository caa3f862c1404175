"""What `explain_attention` says of a call on a GPU, and that the call does what it says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxdecode.pallas_kernels import decode_attention, explain_attention, flash_decode, prefill
from jaxdecode.pallas_kernels.crossover import MOST_DECODE_TOKENS

SPLIT = "flash_decode: the kernels for this GPU; the split-KV kernels"
PLAN = f"{SPLIT} follow a plan that divides the batch into equal work for the multiprocessors"
WIDE = (
    "flash_decode: the kernels for this GPU; 256 query tokens are more than 16, and by the "
    "measured crossover the wide-query kernel is the faster for them"
)
ASKED = "flash_decode: asked for; the split-KV kernels"
# B, T, S, N, K; options; what is said; the chunks of the split kernels, if any run.
SAID = {
    "one sequence": ((1, 1, 512, 16, 2), {}, f"{SPLIT} cut each sequence into 4 chunks", 4),
    "one full GPU": ((1, 1, 8192, 132, 132), {}, f"{SPLIT} leave each sequence whole", 1),
    "a batch": ((2, 1, 512, 16, 2), {}, PLAN, None),
    "chunks": (
        (1, 1, 512, 16, 2), {"num_splits": 5}, f"{ASKED} cut each sequence into 5 chunks", 5,
    ),
    "chunks of a batch": (
        (2, 1, 512, 16, 2), {"num_splits": 3}, f"{ASKED} cut each sequence into 3 chunks", 3,
    ),
    "no chunks": ((2, 1, 512, 16, 2), {"num_splits": 1}, f"{ASKED} leave each sequence whole", 1),
    "many tokens": ((1, 256, 512, 64, 8), {}, WIDE, "wide"),
    "many tokens of few heads": (
        (1, 256, 512, 16, 2), {}, f"{SPLIT} cut each sequence into 2 chunks", 2,
    ),
    "many tokens in chunks": (
        (1, 256, 512, 64, 8), {"num_splits": 2}, f"{ASKED} cut each sequence into 2 chunks", 2,
    ),
}  # fmt: skip


class Ran(Exception):
    """Raised in place of a kernel, with the number of chunks or "wide"."""


@pytest.fixture
def on_hopper(monkeypatch):
    """As on a GPU that has the kernels; a call ends with what it would have launched."""

    def split(q_shape, k_shape, num_splits, *_):
        raise Ran(num_splits)

    def wide(*_, **__):
        raise Ran("wide")

    monkeypatch.setattr(flash_decode, "why_not_here", lambda: None)
    monkeypatch.setattr(flash_decode, "split_config", split)
    monkeypatch.setattr(prefill, "wide_config", wide)


@pytest.mark.parametrize("name", SAID)
def test_what_is_said_is_what_runs(on_hopper, name):
    (B, T, S, N, K), options, said, chunks = SAID[name]
    q, kv = (jax.ShapeDtypeStruct((B, n, m, 128), jnp.bfloat16) for n, m in ((T, N), (S, K)))
    assert str(explain_attention(q, kv, kv, S, **options)) == said
    # Asked for, it is traced for this machine, though that has no GPU.
    options = {"implementation": "flash_decode"} | options

    def call(q, k, v):
        return decode_attention(q, k, v, S, **options)

    with pytest.raises(Ran) as ran:
        jax.eval_shape(call, q, kv, kv)
    assert ran.value.args == (chunks,)


def test_the_number_in_the_words_is_the_rule():
    assert MOST_DECODE_TOKENS == 16


def test_other_implementations_divide_nothing(on_hopper):
    q, kv = (jax.ShapeDtypeStruct((1, n, 2, 128), jnp.float32) for n in (1, 64))
    choice = explain_attention(q, kv, kv, 64)
    assert (choice.implementation, choice.how) == ("xla", "")
    assert str(choice) == f"xla: {choice.reason}"
