"""What benchmarks/sharded.py measures: a list of cases per part, the most important ones first."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from jaxdecode.bench import NO_SPLIT
from jaxdecode.models.config import PRESETS, LlamaConfig

XLA, PEER = "xla", "peer"
K = 1024
MILLION = 1_000_000
NAME = "codellama-34b"
HEAD_DIM = PRESETS[NAME].head_dim
_FIRST = (512, 64 * K, 8 * K, 128 * K)
_WITHOUT_PEERS = (512, 64 * K)  # what the peers' memory gains is shown at these
_BETWEEN = (32 * K, 2 * K, 16 * K, 4 * K, K)
_MODEL_WIDTH_BYTES = 16 * K  # of one token's bfloat16 activations in the model
_ALL_REDUCE_BYTES = (
    _MODEL_WIDTH_BYTES, 2 * K, 128 * K, 8 * K**2, 32 * K, 8 * K, 512 * K, 2 * K**2,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model on a mesh.

    Attributes:
      model: its name, for the rows.
      sizes: (axis, devices) of the mesh's axes; none for one device.
    """

    model: str
    config: LlamaConfig
    sizes: tuple[tuple[str, int], ...] = ()

    @property
    def devices(self) -> int:
        return math.prod(size for _, size in self.sizes)

    @property
    def mesh(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in self.sizes)

    def __str__(self) -> str:
        return f"{self.model}, {self.mesh or 'one device'}"


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """Decoding one sequence.

    Attributes:
      depth: tokens in the cache at the start.
      implementation: of attention.
      collectives: what exchanges between devices go through; None: as generation chooses.
      room: tokens that the cache has room for, besides those generated; None: just enough. Cases
        of equal room share their compiled program.
      may_shrink: whether the model may lose layers where it does not fit into memory.
    """

    setup: Setup
    depth: int
    implementation: str
    collectives: str | None = None
    room: int | None = None
    may_shrink: bool = False

    def __str__(self) -> str:
        collectives = f", collectives by {self.collectives}" if self.collectives else ""
        return f"{self.setup}, {self.implementation}{collectives}, depth {self.depth}"

    @property
    def devices(self) -> int:
        return self.setup.devices

    @property
    def kind(self) -> str:
        return self.implementation

    def with_layers(self, layers: int) -> DecodeCase:
        """The same of so many of the model's layers."""
        config, model = self.setup.config, self.setup.model
        if layers == config.num_layers:
            return self
        setup = dataclasses.replace(
            self.setup, model=f"{model}, {layers} of {config.num_layers} layers",
            config=dataclasses.replace(config, num_layers=layers),
        )  # fmt: skip
        return dataclasses.replace(self, setup=setup)


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Attention of the model with one KV head, the cache cut along its length over the devices."""

    devices: int
    batch: int
    tokens: int = MILLION
    setup: ClassVar[None] = None
    kind: ClassVar[str] = "attention"

    def __str__(self) -> str:
        return f"attention, seq={self.devices}, batch {self.batch}, {self.tokens} tokens"


@dataclasses.dataclass(frozen=True)
class CollectiveCase:
    """A collective of so many bytes on each device."""

    collective: str
    implementation: str
    devices: int
    bytes: int
    setup: ClassVar[None] = None

    def __str__(self) -> str:
        name = f"{self.collective} by {self.implementation}"
        return f"{name}, {self.bytes} bytes, {self.devices} devices"

    @property
    def kind(self) -> str:
        return self.implementation


Case = DecodeCase | AttentionCase | CollectiveCase


def spread(devices: int) -> Setup:
    """CodeLlama-34B over so many devices: its KV heads first, then the length of the cache."""
    config = PRESETS[NAME]
    tensor = min(devices, config.num_kv_heads)
    return setup_34b(tensor, devices // tensor)


def setup_34b(tensor: int, seq: int = 1) -> Setup:
    """CodeLlama-34B on this mesh."""
    return Setup(NAME, PRESETS[NAME], _sizes(tensor, seq))


def setup_mqa(seq: int) -> Setup:
    """The same with one KV head, which only the length of the cache can share among devices."""
    config = dataclasses.replace(PRESETS[NAME], num_kv_heads=1)
    return Setup(f"{NAME}, 1 KV head", config, _sizes(1, seq))


def depth_cases(setup: Setup, ours: str, peers: bool) -> list[DecodeCase]:
    """Decoding at growing depth: ours, XLA's attention, and attention without splitting.

    Args:
      peers: whether `fit_mesh` has ours exchange through the peers' memory. Two depths then show
        what that gains.
    """
    names = dict.fromkeys((ours, XLA, NO_SPLIT))
    cases = []
    for depth in _FIRST:
        cases += [_case(setup, depth, name, ours) for name in names]
        if peers and depth in _WITHOUT_PEERS:
            cases.append(_without_peers(setup, depth, ours))
    # XLA's attention reads the whole cache, so each of its depths is a program of its own.
    names.pop(XLA)
    return cases + [_case(setup, depth, name, ours) for depth in _BETWEEN for name in names]


def layer_cases(setup: Setup, ours: str, peers: bool) -> list[DecodeCase]:
    """The steps whose time is itemised, all of programs that `depth_cases` compiles."""
    cases = [_case(setup, 512, ours, ours)]
    if peers:
        cases.append(_without_peers(setup, 512, ours))
    others = ((64 * K, ours), (512, XLA), (64 * K, XLA), (64 * K, NO_SPLIT))
    cases += [_case(setup, depth, name, ours) for depth, name in others]
    return list(dict.fromkeys(cases))


def million_cases(setup: Setup, devices: int, ours: str) -> list[DecodeCase]:
    """Decoding behind a million tokens, on all devices and, with one KV head, also on one."""
    setups = [setup, setup_mqa(devices)]
    if devices >= 4:
        setups.append(setup_34b(devices // 2, 2))
    setups.append(setup_mqa(1))
    return [DecodeCase(each, MILLION, ours, may_shrink=True) for each in dict.fromkeys(setups)]


def scaling_cases(devices: int, ours: str) -> list[DecodeCase]:
    """The same work on more and more devices."""
    return [
        _case(spread(count), depth, ours, ours)
        for count in _counts(devices)
        for depth in (512, 8 * K, 64 * K)
    ]


def attention_cases(devices: int) -> list[AttentionCase]:
    """0.5 GB of keys and values a layer, and 2 GB."""
    return [AttentionCase(count, batch) for batch in (1, 4) for count in _counts(devices)]


def collective_cases(
    devices: int, implementations: dict[str, tuple[str, ...]]
) -> list[CollectiveCase]:
    """All-reduces of many sizes, and what the models of this file exchange otherwise.

    Args:
      implementations: of each collective.
    """
    devices = max(2, devices)
    config = setup_mqa(devices).config
    N, H = config.num_q_heads, config.head_dim
    cases = [
        CollectiveCase("all_reduce", name, devices, size)
        for size in _ALL_REDUCE_BYTES
        for name in implementations["all_reduce"]
    ]
    # Queries, keys and values of a token; and its partial results, of which each device gets some
    # columns of every head, and the log-sum-exps; and what is merged of them.
    heads = (N + 2 * config.num_kv_heads) * H // devices * 2
    partials, found = N * (H + devices) * 4, N * H * 4
    sizes = {"merge_columns": found, "all_gather": heads, "all_to_all": partials}
    cases += [
        CollectiveCase(collective, name, devices, size)
        for collective, size in sizes.items()
        for name in implementations[collective]
    ]
    cases += [
        CollectiveCase("all_reduce", name, count, _MODEL_WIDTH_BYTES)
        for count in _counts(devices)
        for name in implementations["all_reduce"]
        if count > 1
    ]
    return list(dict.fromkeys(cases))


def _sizes(tensor: int, seq: int) -> tuple[tuple[str, int], ...]:
    sizes = (("tensor", tensor), ("seq", seq))
    return tuple((axis, size) for axis, size in sizes if size > 1)


def _case(setup: Setup, depth: int, implementation: str, ours: str) -> DecodeCase:
    """Of at most two programs for ours, and one for attention without splitting.

    Their speed follows from the tokens that are there, not from the room; but how many chunks
    there can be follows from the room, and short caches do better with fewer."""
    if implementation == XLA:
        return DecodeCase(setup, depth, implementation, collectives=XLA)
    short = depth <= K and implementation == ours
    return DecodeCase(setup, depth, implementation, room=K if short else 128 * K)


def _without_peers(setup: Setup, depth: int, ours: str) -> DecodeCase:
    """Ours with XLA's collectives."""
    return dataclasses.replace(_case(setup, depth, ours, ours), collectives=XLA)


def _counts(devices: int) -> list[int]:
    """Powers of two, up to eight and to all devices, the largest that there are first, then one."""
    counts = [2**i for i in range(max(8, devices).bit_length())]
    here = [count for count in counts if count <= devices]
    return list(dict.fromkeys([here[-1], 1, *here[::-1], *counts]))
