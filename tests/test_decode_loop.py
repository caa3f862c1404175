"""The compiled steps: compiled once, nothing leaves the device inside, and rows do not mix."""

from __future__ import annotations

import collections
import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_runs import PROMPTS, naive_greedy, run, run_one
from naive_llama import CONFIG, naive_logits, random_model, random_params

from jaxdecode.decode_loop import SplitModel, decode, prefill, start_state
from jaxdecode.errors import NonFiniteLogitsError
from jaxdecode.models.llama import Llama
from jaxdecode.sampling import SamplingArrays, SamplingParams

B, CAPACITY, WIDTH = 3, 128, 16


# Compilations
@contextlib.contextmanager
def compilations():
    """Counts what XLA compiles, by the name of the function."""
    counts: collections.Counter[str] = collections.Counter()

    def on_duration(event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            counts[details.get("fun_name", "?")] += 1

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)


LONG = {"max_tokens": 200, "ignore_eos": True}


def test_200_tokens_compile_one_prefill_and_one_decode():
    """Five sequences with 256 slots each, which no other test has that this process may run."""
    with compilations() as counts:
        results = run([[1], [2] * 9, [3] * 16, [4], [5]], **LONG)
    assert [len(r.tokens) for r in results] == [200] * 5
    assert counts["jit(prefill)"] == 1
    assert counts["jit(decode)"] == 1
    # One more for draws, and one for draws from the likeliest.
    prompts = [[4] * 3, [5] * 12, [6] * 2, [7], [8]]
    with compilations() as counts:
        run(prompts, **LONG | {"temperature": 1.0, "seed": 2**40})
        run(prompts, **LONG | {"temperature": 1.0, "seed": 2**40, "top_k": 7})
    assert counts["jit(prefill)"] == 0
    assert counts["jit(decode)"] == 2
    # Other lengths in the same bucket, and every sampling value.
    variations = [
        {"repetition_penalty": 1.2},
        {"temperature": 0.7, "seed": 1},
        {"temperature": 1.5, "seed": 2**40, "top_k": 5},
        {"top_p": 0.5, "min_p": 0.2, "repetition_penalty": 1.2, "temperature": 1.0},
        {"top_k": 5},
        {"stop_token_ids": (1, 2, 3)},
        {"max_tokens": 190},
    ]
    with compilations() as counts:
        for i, params in enumerate(variations):
            run([[4] * (3 + i), *prompts[1:]], **LONG | params)
    assert counts == {}


def test_the_count_rises_with_a_new_batch_size_and_a_new_bucket():
    others = [[2]] * 10  # eleven sequences, which no other test has
    with compilations() as counts:
        run([[1], *others], max_tokens=2)
    assert counts["jit(prefill)"] == counts["jit(decode)"] == 1
    with compilations() as counts:
        run([[1] * 17, *others], max_tokens=2)
    assert counts["jit(prefill)"] == 1
    assert counts["jit(decode)"] == 0


