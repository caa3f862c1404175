"""Mailboxes around a loop: opened once, before it, and every step goes on with the turns.

The kernels need GPUs. Here collectives of XLA stand for them, which count the turns as they do.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from meshes import make_mesh, sharded_model
from naive_llama import CONFIG

from jaxdecode.models.llama import Llama
from jaxdecode.models.mailboxes import Mailboxes
from jaxdecode.pallas_kernels import norm, peer
from jaxdecode.pallas_kernels.varying import vary_over_none

# No other test has it: jit keeps what it traced with the stand-ins.
WIDE = dataclasses.replace(
    CONFIG, embed_dim=512, num_layers=1, num_q_heads=16, num_kv_heads=4, head_dim=64
)
B, STEPS = 2, 5


def wide_model(sizes, collectives: str) -> Llama:
    model = sharded_model(WIDE, make_mesh(sizes))
    model.sharding = dataclasses.replace(model.sharding, collectives=collectives)
    return model


@pytest.fixture
def counted(monkeypatch):
    """What kernels exchange goes through XLA, and each exchange is a turn of its mailbox."""

    def axes(group):
        return tuple(axis for axis, _ in group)

    def total(x, turns, group):
        turns[...] += 1
        # A kernel's result counts as equal on all devices.
        return vary_over_none(lax.psum(x, axes(group)))

    def summed(x, slots, turns, *, group, wait_for_all):
        return total(x, turns, group)

    def normed(x, delta, scale, slots, turns, *, group, eps, cluster):
        rows = (1, -1, scale.size)
        delta = total(delta, turns, group)
        found = norm.plain(
            vary_over_none(x).reshape(rows), delta.reshape(rows), vary_over_none(scale), eps=eps
        )
        return tuple(each.reshape(-1) for each in found)

    def merged(x, slots, turns, *, group):
        turns[...] += 1
        out, lse = jnp.moveaxis(lax.all_to_all(x, axes(group), 0, 0), 1, 0)
        weights = jnp.exp(lse - lse.max(axis=0, keepdims=True))
        return vary_over_none((out * weights).sum(axis=0) / weights.sum(axis=0))

    for name, stand_in in {"_sum": summed, "_norm": normed, "_merge": merged}.items():
        monkeypatch.setattr(peer, name, stand_in)


def decoding(model: Llama, *, around: bool):
    """(jitted, operands) of greedy steps in a loop, with mailboxes opened before it or in each
    step: tokens [B, STEPS] and the turns of each block of the mailboxes."""
    graph, state = nnx.split(model)

    def run(state, token, cache):
        mailboxes = nnx.merge(graph, state).open_mailboxes((B, 1)) if around else None

        def step(carry, _):
            logits, cache = nnx.merge(graph, state)(*carry, mailboxes=mailboxes)
            token = logits[:, 0].argmax(-1).astype(jnp.int32)[:, None]
            return (token, cache), token[:, 0]

        _, tokens = lax.scan(step, (token, cache), None, length=STEPS)
        opened = [each for each in mailboxes or () if each is not None]
        return tokens.T, [mailbox.turns[...] for mailbox in opened]

    start = model.sharding.place(np.array([[3], [41]], np.int32), "BT")
    return jax.jit(run), (state, start, model.init_cache(B, 128))


@pytest.mark.parametrize(
    ("sizes", "around"),
    [((1, 2, 1), True), ((1, 1, 4), True), ((2, 2, 2), True), ((2, 2, 2), False)],
    ids=str,
)
def test_a_loop_says_the_same_tokens_and_counts_every_turn_of_its_mailboxes(counted, sizes, around):
    alone, operands = decoding(wide_model(sizes, "xla"), around=True)
    expected, none = alone(*operands)
    assert none == []
    run, operands = decoding(wide_model(sizes, "peer"), around=around)
    tokens, turns = run(*operands)
    np.testing.assert_array_equal(tokens, expected)
    # Sums, and where the cache is cut merges too; one turn for the opening.
    exchanges = [2 * WIDE.num_layers + 1, WIDE.num_layers][: 1 + (sizes[2] > 1)] * around
    assert [np.unique(found).tolist() for found in turns] == [[1 + STEPS * n] for n in exchanges]


def test_mailboxes_are_for_one_shape_of_tokens(counted):
    model = wide_model((1, 2, 1), "peer")

    def two_tokens(cache):
        return model(jnp.zeros((B, 2), jnp.int32), cache, mailboxes=model.open_mailboxes((B, 1)))

    with pytest.raises(ValueError, match=r"is for 1 of float32\[2, 1, 512\]"):
        jax.jit(two_tokens).trace(model.init_cache(B, 128))


def test_without_peers_there_are_none():
    assert Llama(CONFIG).open_mailboxes((B, 1)) == Mailboxes(None, None)
    assert wide_model((1, 2, 1), "xla").open_mailboxes((B, 1)) == Mailboxes(None, None)
