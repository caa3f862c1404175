"""A layer from one attention to the next in one kernel: how thread blocks share it, what its plain
formula computes, and that it lowers for CUDA. What the kernel computes is tested on a GPU.

The letters are those of layer_config.py.
"""

from __future__ import annotations

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdecode.models.random_model import random_array
from jaxdecode.pallas_kernels import flash_decode, fused_layer
from jaxdecode.pallas_kernels.fused_layer import LayerWeights
from jaxdecode.pallas_kernels.layer_config import (
    COLUMNS,
    FEWEST_STAGES,
    ROWS,
    TILES,
    LayerConfig,
    Product,
    layer_config,
)

EPS = 1e-5
# D, F, N * H, and the columns of the next layer's projections.
MODELS = {
    "llama-3.1-8b": (4096, 14336, 4096, (4096, 2048)),
    "codellama-34b": (8192, 22016, 8192, (8192, 2048)),
    "llama-2-7b": (4096, 11008, 4096, (4096, 8192)),
    "odd": (1024, 3712, 2048, (2048, 512)),
    "small": (512, 768, 512, (512, 256)),
    "few": (512, 768, 1024, (1024, 1024)),  # one head for each KV head
    "even": (8704, 16896, 8704, (8704, 8192)),  # two products without parts
}
SIZES = [(name, num_blocks) for name in MODELS for num_blocks in (132, 7)]
HAS_KERNELS = jax.__version_info__ >= (0, 11, 2)
if HAS_KERNELS:
    from kernel_runs import lowered_for_cuda

    from jaxdecode.pallas_kernels.layer_tiles import share_of


def with_kernels(test):
    """A test that needs the kernels' own modules. It does not exist where jax is older: a skip
    would be a failure in CI."""
    return test if HAS_KERNELS else None


@pytest.fixture
def traced(monkeypatch):
    """`fused_layer.run` can be traced with any jax; on the CPU only the plain formula runs."""
    if not HAS_KERNELS:
        monkeypatch.setattr(fused_layer, "_forward", fused_layer.plain)


@pytest.fixture
def pretend_gpu(monkeypatch):
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: None)


def structs(name: str, dtype="bfloat16", **others):
    """attended, x and the weights of a model's layer, as shapes; some sizes may be others."""
    sizes = dict(zip(("D", "F", "NH", "columns"), MODELS[name], strict=True)) | others
    D, F, NH, columns = sizes.values()

    def of(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    projections = tuple(of(D, n) for n in columns)
    return of(NH), of(D), LayerWeights(of(NH, D), of(D, 2 * F), of(F, D), of(D), of(D), projections)


def operands(name: str, dtype="bfloat16", seed: int = 0):
    """attended, x and weights of values that keep their size, with scales between 0.5 and 1.5."""
    leaves, tree = jax.tree.flatten(structs(name, dtype))
    scales = [leaf.shape[0] ** -0.5 if leaf.ndim == 2 else 1.0 for leaf in leaves]
    made = [
        random_array(np.uint32(seed * len(leaves) + i), leaf.shape, leaf.dtype, scale)
        for i, (leaf, scale) in enumerate(zip(leaves, scales, strict=True))
    ]
    attended, x, weights = jax.tree.unflatten(tree, made)
    mlp_scale, next_scale = (1 + x / 4 for x in (weights.mlp_scale, weights.next_scale))
    return attended, x, weights._replace(mlp_scale=mlp_scale, next_scale=next_scale)


def distance(found, wanted) -> float:
    """Relative to the length of `wanted`."""
    difference = np.asarray(found).astype(np.float64) - np.asarray(wanted).astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(wanted, np.float64)))


def sizes_of(name: str, num_blocks: int) -> LayerConfig:
    return layer_config(*MODELS[name], EPS, num_blocks)


