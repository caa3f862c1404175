"""Meshes of the eight CPU devices, models cut over them, and what compiled programs exchange."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from naive_llama import random_params

from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.llama import Llama
from jaxdecode.models.params import param_letters
from jaxdecode.models.sharding import AXES, Sharding, fit_mesh

# Every way to spread 1, 2, 4 and 8 devices over data, tensor and seq.
ALL_SIZES = [
    (data, tensor, devices // (data * tensor))
    for devices in (1, 2, 4, 8)
    for data in (1, 2, 4, 8)
    for tensor in (1, 2, 4, 8)
    if devices % (data * tensor) == 0
]


def size_name(sizes: tuple[int, int, int]) -> str:
    """An id such as "data2-seq4" for (2, 1, 4)."""
    parts = [f"{axis}{size}" for axis, size in zip(AXES, sizes, strict=True) if size > 1]
    return "-".join(parts) or "one"


def make_mesh(
    sizes: tuple[int, ...], axes: tuple[str, ...] = AXES, *, kind: AxisType = AxisType.Auto,
    backwards: bool = False,
) -> Mesh:  # fmt: skip
    """A mesh of the first devices, or of the same ones in reverse order."""
    devices = jax.devices()[: math.prod(sizes)]
    devices = devices[::-1] if backwards else devices
    return Mesh(np.array(devices).reshape(sizes), axes, axis_types=(kind,) * len(axes))


def seq_mesh(count: int, kind: AxisType = AxisType.Auto, **sizes: int) -> Mesh:
    """A mesh with an axis seq of `count` devices behind others of any name."""
    return make_mesh((*sizes.values(), count), (*sizes, "seq"), kind=kind)


@functools.cache
def sharded_model(config: LlamaConfig, mesh: Mesh) -> Llama:
    """The same weights as `random_model`, each device holding its part."""
    sharding, letters = fit_mesh(config, mesh), param_letters(config)
    params = {
        name: jax.device_put(w.astype(config.dtype), sharding.named(letters[name]))
        for name, w in random_params(config).items()
    }
    return Llama.from_params(config, params, sharding)


def dealt(x: Any, count: int, block: int) -> np.ndarray:
    """x [B, S, ...], in order of position, in the order in which `count` devices hold it: blocks
    are dealt like cards, and the hands laid side by side."""
    hands: list[list[int]] = [[] for _ in range(count)]
    for first in range(0, x.shape[1], block):
        hands[first // block % count].extend(range(first, first + block))
    return np.asarray(x)[:, np.concatenate(hands)]


COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+"
    r"|ragged-all-to-all)(?:-start)?\("
)


def collectives(hlo: str) -> list[tuple[str, int]]:
    """(kind, elements of its result on one device) of each collective of a compiled program."""
    return sorted((kind, _elements(shape)) for shape, kind in COLLECTIVE.findall(hlo))


def _elements(shape: str) -> int:
    dims = re.findall(r"\[([\d,]*)\]", shape)
    return sum(math.prod(int(n) for n in each.split(",") if n) for each in dims)


def copies(hlo: str, shape: tuple[int, ...]) -> list[str]:
    """The operations that copy an array of this shape."""
    array = rf"\w+\[{','.join(map(str, shape))}\]\S* copy"
    return [line for line in hlo.splitlines() if re.search(array, line)]


def step_collectives(
    config: LlamaConfig, sharding: Sharding, B: int, T: int
) -> list[tuple[str, int]]:
    """What one step of the decoder should exchange; B rows in all."""
    rows, n = B // sharding.data * T, sharding.seq
    N, K = config.num_q_heads // sharding.tensor, config.num_kv_heads // sharding.tensor
    sums = 2 * config.num_layers + (sharding.parts("V") > 1)
    expected = []
    if sharding.tensor * n > 1:
        expected += [("all-reduce", rows * config.embed_dim)] * sums
    if n > 1:
        heads = rows * (N + 2 * K) * config.head_dim
        # From each device its share of the columns, and all of the log-sum-exp.
        partials = rows * N * (config.head_dim + n)
        expected += [("all-gather", heads), ("all-to-all", partials)] * config.num_layers
    return sorted(expected)
