"""Plans of equal work: nothing is lost or done twice, and no block has more than its share."""

from __future__ import annotations

import heapq
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxdecode.pallas_kernels.split_config import NUM_SMS, choose_num_splits
from jaxdecode.pallas_kernels.split_plan import make_plan

BLOCK = 128
# What a chunk costs beside its tiles, in tiles: on an H200 every further chunk of a multiprocessor
# cost 1.2 to 1.5 us, and a tile takes 1.9 us when all read.
OVERHEAD = 0.75


def plan(lo, hi, heads, num_blocks):
    lo, hi = (jnp.asarray(x, jnp.int32) for x in (lo, hi))
    found = make_plan(lo, hi, block_kv=BLOCK, heads=heads, num_blocks=num_blocks)
    assert all(x.dtype == np.int32 for x in found)
    return jax.tree.map(np.asarray, found)


def chunks_of(blocks, chunks):
    """(block, number, sequence, head, tiles, (part, parts)) of every chunk of a block."""
    for block, (first, count, tiles, *first_chunk) in enumerate(blocks.tolist()):
        end_before = 0
        assert count == 0 or first_chunk == chunks[first].tolist()
        for number in range(first, first + count):
            b, head, base, begin, end, *place = chunks[number].tolist()
            assert begin == end_before, "a block's tiles are counted through"
            assert begin < end, "no chunk is empty"
            end_before = end
            yield block, number, b, head, range(base + begin, base + end), tuple(place)
        assert end_before == tiles


def check_plan(lo, hi, heads, num_blocks):
    blocks, chunks, idle = plan(lo, hi, heads, num_blocks)
    assert idle.tolist() == [
        int(min(x) // BLOCK >= -(-max(y) // BLOCK)) for x, y in zip(lo, hi, strict=True)
    ]
    assert len(blocks) == num_blocks
    assert len(chunks) == num_blocks + len(lo) * heads - 1
    seen = [range(min(x) // BLOCK, -(-max(y) // BLOCK)) for x, y in zip(lo, hi, strict=True)]
    owner, places, work = {}, {}, [0] * num_blocks
    for block, number, b, head, tiles, place in chunks_of(blocks, chunks):
        work[block] += len(tiles)
        places[number] = place
        for tile in tiles:
            assert (b, head, tile) not in owner, "a tile has one owner"
            owner[b, head, tile] = number
    expected = [(b, h, t) for b, tiles in enumerate(seen) for h in range(heads) for t in tiles]
    assert sorted(owner) == expected
    assert 20 * max(work) <= 21 * -(-len(expected) // num_blocks)
    for (b, tiles), head in itertools.product(enumerate(seen), range(heads)):
        numbers = sorted({owner[b, head, tile] for tile in tiles})
        assert numbers == [numbers[0] + i for i in range(len(numbers))] if numbers else not tiles
        assert [places[x] for x in numbers] == [(i, len(numbers)) for i in range(len(numbers))]


LENGTHS = st.lists(
    st.one_of(st.just(0), st.integers(0, 3 * BLOCK), st.integers(0, 5000)), min_size=5, max_size=5
)


@pytest.mark.parametrize(("heads", "num_blocks"), [(1, 1), (3, 4), (2, 132)])
@given(LENGTHS, st.sampled_from([1, 100, 300, 10_000]))
@example([0] * 5, 10_000)
@example([0, 0, 128, 0, 0], 10_000)
@example([128] * 5, 10_000)
def test_every_visible_tile_belongs_to_one_chunk(heads, num_blocks, lengths, window):
    hi = [[max(x - 1, 0), x] for x in lengths]
    check_plan([[max(x - window, 0) for x in row] for row in hi], hi, heads, num_blocks)


def ragged(B, shortest, longest):
    """Lengths spread evenly in their logarithm, in no order."""
    lengths = np.geomspace(shortest, longest, B).astype(int)
    return np.random.default_rng(0).permutation(lengths).tolist()


# Lengths of the sequences, and KV heads.
BATCHES = {
    "64 x 8k": ([8192] * 64, 2),
    "16 x 8k, 32 heads": ([8192] * 16, 32),
    "128 x 2k": ([2048] * 128, 2),
    "256 x 256": ([256] * 256, 2),
    "8 x 8k": ([8192] * 8, 2),
    "17 x 8k": ([8192] * 17, 8),
    "ragged": (ragged(32, 512, 65536), 2),
    "few, ragged": (ragged(6, 512, 65536), 8),
    "one is long": ([512] * 31 + [65536], 2),
    "half are idle": ([0, 4096] * 16, 8),
}


def time_by_plan(lengths, K):
    """When the last block is done, in the time of a tile."""
    hi = np.array(lengths)[:, None]
    blocks, chunks, *_ = plan(np.zeros_like(hi), hi, K, NUM_SMS)
    work = np.zeros(NUM_SMS)
    for block, *_, tiles, _ in chunks_of(blocks, chunks):
        work[block] += len(tiles) + OVERHEAD
    return work.max()


def time_in_equal_chunks(lengths, K, C):
    """The same for C chunks per sequence, each taken by the first multiprocessor that is free."""
    tiles = [-(-length // BLOCK) for length in lengths]
    done = [0.0] * NUM_SMS
    for c, _, n in itertools.product(range(C), range(K), tiles):
        heapq.heapreplace(done, done[0] + (c + 1) * n // C - c * n // C + OVERHEAD)
    return max(done)


@pytest.mark.parametrize("name", BATCHES)
def test_no_number_of_equal_chunks_is_faster(name):
    lengths, K = BATCHES[name]
    B, S = len(lengths), max(lengths)
    planned = time_by_plan(lengths, K)
    chosen = choose_num_splits((B, 1, 8 * K, 128), (B, S, K, 128))
    for C in {1, 2, 8, 24, chosen}:
        assert planned <= time_in_equal_chunks(lengths, K, C)
    if "ragged" in name or "one is long" in name:
        assert planned <= 0.65 * time_in_equal_chunks(lengths, K, chosen)


@pytest.mark.parametrize("name", ["128 x 2k", "256 x 256", "half are idle"])
def test_equal_items_that_fill_the_blocks_are_not_cut(name):
    lengths, K = BATCHES[name]
    hi = np.array(lengths)[:, None]
    blocks, chunks, _ = plan(np.zeros_like(hi), hi, K, NUM_SMS)
    assert {place for *_, place in chunks_of(blocks, chunks)} == {(0, 1)}


def test_layers_of_a_step_share_one_plan():
    """Equal plans are computed once: XLA sees that they are the same."""

    def layers(n):
        def step(lo, hi, x):
            for _ in range(n):
                x = x + sum(y.sum() for y in make_plan(lo, hi, block_kv=128, heads=2, num_blocks=4))
            return x

        ranges, x = jax.ShapeDtypeStruct((8, 1), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
        return jax.jit(step).lower(ranges, ranges, x).compile().as_text()

    assert layers(8).count("compare(") == layers(1).count("compare(") > 0