def ranges(product: Product) -> list[tuple[int, int]]:
    """The shared steps of each thread block."""
    total, n = product.shared * product.steps, product.sharers
    return list(
        itertools.pairwise(min(i * total // n, total) for i in range(product.num_blocks + 1))
    )


def sharing(product: Product, column: int) -> list[int]:
    """The thread blocks that have steps of a shared column block."""
    begin, end = column * product.steps, (column + 1) * product.steps
    return [b for b, (i, j) in enumerate(ranges(product)) if max(i, begin) < min(j, end)]


@pytest.mark.parametrize(("name", "num_blocks"), SIZES)
def test_shares_are_equal(name, num_blocks):
    config = sizes_of(name, num_blocks)
    D, F, NH, columns = MODELS[name]
    shapes = [(NH, D), (D, F), (F, D), (D, sum(columns))]
    for product, (rows, width) in zip(config.products, shapes, strict=True):
        assert product.steps * product.rows == rows
        assert (product.whole * num_blocks + product.shared) * COLUMNS == width
        assert product.shared < num_blocks
        lengths = [last - first for first, last in ranges(product)]
        assert max(lengths) - min(lengths) <= 1
        counts = [len(sharing(product, column)) for column in range(product.shared)]
        assert product.parts == max(counts, default=1)


@pytest.mark.parametrize(("name", "num_blocks"), SIZES)
def test_memory_is_as_large_as_what_is_put_there(name, num_blocks):
    config = sizes_of(name, num_blocks)
    assert config.stages >= FEWEST_STAGES
    used = 2 * (config.stages * ROWS * COLUMNS + config.widest + config.width)
    # Beside them the sums of a column block, and a few barriers.
    assert used + 4 * TILES * COLUMNS + 16 * config.stages < 227 * 1024
    D, F, *_ = MODELS[name]
    # Values of 16 bits, and the number of the turn beside every two of them; then of 32 bits.
    assert config.slots[:5] == (0, 0, D, F, D)
    for product, found in zip(config.products, config.slots[5:], strict=True):
        tiles = 2 if product.gated else 1
        assert found == 2 * (product.parts - 1) * tiles * product.shared * COLUMNS


def places(product: Product) -> list[list[tuple[int, int]]]:
    """(column block, step) of each thread block's steps, in its order."""
    n = product.num_blocks
    blocks = jnp.arange(n, dtype=jnp.int32)
    # In a jit each, or every operation would be a program.
    counts = np.asarray(jax.jit(jax.vmap(lambda block: share_of(product, block).count))(blocks))
    steps = jnp.arange(counts.max(), dtype=jnp.int32)
    place = jax.jit(jax.vmap(lambda block: jax.vmap(share_of(product, block).place)(steps)))
    columns, rows = map(np.asarray, place(blocks))
    return [
        list(zip(columns[b, :count].tolist(), rows[b, :count].tolist(), strict=True))
        for b, count in enumerate(counts)
    ]


@with_kernels
@pytest.mark.parametrize(("name", "num_blocks"), SIZES)
def test_every_step_is_done_once(name, num_blocks):
    for product in sizes_of(name, num_blocks).products:
        shares = places(product)
        done = sorted(itertools.chain(*shares))
        assert done == list(itertools.product(range(product.columns), range(product.steps)))
        n, steps = num_blocks, product.steps
        for b, (share, (first, last)) in enumerate(zip(shares, ranges(product), strict=True)):
            own = [(c * n + b, step) for c in range(product.whole) for step in range(steps)]
            shared = [(product.whole * n + i // steps, i % steps) for i in range(first, last)]
            assert share == own + shared


@with_kernels
@pytest.mark.parametrize(("name", "num_blocks"), SIZES)
def test_the_first_owner_of_a_column_finishes_it(name, num_blocks):
    """It waits for a part of each thread block up to the last owner, and has nothing to do for
    others afterwards: nobody waits for who waits for him."""
    for product in sizes_of(name, num_blocks).products:
        if not product.shared:
            continue
        columns = jnp.arange(product.shared, dtype=jnp.int32)
        owners = jax.jit(jax.vmap(share_of(product, jnp.int32(0)).owners))(columns)
        owners = np.stack(owners, axis=1).tolist()
        for column, (first, last) in enumerate(owners):
            assert sharing(product, column) == list(range(first, last + 1))
            assert last - first < product.parts
            _, end = ranges(product)[first]
            assert first == last or end <= (column + 1) * product.steps


def run_once(attended, x, weights):
    """x and the projections."""
    slots = fused_layer.new_slots(attended, weights)
    return fused_layer.run(attended, x, weights, slots, 1, EPS)[:2]


@jax.jit  # as `run` is, or other products would be rounded
def plainly(attended, x, weights):
    return fused_layer.plain(attended, x, weights, None, None, None, eps=EPS)[:2]


def gradient(call, *operands):
    def loss(*operands):
        x, projected = (each.astype(jnp.float32) for each in call(*operands))
        return jnp.sum(jnp.sin(x)) + jnp.sum(projected**2)

    return jax.grad(loss, (0, 1, 2))(*operands)


def test_gradient_is_that_of_the_plain_formula(traced):
    inputs = operands("small")
    found, expected = (jax.tree.leaves(gradient(call, *inputs)) for call in (run_once, plainly))
    assert len(found) == 9
    for one, other in zip(found, expected, strict=True):
        assert jnp.abs(other).max() > 0.01
        assert distance(one, other) <= 1e-3


@pytest.mark.parametrize("axes", [(0, 0, None), (None, 0, None), (0, None, 0)], ids=str)
def test_vmap_is_the_plain_formula_of_each(traced, axes):
    one, other = operands("small"), operands("small", seed=1)
    rows = [one, [x if axis is None else y for x, y, axis in zip(one, other, axes, strict=True)]]
    many = [
        x if axis is None else jax.tree.map(lambda *each: jnp.stack(each), x, y)
        for x, y, axis in zip(*rows, axes, strict=True)
    ]
    expected = map(jnp.stack, zip(*(plainly(*row) for row in rows), strict=True))
    for found, wanted in zip(jax.vmap(run_once, axes)(*many), expected, strict=True):
        assert distance(found, wanted) <= 5e-3


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (structs("llama-3.1-8b", "float32")[2], "float16, not ['float32']"),
        (
            structs("odd")[2]._replace(next_scale=structs("odd", "float16")[1]),
            "not ['bfloat16', 'float16']",
        ),
        (
            structs("llama-3.1-8b", D=4096 + 128)[2],
            "model width that is a multiple of 512, not 4224",
        ),
        (
            structs("llama-3.1-8b", F=14336 + 64)[2],
            "multiples of 128, not (4096, 14400, 4096, 2048)",
        ),
        (
            structs("llama-3.1-8b", columns=(4096, 64))[2],
            "multiples of 128, not (4096, 14336, 4096, 64)",
        ),
        (structs("llama-3.1-8b", D=2**15)[2], "vectors of 32768 leave too little"),
        (structs("llama-3.1-8b", F=2**16)[2], "vectors of 65536 leave too little"),
    ],
)
def test_what_is_left_to_xla(pretend_gpu, weights, words):
    assert words in fused_layer.why_not(weights)


def test_where_the_kernel_runs(monkeypatch):
    assert "JAX runs on cpu" in fused_layer.why_not(structs("small")[2])
    monkeypatch.setattr(flash_decode, "why_not_here", lambda: None)
    device = types.SimpleNamespace(core_count=114, device_kind="H100 PCIe", platform="gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert "needs 132 multiprocessors, and H100 PCIe has 114" in fused_layer.why_not_here()
    device.core_count = 132
    assert fused_layer.why_not_here() is None


def kernels_in(call, *shapes) -> tuple[int, int]:
    """How many there are lowered for CUDA, and how many of them are layers."""
    text = lowered_for_cuda(call, *shapes)
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    return len(calls), sum("decoder_layer" in line for line in calls)


@with_kernels
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", fused_layer.DTYPES)
def test_lowers_for_cuda(pretend_gpu, name, dtype):
    shapes = structs(name, dtype)
    assert fused_layer.why_not(shapes[2]) is None
    assert kernels_in(run_once, *shapes) == (1, 1)
    assert kernels_in(lambda *operands: gradient(run_once, *operands), *shapes) == (1, 1)
    many = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), shapes)
    assert kernels_in(jax.vmap(run_once), *many) == (0, 0)
