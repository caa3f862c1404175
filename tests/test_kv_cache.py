"""KVCache: what is written, what is not, and that a donated cache is written in place."""

from __future__ import annotations

import dataclasses
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from meshes import dealt, make_mesh
from naive_llama import CONFIG, random_model

from jaxdecode.models.kv_cache import BLOCK, KVCache, round_up_capacity
from jaxdecode.models.sharding import fit, fit_mesh
from jaxdecode.pallas_kernels import Part

B, S, T = 3, 128, 4
K, H = CONFIG.num_kv_heads, CONFIG.head_dim
CANARY = -77.0


def canaries(lengths, dtype="float32") -> KVCache:
    """A cache full of canaries, so that every write can be seen."""
    cache = KVCache.create(CONFIG, B, S, dtype)
    full = tuple(jnp.full_like(x, CANARY) for x in cache.keys)
    return KVCache(keys=full, values=full, lengths=jnp.asarray(lengths, jnp.int32))


def new_tokens(seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((B, T, K, H)), dtype) for _ in range(2)]


@jax.jit
def append(cache: KVCache, k, v, num_tokens) -> KVCache:
    return cache.append(1, k, v, num_tokens).advance(num_tokens)


def expected(old, new, lengths, num_tokens):
    """What one array must hold: only the slots of real tokens that exist are written."""
    out = np.array(old)
    for b in range(B):
        for t in range(num_tokens[b]):
            if lengths[b] + t < out.shape[1]:
                out[b, lengths[b] + t] = new[b, t]
    return out


def check_append(lengths, num_tokens, dtype="float32"):
    cache, (k, v) = canaries(lengths, dtype), new_tokens(dtype=dtype)
    after = append(cache, k, v, jnp.asarray(num_tokens, jnp.int32))
    np.testing.assert_array_equal(after.keys[0], cache.keys[0])
    np.testing.assert_array_equal(after.values[0], cache.values[0])
    np.testing.assert_array_equal(after.keys[1], expected(cache.keys[1], k, lengths, num_tokens))
    np.testing.assert_array_equal(
        after.values[1], expected(cache.values[1], v, lengths, num_tokens)
    )
    np.testing.assert_array_equal(after.lengths, np.add(lengths, num_tokens))
    return after