# Between host and device
def inputs(model: Llama, prompts=PROMPTS):
    """(split model, state, tokens, num_tokens, sampling, stop ids), all on the device."""
    tokens = np.zeros((B, WIDTH), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    counts = np.array([len(p) for p in prompts], np.int32)
    sampling = SamplingArrays.create(SamplingParams(), 0, [0] * B)
    state = start_state(model, model.init_cache(B, CAPACITY), np.full(B, 30, np.int32))
    stop_ids = jnp.full(16, -1, jnp.int32)
    return SplitModel(model), state, jnp.asarray(tokens), jnp.asarray(counts), sampling, stop_ids


def prefill_and_decode(model: Llama, prompts=PROMPTS):
    """(state after prefill, state after 8 tokens, those tokens). The first is copied."""
    split, state, tokens, counts, sampling, stop_ids = inputs(model, prompts)
    first = prefill(split.static, split.leaves, state, tokens, counts, implementation=None)
    kept = jax.tree.map(np.asarray, jax.tree.map(jnp.copy, first))
    second, made = decode(
        split.static, split.leaves, first, sampling, stop_ids,
        num_steps=8, num_logprobs=0, implementation=None,
    )  # fmt: skip
    return kept, jax.tree.map(np.asarray, second), jax.tree.map(np.asarray, made)


def test_nothing_is_sent_to_or_from_the_host_in_the_loop():
    model = random_model()
    split, state, tokens, counts, sampling, stop_ids = inputs(model)
    static = {"num_steps": 8, "num_logprobs": 0, "implementation": None}
    with jax.transfer_guard("disallow"):
        state = prefill(split.static, split.leaves, state, tokens, counts, implementation=None)
        for _ in range(2):
            state, made = decode(split.static, split.leaves, state, sampling, stop_ids, **static)
    assert jax.device_get(made.tokens).shape == (8, B)
    # The guard does see a host array.
    with (
        jax.transfer_guard("disallow"),
        pytest.raises(Exception, match=r"Disallowed host-to-device transfer"),
    ):
        decode(split.static, split.leaves, state, sampling, np.full(16, -1, np.int32), **static)


TO_THE_HOST = r"infeed|outfeed|\bsend\(|\brecv\(|callback|host_compute"


def test_the_compiled_loop_asks_the_host_for_nothing_and_copies_no_cache():
    model = random_model()
    split, state, _, _, sampling, stop_ids = inputs(model)
    hlo = decode.lower(
        split.static, split.leaves, state, sampling, stop_ids,
        num_steps=8, num_logprobs=0, implementation=None,
    ).compile().as_text()  # fmt: skip
    assert not re.search(TO_THE_HOST, hlo)
    # On a GPU the host would choose the branch.
    assert " conditional(" not in hlo
    layer = ",".join(map(str, state.cache.keys[0].shape))
    assert f"f32[{layer}]" in hlo
    assert not re.search(rf"f32\[{layer}\]\S* copy", hlo)


def test_the_search_sees_a_planted_callback():
    def leaky(x):
        jax.debug.callback(lambda value: None, x)
        return x + 1

    hlo = jax.jit(leaky).lower(jnp.zeros(3)).compile().as_text()
    assert re.search(TO_THE_HOST, hlo)


def test_the_search_sees_a_planted_branch():
    def branching(x):
        return jax.lax.cond(x[0] > 0, jnp.sort, jnp.cumsum, x)

    assert " conditional(" in jax.jit(branching).lower(jnp.zeros(300)).compile().as_text()


def used_only_by(row: int, *, in_prompt: bool = False) -> tuple[int, int]:
    """(token, index) of a token that row `row`'s prompt holds, or that greedy it makes, and that
    stands nowhere before in its text nor anywhere in the other rows."""
    made = [naive_greedy(tuple(prompt), 30) for prompt in PROMPTS]
    others = {t for r, text in enumerate(made) if r != row for t in (*PROMPTS[r], *text)}
    mine = PROMPTS[row] if in_prompt else made[row]
    before = set() if in_prompt else set(PROMPTS[row])
    for index, token in enumerate(mine):
        if token not in others | before | set(mine[:index]):
            return token, index
    raise AssertionError("every token is used elsewhere")


# Rows
def test_a_stopped_row_stays_as_it_is_to_the_bit():
    model = random_model()
    split, state, tokens, counts, sampling, _ = inputs(model)
    state = prefill(split.static, split.leaves, state, tokens, counts, implementation=None)
    (stop, index), texts = used_only_by(0), [naive_greedy(tuple(p), 30) for p in PROMPTS]
    assert 0 < index < 7
    stop_ids = jnp.asarray([stop] + [-1] * 15, jnp.int32)
    states, tokens = [], []
    for _ in range(2):
        state, made = decode(
            split.static, split.leaves, state, sampling, stop_ids,
            num_steps=8, num_logprobs=0, implementation=None,
        )  # fmt: skip
        states.append(jax.tree.map(np.asarray, jax.tree.map(jnp.copy, state)))
        tokens.append(np.asarray(made.tokens))
    first, second = states
    assert tokens[0][:, 0].tolist() == texts[0][: index + 1] + [-1] * (7 - index)
    assert tokens[1][:, 0].tolist() == [-1] * 8
    np.testing.assert_array_equal(np.concatenate(tokens)[:, 2], texts[2][:16])
    for old, new in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(old[0], new[0])
    assert first.cache.lengths[0] == len(PROMPTS[0]) + index + 1
    assert first.remaining.tolist() == [0, 22, 22]


def test_a_row_without_tokens_in_a_portion_of_prefill_stays_as_it_is():
    split, state, tokens, counts, _, _ = inputs(random_model())
    first = prefill(split.static, split.leaves, state, tokens, counts, implementation=None)
    before = jax.tree.map(np.asarray, jax.tree.map(jnp.copy, first))
    portion = jnp.asarray([0, 0, 16], jnp.int32)
    after = prefill(split.static, split.leaves, first, tokens, portion, implementation=None)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old[:2], new[:2])
    expected = naive_logits(random_params(CONFIG), CONFIG, PROMPTS[2] * 2)[-1]
    np.testing.assert_allclose(after.logits[2], expected, atol=1e-4)
    assert np.abs(before.logits[2] - expected).max() > 0.1


