"""Tokens per second that a mesh of devices can reach, from a model of memory, compute and links.

The bound is what one device must at least read and compute for a token of each of its sequences,
at its full speeds. The prediction reads a little slower, and adds what each layer and each
collective takes beyond that. Both are arithmetic on the figures in `device_model`.

B sequences on one device; D, V, L, N, K, H as in `models.config`.
"""

from __future__ import annotations

import dataclasses

from jaxdecode.device_model import Speeds
from jaxdecode.memory import Workload, num_weights
from jaxdecode.models.sharding import Sharding


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast a workload can be, over all sequences, with the cache full.

    Attributes:
      bytes_per_step: that one device reads for one token of each of its sequences.
      bound_tok_s: at most.
      predicted_tok_s: an estimate.
      prefill_seconds: at least, for prompts that fill the cache.
    """

    bytes_per_step: int
    bound_tok_s: float
    predicted_tok_s: float
    prefill_seconds: float


@dataclasses.dataclass(frozen=True)
class Collective:
    """One that every step runs.

    Attributes:
      count: of them in a step.
      devices: that take part; neighbours, because `tensor` and `seq` are a mesh's last axes.
      bytes: that each device sends.
    """

    count: int
    devices: int
    bytes: float


def speed(work: Workload, sharding: Sharding, speeds: Speeds, devices_per_host: int = 8) -> Speed:
    """The bound and the prediction for any number of devices and hosts."""
    num_bytes = _bytes_read(work, sharding)
    reading = num_bytes / (speeds.read_tb_s * 1e12)
    computing = _decode_flops(work, sharding) / (speeds.tflop_s * 1e12)
    working = max(reading / speeds.read_share, computing)
    is_alone = work.batch == sharding.num_devices == 1
    layer_us = speeds.lone_layer_us if is_alone else speeds.layer_us
    layers = work.config.num_layers * layer_us * 1e-6
    talking = sum(
        seconds(collective, sharding, speeds, devices_per_host)
        for collective in collectives(work, sharding)
    )
    return Speed(
        bytes_per_step=num_bytes,
        bound_tok_s=work.batch / max(reading, computing),
        predicted_tok_s=work.batch / (working + layers + talking),
        prefill_seconds=prefill_flops(work, sharding) / (speeds.tflop_s * 1e12),
    )


def collectives(work: Workload, sharding: Sharding) -> list[Collective]:
    """What `models.llama` sends in a decode step: per layer, then once."""
    config, B = work.config, work.rows(sharding)
    L, D, H = config.num_layers, config.embed_dim, config.head_dim
    N, K = (heads // sharding.tensor for heads in (config.num_q_heads, config.num_kv_heads))
    both, seq = sharding.tensor * sharding.seq, sharding.seq
    found = []
    if both > 1:
        # After attention and after the feed-forward part; a ring sends everything nearly twice.
        found.append(Collective(2 * L, both, 2 * _others(both) * B * D * work.itemsize))
    if seq > 1:
        heads = B * (N + 2 * K) * H * work.itemsize
        partials = B * N * (H + seq) * 4
        found.append(Collective(L, seq, _others(seq) * heads))
        found.append(Collective(L, seq, _others(seq) * partials))
    if sharding.parts("V") > 1:
        found.append(Collective(1, both, 2 * _others(both) * B * D * work.itemsize))
        found.append(Collective(1, both, _others(both) * B * config.vocab_size * 4))
    return found


def seconds(
    collective: Collective, sharding: Sharding, speeds: Speeds, devices_per_host: int
) -> float:
    """All of these in one step. A group that leaves its host goes at the pace between hosts."""
    leaves = sharding.num_devices > devices_per_host and devices_per_host % collective.devices != 0
    link = speeds.host_link_gb_s if leaves else speeds.link_gb_s
    latency = speeds.collective_us + (speeds.host_collective_us if leaves else 0)
    return collective.count * (latency * 1e-6 + collective.bytes / (link * 1e9))


def _others(devices: int) -> float:
    """The share of an array that lies on the other devices."""
    return (devices - 1) / devices


def _bytes_read(work: Workload, sharding: Sharding) -> int:
    weights = num_weights(work.config, sharding, read=True) * work.itemsize
    return weights + 2 * _cached_numbers(work, sharding) * work.cache_itemsize


def _cached_numbers(work: Workload, sharding: Sharding) -> int:
    """Numbers in all keys that one device's queries see."""
    config = work.config
    heads = config.num_kv_heads // sharding.tensor
    slots = -(-min(work.context, config.window or work.context) // sharding.seq)
    return config.num_layers * work.rows(sharding) * slots * heads * config.head_dim


def _decode_flops(work: Workload, sharding: Sharding) -> int:
    """A multiplication and an addition for each weight, and for each number a query meets."""
    group = work.config.num_q_heads // work.config.num_kv_heads
    matrices = 2 * work.rows(sharding) * num_weights(work.config, sharding, read=True)
    return matrices + 4 * group * _cached_numbers(work, sharding)


def prefill_flops(work: Workload, sharding: Sharding) -> int:
    """Operations on one device for prompts that fill the cache: every token goes through every
    matrix but the head, and attends to all tokens before it."""
    config, B = work.config, work.rows(sharding)
    head = config.embed_dim * config.vocab_size // sharding.parts("V")
    weights = num_weights(config, sharding, read=True) - head
    window = min(work.context, config.window or work.context)
    # The first tokens see few others; from `window` on each sees as many.
    pairs = window * (window + 1) // 2 + (work.context - window) * window
    heads = config.num_q_heads // sharding.tensor
    attention = 4 * config.num_layers * heads * config.head_dim * pairs // sharding.seq
    return B * (2 * weights * work.context + attention)