@pytest.mark.parametrize(
    ("lengths", "num_tokens"),
    [
        ([0, 0, 0], [4, 4, 4]),
        ([0, 5, 100], [1, 0, 3]),
        ([0, 0, 0], [0, 0, 0]),
        ([124, 124, 124], [4, 4, 4]),
        ([124, 125, 127], [4, 3, 1]),
        ([127, 0, 127], [4, 4, 0]),
        ([125, 126, 128], [4, 4, 4]),
        ([128, 128, 129], [1, 0, 2]),
        ([1000, 2**30, 2**31 - 8], [4, 4, 4]),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_append_writes_real_tokens_that_fit_and_nothing_else(lengths, num_tokens, dtype):
    check_append(lengths, num_tokens, dtype)


@settings(max_examples=100)
@given(
    st.lists(st.integers(0, 140), min_size=B, max_size=B),
    st.lists(st.integers(0, T), min_size=B, max_size=B),
)
def test_append_of_any_lengths(lengths, num_tokens):
    check_append(lengths, num_tokens)


def test_the_append_check_sees_what_dynamic_update_slice_would_do():
    """The planted fault: a clamped write over the newest tokens."""
    cache, (k, _) = canaries([126, 0, 0]), new_tokens()
    shifted = jax.lax.dynamic_update_slice(cache.keys[1], k[:1], (0, 126, 0, 0))
    wanted = expected(cache.keys[1], k, [126, 0, 0], [4, 0, 0])
    assert np.array_equal(wanted[0, 124], np.full((K, H), CANARY))
    assert not np.array_equal(np.asarray(shifted)[0, 124], wanted[0, 124])


def test_padding_that_is_not_finite_is_never_written():
    cache, (k, v) = canaries([10, 20, 126]), new_tokens()
    num_tokens = jnp.array([1, 0, 4], jnp.int32)
    padding = jnp.arange(T)[None, :, None, None] >= num_tokens[:, None, None, None]
    k, v = jnp.where(padding, jnp.nan, k), jnp.where(padding, jnp.inf, v)
    after = append(cache, k, v, num_tokens)
    for x in (*after.keys, *after.values):
        assert np.isfinite(x).all()


def test_new_tokens_are_cast_to_the_type_of_the_cache():
    cache, (k, v) = canaries([0, 0, 0], "bfloat16"), new_tokens()
    after = append(cache, k, v, jnp.full(B, T, jnp.int32))
    assert {x.dtype for x in (*after.keys, *after.values)} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(after.keys[1][:, :T], k.astype("bfloat16"))


def test_appending_bit_by_bit_is_appending_at_once():
    (k, v), lengths = new_tokens(), [3, 120, 126]
    at_once = append(canaries(lengths), k, v, jnp.full(B, T, jnp.int32))
    one_by_one = canaries(lengths)
    one = jnp.array([1, 1, 1], jnp.int32)
    for t in range(T):
        rolled = [jnp.roll(x, -t, axis=1) for x in (k, v)]
        one_by_one = append(one_by_one, *rolled, one)
    for a, b in zip(jax.tree.leaves(at_once), jax.tree.leaves(one_by_one), strict=True):
        np.testing.assert_array_equal(a, b)


def test_overflowed_is_false_at_capacity_and_true_past_it():
    cache, (k, v) = canaries([124, 125, 0]), new_tokens()
    at = append(cache, k, v, jnp.array([4, 3, 0], jnp.int32))
    assert np.asarray(at.lengths).tolist() == [128, 128, 0]
    assert np.asarray(at.overflowed).tolist() == [False, False, False]
    past = append(at, k, v, jnp.array([1, 0, 0], jnp.int32))
    assert np.asarray(past.overflowed).tolist() == [True, False, False]
    for before, after in zip(at.keys + at.values, past.keys + past.values, strict=True):
        np.testing.assert_array_equal(before, after)


def test_advance_counts_each_sequence():
    cache = canaries([0, 5, 127]).advance(jnp.array([3, 0, 2], jnp.int32))
    assert np.asarray(cache.lengths).tolist() == [3, 5, 129]
    assert cache.lengths.dtype == jnp.int32


@pytest.mark.parametrize(
    ("to", "left"),
    [
        (10, [10, 5, 10]),
        ([4, 50, 100], [4, 5, 100]),
        (0, [0, 0, 0]),
        (-3, [0, 0, 0]),
        (10**6, [20, 5, 128]),
        (np.array([20, 5, 128]), [20, 5, 128]),
    ],
    ids=str,
)
def test_truncate_only_ever_shortens(to, left):
    cache = canaries([20, 5, 130])
    shorter = cache.truncate(np.array(to) if isinstance(to, list) else to)
    assert np.asarray(shorter.lengths).tolist() == left
    assert shorter.lengths.dtype == jnp.int32
    for before, after in zip(cache.keys, shorter.keys, strict=True):
        assert before is after


def test_truncated_tokens_are_written_over():
    (k, v), count = new_tokens(), jnp.full(B, T, jnp.int32)
    cache = append(canaries([0, 0, 0]), k, v, count).truncate(2)
    other = new_tokens(seed=1)
    after = append(cache, *other, count)
    np.testing.assert_array_equal(after.keys[1][:, :2], k[:, :2])
    np.testing.assert_array_equal(after.keys[1][:, 2 : 2 + T], other[0])
    assert np.asarray(after.lengths).tolist() == [6, 6, 6]


@pytest.mark.parametrize(
    ("asked", "slots"), [(1, 128), (127, 128), (128, 128), (129, 256), (4096, 4096)]
)
def test_capacity_is_rounded_up(asked, slots):
    cache = KVCache.create(CONFIG, 2, asked, "bfloat16")
    assert (cache.batch_size, cache.capacity) == (2, slots)
    assert round_up_capacity(asked) == slots
    assert slots % BLOCK == 0
    assert {x.shape for x in cache.keys + cache.values} == {(2, slots, K, H)}
    assert len(cache.keys) == len(cache.values) == CONFIG.num_layers
    assert cache.keys[0].dtype == jnp.bfloat16
    assert not np.asarray(cache.lengths).any()


@pytest.mark.parametrize(("batch_size", "capacity"), [(0, 128), (-1, 128), (1, 0), (1, -5)])
def test_empty_caches_are_refused(batch_size, capacity):
    message = f"must be at least 1, found {batch_size} and {capacity}"
    with pytest.raises(ValueError, match=message):
        KVCache.create(CONFIG, batch_size, capacity, "float32")


def test_cache_is_a_pytree_of_one_array_pair_per_layer():
    cache = canaries([1, 2, 3])
    leaves, structure = jax.tree.flatten(cache)
    assert len(leaves) == 2 * CONFIG.num_layers + 1
    again = jax.tree.unflatten(structure, leaves)
    assert isinstance(again, KVCache)
    assert again.lengths is cache.lengths


def test_append_has_a_gradient():
    k, v = new_tokens()
    num_tokens = jnp.array([4, 2, 3], jnp.int32)

    def total(k, old):
        cache = dataclasses.replace(canaries([0, 3, 126]), keys=old)
        return cache.append(1, k, v, num_tokens).keys[1].sum()

    of_new, of_old = jax.grad(total, argnums=(0, 1))(k, canaries([0, 0, 0]).keys)
    # Row 0 writes 4 tokens, row 1 two, and of row 2's three only two fit.
    np.testing.assert_array_equal(of_new[:, :, 0, 0], [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]])
    assert float(of_old[1].sum()) == K * H * (B * S - 8)
    assert float(of_old[0].sum()) == 0


# In place: no copy of a whole layer's cache in the compiled step.
ODD_CAPACITY = 640  # a shape that nothing else in the step has


def decode_step_hlo(*, donate: bool, keep_old: bool = False) -> str:
    graph, state = nnx.split(random_model())

    def step(state, tokens, cache):
        logits, new = nnx.merge(graph, state)(tokens, cache, logits="last")
        return (logits, new, cache) if keep_old else (logits, new)

    cache = random_model().init_cache(B, ODD_CAPACITY)
    jitted = jax.jit(step, donate_argnums=2 if donate else ())
    return jitted.lower(state, jnp.zeros((B, 1), jnp.int32), cache).compile().as_text()


def copies_of_a_layer(hlo: str) -> list[str]:
    layer = rf"f32\[{B},{ODD_CAPACITY},{K},{H}\]\S* copy"
    return [line for line in hlo.splitlines() if re.search(layer, line)]


def test_a_donated_step_copies_no_cache():
    hlo = decode_step_hlo(donate=True)
    assert f"f32[{B},{ODD_CAPACITY},{K},{H}]" in hlo
    assert copies_of_a_layer(hlo) == []
    aliases = hlo.splitlines()[0].partition("input_output_alias=")[2]
    assert aliases.count("alias)") >= 2 * CONFIG.num_layers


@pytest.mark.parametrize("fault", [{"donate": False}, {"donate": True, "keep_old": True}], ids=str)
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_the_copy_count_sees_planted_copies(fault):
    assert len(copies_of_a_layer(decode_step_hlo(**fault))) >= 2 * CONFIG.num_layers


def test_a_donated_cache_is_gone():
    cache, (k, v) = canaries([0, 0, 0]), new_tokens()
    cache = jax.tree.map(jnp.copy, cache)
    donated = jax.jit(lambda cache: cache.append(0, k, v, cache.lengths + 1), donate_argnums=0)
    pointer = cache.keys[0].unsafe_buffer_pointer()
    after = donated(cache)
    assert cache.keys[0].is_deleted()
    assert after.keys[0].unsafe_buffer_pointer() == pointer


# Several parts
def hands(whole: np.ndarray, count: int) -> list[np.ndarray]:
    """What each of `count` devices holds of [B, S, ...]."""
    return np.split(dealt(whole, count, BLOCK), count, axis=1)


@jax.jit
def append_to_part(cache: KVCache, k, v, num_tokens, part) -> KVCache:
    return cache.append(0, k, v, num_tokens, part)


def check_append_by_part(count, lengths, num_tokens, width=T):
    """Each device, given all new tokens, writes those that are its own and nothing else."""
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, B, width, K, H)).astype(np.float32)
    old = rng.standard_normal((B, 2 * count * BLOCK, K, H)).astype(np.float32)
    wanted = [hands(expected(old, new, lengths, num_tokens), count) for new in (k, v)]
    for part, mine in enumerate(hands(old, count)):
        cache = KVCache((jnp.asarray(mine),), (jnp.asarray(mine),), jnp.asarray(lengths), count)
        assert cache.capacity == 2 * BLOCK
        after = append_to_part(cache, k, v, jnp.asarray(num_tokens), part)
        np.testing.assert_array_equal(after.keys[0], wanted[0][part])
        np.testing.assert_array_equal(after.values[0], wanted[1][part])