def test_seen_marks_prompts_and_generated_tokens_only():
    before, after, made = prefill_and_decode(random_model())
    for row, prompt in enumerate(PROMPTS):
        assert set(np.flatnonzero(before.seen[row])) == set(prompt)
        assert set(np.flatnonzero(after.seen[row])) == {*prompt, *made.tokens[:, row].tolist()}


# Weights that are not finite
def poisoned(token: int, value: float = np.nan) -> Llama:
    """The random model, with one token's embedding not finite."""
    params = dict(random_params(CONFIG))
    params["embed"] = params["embed"].copy()
    params["embed"][token] = value
    return Llama.from_params(CONFIG, {name: jnp.asarray(w) for name, w in params.items()})


@pytest.mark.parametrize("row", [0, 1, 2])
def test_nan_stops_with_its_step_and_row(row):
    token, index = used_only_by(row)
    message = f"logits are not finite at generated token {index + 1} of sequence {row}"
    with pytest.raises(NonFiniteLogitsError, match=message) as caught:
        run(PROMPTS, max_tokens=30, ignore_eos=True, model=poisoned(token))
    assert (caught.value.step, caught.value.row) == (index + 1, row)
    # Up to there all is well.
    results = run(PROMPTS, max_tokens=index + 1, ignore_eos=True, model=poisoned(token))
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.tokens == naive_greedy(tuple(prompt), 30)[: index + 1]


def test_nan_in_a_prompt_stops_at_the_first_token():
    token, _ = used_only_by(1, in_prompt=True)
    with pytest.raises(NonFiniteLogitsError, match="generated token 0 of sequence 1") as caught:
        run(PROMPTS, max_tokens=5, model=poisoned(token))
    assert (caught.value.step, caught.value.row) == (0, 1)
    with pytest.raises(NonFiniteLogitsError, match="generated token 0 of sequence 0"):
        run_one(PROMPTS[0], max_tokens=5, model=poisoned(PROMPTS[0][0], np.inf))


def test_a_token_after_the_stop_does_not_matter():
    """The last token's logits are computed, but nothing is drawn from them."""
    token, index = used_only_by(0)
    result = run_one(PROMPTS[0], max_tokens=30, stop_token_ids=(token,), model=poisoned(token))
    assert result.tokens == naive_greedy((5,), 30)[: index + 1]


@pytest.mark.parametrize(("sick_row", "in_prompt"), [(1, True), (2, True), (0, False), (2, False)])
def test_rows_beside_a_poisoned_one_are_the_same(sick_row, in_prompt):
    """Up to rounding: some CPUs compute a vector in another way if a NaN is in it."""
    token, _ = used_only_by(sick_row, in_prompt=in_prompt)
    others = [row for row in range(B) if row != sick_row]
    healthy, sick = prefill_and_decode(random_model()), prefill_and_decode(poisoned(token))
    assert not sick[2].finite[:, sick_row].all()
    assert sick[2].finite[:, others].all()
    for old, new in zip(jax.tree.leaves(healthy), jax.tree.leaves(sick), strict=True):
        if old.shape[0] != B:  # [steps, B]
            old, new = np.moveaxis(old, 1, 0), np.moveaxis(new, 1, 0)
        old, new = (np.asarray(x)[others].astype(np.float64) for x in (old, new))
        np.testing.assert_allclose(new, old, rtol=0, atol=5e-5)
