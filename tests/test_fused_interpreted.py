"""A layer in one kernel in Mosaic's interpreter, against its plain formula.

The interpreter has no assembly, so nothing waits for slots here: puts and takes are stores and
loads of their memory. One thread block has everything in order by itself. Several are run again
with the slots that they left until nothing changes any more: then all have taken what they would
have waited for.

conftest.py leaves this file out where jax has no interpreter for the kernel (before 0.11.2).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_fused_attend
import test_fused_layer
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import shared_memory
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_runs import accumulate, interpreted
from test_fused_append import append_to
from test_fused_attend import attend_to
from test_fused_layer import EPS, distance, operands, sizes_of

from jaxdecode.pallas_kernels import fused_layer, layer_attention, layer_kernel

# What is handed over at most, one after the other: chunks, what is merged of them, three vectors,
# and parts of each product's column blocks.
HAND_OVERS = 2 + 3 + 4


def put_words(words, turn, ref):
    """Each beside the turn."""
    ref[...] = jnp.stack([words, jnp.full_like(words, turn)], axis=1).reshape(-1)


def words_of(ref, dtype):
    """The values [...] in the slots."""
    words = ref[...].reshape(-1, 2)[:, 0]
    return lax.bitcast_convert_type(words, dtype).reshape(-1)


def put_line(x, turn, ref):
    per_word = 4 // x.dtype.itemsize
    x = x.reshape(-1, per_word) if per_word > 1 else x
    put_words(lax.bitcast_convert_type(x, jnp.int32), turn, ref)


def moved(ref, elements):
    """The Ref of as many elements, some elements on."""
    starts = [indexer.indices[0].start for indexer in ref.transforms]
    return ref.ref.at[pl.ds(sum(starts) + elements, ref.shape[0])]


def put_columns(matrix, row, turn, ref, first, count, distance):
    for column in range(8):

        @pl.when((column >= first) & (column < first + count))
        def _(column=column):
            line = moved(ref, column * distance)
            put_line(matrix[:, column], turn, line)
            put_line(jnp.full(matrix.shape[0], row[column]), turn, moved(line, ref.shape[0]))


def take(turn, refs, kind):
    del turn
    return [words_of(ref, kind.dtype) for ref in refs]


def take_lines(turn, refs, fills, most, count, distance):
    del turn

    def line(ref, fill, i):
        values = words_of(moved(ref, jnp.minimum(i, count - 1) * distance), jnp.float32)
        return jnp.where(i < count, values, fill)

    return [[line(*each, i) for i in range(most)] for each in zip(refs, fills, strict=True)]


deallocate = shared_memory.Barrier.deallocate


def deallocate_unseen(barrier):
    """The warpgroup that streams does not wait for its last tiles. The other one has to."""
    seen = barrier.last_observed_phase_by_thread
    for thread in [thread for thread in seen if thread.warpgroup_id == 1]:
        del seen[thread]
    deallocate(barrier)


@pytest.fixture
def without_waiting(monkeypatch):
    replaced = {
        "accumulate": accumulate,
        "line_of": lambda matrix, _: matrix[0],
        "put_columns": put_columns,
        "put_line": put_line,
        "take": take,
        "take_lines": take_lines,
    }
    for module in (layer_kernel, layer_attention):
        for name in replaced.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, replaced[name])
    # So that three thread blocks have more than are taken together.
    monkeypatch.setattr(layer_attention, "_MOST_CHUNKS", 2)
    monkeypatch.setattr(layer_kernel, "_MOST_PARTS", 1)
    monkeypatch.setattr(shared_memory.Barrier, "deallocate", deallocate_unseen)


# D, F, N * H and the columns of the next projections: about as small as the kernel takes them.
SIZES = {
    "attends": (512, 512, 1024, (256, 256)),
    "projects": (512, 512, 512, (256, 256)),
}
TURN = np.array([1, 1], np.int32)
# Of the last layer, that projects nothing.
LAST_TURN = np.array([1, 0], np.int32)


class Case(NamedTuple):
    """What `fused_layer.run` is given, but for the slots and the turn."""

    attention: Any
    x: Any
    weights: fused_layer.LayerWeights
    append: fused_layer.Append | None = None


@pytest.fixture
def make_case(monkeypatch):
    """make_case(name): a layer that appends, after it attended to a part of the cache or others
    did."""

    def make(name) -> Case:
        monkeypatch.setitem(test_fused_layer.MODELS, name, SIZES[name])
        monkeypatch.setitem(test_fused_attend.HEADS, name, 1)
        attention, x, weights = operands(name)
        if name == "attends":
            attention = attend_to(name, 3, 200)
        return Case(attention, x, weights, append_to(weights, 9))

    return make


@pytest.fixture
def run(monkeypatch, without_waiting):
    """run(num_blocks, case) is the kernel's call with slots and the turn."""

    @jax.jit
    def call(case, slots, turn):
        return fused_layer._forward.__wrapped__(*case, slots, turn, eps=EPS)

    def of_blocks(num_blocks, case):
        monkeypatch.setattr(fused_layer, "NUM_SMS", num_blocks)
        return functools.partial(call, case)

    return of_blocks


def start(case):
    return fused_layer.new_slots(case.attention, case.weights)


def expected(case):
    @jax.jit
    def plain(case):
        return fused_layer.plain(*case, None, TURN, eps=EPS)[:-1]

    return plain(case)


def far(found, wanted) -> list[bool]:
    """Which results are farther from the wanted ones than rounding takes them."""
    assert len(found) == len(wanted)
    return [distance(*pair) > 1e-2 for pair in zip(found, wanted, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_one_thread_block(make_case, run, name):
    case = make_case(name)
    with interpreted():
        *found, _ = run(1, case)(start(case), TURN)
    assert not any(far(found, expected(case)))


def check_three_blocks(case, run, turn, of_interest, wanted):
    """What three thread blocks find that are run until all is handed over, and what one run does
    not."""
    call, slots = run(3, case), start(case)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        for runs in range(HAND_OVERS + 1):
            before = slots
            *found, slots = call(slots, turn)
            if runs == 0:
                assert any(far(of_interest(found), wanted))
            if not (slots != before).any():
                break
    assert not (slots != before).any()
    assert not any(far(of_interest(found), wanted))


@pytest.mark.slow
def test_three_thread_blocks(make_case, run):
    """Each has column blocks to itself, and all share some."""
    case = make_case("projects")
    assert all(product.whole and product.shared for product in sizes_of("projects", 3).products)
    check_three_blocks(case, run, TURN, lambda found: found, expected(case))


@pytest.mark.slow
def test_three_thread_blocks_of_the_last_layer(make_case, run):
    """They attend. What would be the next layer's queries is anything, and nothing is appended."""
    case = make_case("attends")
    x, *_ = expected(case)

    def without_queries(found):
        x, _, *caches = found
        return x, *caches

    wanted = x, case.append.keys, case.append.values
    check_three_blocks(case, run, LAST_TURN, without_queries, wanted)