NEAR_BORDERS = st.integers(0, 7).flatmap(
    lambda block: st.integers(max(0, block * BLOCK - T - 1), block * BLOCK + 2)
)


@settings(max_examples=40)
@given(
    st.sampled_from([2, 3]),
    st.lists(NEAR_BORDERS, min_size=B, max_size=B),
    st.lists(st.integers(0, T), min_size=B, max_size=B),
)
def test_each_part_writes_its_own_tokens(count, lengths, num_tokens):
    check_append_by_part(count, np.int32(lengths), np.int32(num_tokens))


@pytest.mark.parametrize("count", [1, 4])
def test_one_append_over_many_parts(count):
    """The last row fills its cache from empty and runs past it."""
    lengths, num_tokens = np.int32([100, 255, 0]), np.int32([700, 1, 300 * count])
    check_append_by_part(count, lengths, num_tokens, width=1200)


def test_the_check_by_part_sees_another_way_of_dealing(monkeypatch):
    monkeypatch.setattr(KVCache, "part", lambda cache, index: Part(index, cache.num_parts, 64))
    # A width of its own, or another test's compiled append would run.
    with pytest.raises(AssertionError, match="Mismatched elements"):
        check_append_by_part(2, np.int32([126, 64, 0]), np.int32([3, 4, 0]), width=5)


@pytest.mark.parametrize(
    ("asked", "parts", "slots"),
    [(1, 8, 1024), (1024, 8, 1024), (1025, 8, 2048), (300, 2, 512), (300, 3, 384)],
)
def test_every_part_has_whole_blocks(asked, parts, slots):
    assert round_up_capacity(asked, parts) == slots
    assert slots % (parts * BLOCK) == 0


def test_a_cache_on_a_mesh_lies_in_its_parts():
    sharding = fit_mesh(CONFIG, make_mesh((2, 2, 2)))
    cache = KVCache.create(CONFIG, 4, 300, "bfloat16", sharding)
    assert (cache.batch_size, cache.capacity, cache.num_parts) == (4, 512, 2)
    for x in cache.keys + cache.values:
        assert x.sharding.is_equivalent_to(sharding.named("BSKH"), x.ndim)
    assert {x.addressable_data(0).shape for x in cache.keys} == {(2, 256, K // 2, H)}
    assert not any(np.asarray(x.astype("float32")).any() for x in cache.keys + cache.values)
    cache = cache.advance(jnp.array([512, 513, 7, 0], jnp.int32))
    assert np.asarray(cache.overflowed).tolist() == [False, True, False, False]
    assert np.asarray(cache.truncate(300).lengths).tolist() == [300, 300, 7, 0]


def test_the_number_of_parts_belongs_to_the_type():
    one, two = (KVCache.create(CONFIG, 1, 128, "float32", fit(CONFIG, {"seq": n})) for n in (1, 2))
    assert (one.num_parts, two.num_parts) == (1, 2)
    assert jax.tree.structure(one) != jax.tree.structure(two)
    again = jax.tree.map(lambda x: x, two)
    assert again.num_parts == 2


@pytest.mark.parametrize(("batch_size", "rows"), [(1, 4), (6, 8)])
def test_a_batch_that_does_not_divide_is_refused(batch_size, rows):
    message = (
        f"batch_size={batch_size} must be a multiple of data=4 in the mesh; make {rows} rows, of "
        "which some idle"
    )
    with pytest.raises(ValueError, match=message):
        KVCache.create(CONFIG, batch_size, 128, "float32", fit(CONFIG, {"data": 4}))
