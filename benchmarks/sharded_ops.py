"""The operations of a sharded step by themselves: its collectives, and attention over a mesh.

B batch, S capacity of the cache, N query heads, K KV heads, H head_dim, n devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sharded_cases import HEAD_DIM, PEER, AttentionCase, CollectiveCase
from timing import time_of

import jaxdecode as jd
from jaxdecode import roofline
from jaxdecode.device_model import Speeds
from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.kv_cache import round_up_capacity
from jaxdecode.models.random_model import random_array
from jaxdecode.models.sharding import Sharding
from jaxdecode.pallas_kernels import merge_columns, peer

Array = jax.Array
Exchange = Callable[[Array], Array]
Make = Callable[[Array, str], Exchange]

_AXIS = "seq"
# A loop on the device costs more than 10 us a round, so a round holds many collectives.
_UNROLLED, _ROUNDS = 32, 16
# What each device reads before a buffer comes back: several times its L2 cache.
COLD_BYTES = 300e6
_CALLS = 24
# Means over a million random values differ wholly where a part of them is lost.
_TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Collective:
    """How one kind is repeated: an exchange of x makes `result`, mix makes the next x of it.

    Attributes:
      implementations: name -> make(x, axis) -> exchange(x), called inside shard_map, make once for
        a chain, so that it can open a mailbox; a new one goes here.
      alone: a result of the same shape made on this device, of (x, axis).
      mix: mix(result, shares, mine) -> x. What is `kept` changes its sign.
      kept: what the x of all devices amount to, checked at the end.
      dtype: of x, which is [W].
      sent: how many times the bytes of x each device sends, in a ring.
      parts: whether x has a part for each device, [n, W].
      rounding: relative error of `kept` that one exchange may make.
      shape: of an array in the mailbox for this x [W] among n devices.
    """

    implementations: dict[str, Make]
    alone: Callable[[Array, str], Array]
    mix: Callable[[Array, Array, Array], Array]
    kept: Callable[[np.ndarray], np.ndarray]
    dtype: Any
    sent: Callable[[int], float]
    parts: bool = False
    rounding: float = 0.0
    shape: Callable[[int, int], tuple[int, ...]] = lambda W, n: (W,)


def _others(n: int) -> float:
    return (n - 1) / n


def _column_sums(x: np.ndarray) -> np.ndarray:
    """Over all devices and their parts."""
    return x.astype(np.float64).reshape(-1, x.shape[-1]).sum(axis=0)


def _summed_by_peers(x: Array, axis: str) -> Exchange:
    mailbox = peer.open_mailbox(x.shape, x.dtype, (axis,))
    return lambda x: peer.all_reduce(x, (axis,), mailbox)


def _merged_by_xla(x: Array, axis: str) -> Exchange:
    return _merging(x, axis, None)


def _merged_by_peers(x: Array, axis: str) -> Exchange:
    shape = _columns(x.size, lax.axis_size(axis))
    return _merging(x, axis, peer.open_mailbox(shape, x.dtype, (axis,), arrays=2))


def _merging(x: Array, axis: str, mailbox: peer.Mailbox | None) -> Exchange:
    """What the devices found for one token, x [N H], merged as the model does."""
    N, n = x.size // HEAD_DIM, lax.axis_size(axis)
    lse = jnp.log(jnp.asarray(_odds(n, N), jnp.float32))[lax.axis_index(axis)].reshape(1, 1, N)
    return lambda x: merge_columns(x.reshape(1, 1, N, HEAD_DIM), lse, axis, mailbox)


def _columns(W: int, n: int) -> tuple[int, ...]:
    """Of what one of n devices gets of W = N H values of a token."""
    return 1, 1, W // HEAD_DIM, HEAD_DIM // n


def _odds(n: int, N: int) -> np.ndarray:
    """[n, N]: how much what each device found counts, for each head."""
    return 1 + np.add.outer(np.arange(n), np.arange(N)) % 3


def _mean_columns(x: np.ndarray) -> np.ndarray:
    """[N, H / n]: the mean over the devices and over their columns, both by the odds.

    A merge gives device i the mean over the devices of columns i, and `mix` copies these to all its
    columns, so from then on all means of columns are this one."""
    n, N = x.shape[0], x.shape[1] // HEAD_DIM
    weights = _odds(n, N) / _odds(n, N).sum(axis=0)
    columns = x.astype(np.float64).reshape(n, N, n, HEAD_DIM // n)
    return np.einsum("rN,qN,qNrh->Nh", weights, weights, columns)


COLLECTIVES = {
    "all_reduce": Collective(
        implementations={
            "psum": lambda x, axis: lambda x: lax.psum(x, axis),
            PEER: _summed_by_peers,
        },
        alone=lambda x, axis: x,
        mix=lambda result, shares, mine: result * mine,
        kept=_column_sums, dtype=jnp.bfloat16, sent=lambda n: 2 * _others(n),
    ),
    "all_gather": Collective(
        implementations={"all_gather": lambda x, axis: lambda x: lax.all_gather(x, axis)},
        alone=lambda x, axis: jnp.broadcast_to(x[None], (lax.axis_size(axis), *x.shape)),
        mix=lambda result, shares, mine: result.sum(axis=0) * mine,
        kept=_column_sums, dtype=jnp.bfloat16, sent=lambda n: n - 1,
    ),
    "all_to_all": Collective(
        implementations={"all_to_all": lambda x, axis: lambda x: lax.all_to_all(x, axis, 0, 0)},
        alone=lambda x, axis: x,
        mix=lambda result, shares, mine: result.sum(axis=0)[None, :] * shares[:, None],
        kept=_column_sums, dtype=jnp.float32, sent=_others, parts=True,
    ),
    "merge_columns": Collective(
        implementations={"all_to_all": _merged_by_xla, PEER: _merged_by_peers},
        alone=lambda x, axis: x[: x.size // lax.axis_size(axis)].reshape(
            _columns(x.size, lax.axis_size(axis))
        ),
        mix=lambda result, shares, mine: -jnp.tile(result, shares.size).reshape(-1),
        # Beside the columns for each device goes their log-sum-exp.
        kept=_mean_columns, dtype=jnp.float32, sent=lambda n: _others(n) * (1 + n / HEAD_DIM),
        rounding=2**-20, shape=_columns,
    ),
}  # fmt: skip


def implementations() -> dict[str, tuple[str, ...]]:
    """The names of the implementations of each collective."""
    return {name: tuple(each.implementations) for name, each in COLLECTIVES.items()}


def obstacle(case: CollectiveCase, devices: list[jax.Device]) -> str | None:
    """Why the case cannot be measured on these devices; None if it can."""
    kind, n = COLLECTIVES[case.collective], case.devices
    if case.collective == "merge_columns" and HEAD_DIM % n:
        return f"{n} devices do not divide the {HEAD_DIM} columns of a head"
    if case.implementation != PEER:
        return None
    shape = kind.shape(_width(kind, n, case.bytes), n)
    return peer.why_not_here(_mesh(devices, n)) or peer.why_not(shape, kind.dtype)


def collective_row(
    case: CollectiveCase, devices: list[jax.Device], speeds: Speeds | None, rounds: int = _ROUNDS
) -> dict[str, Any]:
    """The row of a case: what one collective costs in a chain of them, each needing the last.

    `chain_us` is the time of one link of the chain, the collective and the small kernel that makes
    the next operand of its result; `us` that less the time of a link without the collective.

    Raises:
      RuntimeError: something was lost on the way.
    """
    kind, n = COLLECTIVES[case.collective], case.devices
    start = starting_values(kind, n, case.bytes)
    time = functools.partial(_time_chain, kind, mesh=_mesh(devices, n), start=start, rounds=rounds)
    chain_us, result = time(kind.implementations[case.implementation])
    tolerance = rounds * _UNROLLED * kind.rounding
    if not np.allclose(kind.kept(result), kind.kept(start), rtol=tolerance, atol=0):
        raise RuntimeError(f"{case}: the values are not what they were")
    alone_us, _ = time(lambda _, axis: lambda x: kind.alone(lax.optimization_barrier(x), axis))
    num_bytes = start.nbytes // n
    return {
        "collective": case.collective, "bytes": num_bytes, "dtype": start.dtype.name, "devices": n,
        "implementation": case.implementation, "us": chain_us - alone_us, "chain_us": chain_us,
        "predicted_us": speeds and _collective_us(n, kind.sent(n) * num_bytes, speeds),
    }  # fmt: skip


def starting_values(kind: Collective, n: int, num_bytes: int) -> np.ndarray:
    """[n, W] or [n, n, W]: small integers on the first device, zeros on the others."""
    width = _width(kind, n, num_bytes)
    values = np.zeros((n, n, width) if kind.parts else (n, width), kind.dtype)
    values.reshape(-1, width)[0] = 1 + np.arange(width) % 3
    return values


def _width(kind: Collective, n: int, num_bytes: int) -> int:
    """W of x."""
    return max(1, num_bytes // jnp.dtype(kind.dtype).itemsize // (n if kind.parts else 1))


def _mesh(devices: list[jax.Device], n: int) -> Mesh:
    return Mesh(np.array(devices[:n]), (_AXIS,))


def shares_of(n: int) -> np.ndarray:
    """[n] negative numbers that add up to -1, so exactly that bfloat16 sums of them have no error.

    One or two times a power of two each."""
    unit = 2.0 ** -(n - 1).bit_length()
    twice = round(1 / unit) - n
    return -unit * np.array([2] * twice + [1] * (n - twice))


def chained(
    kind: Collective, make: Make, mesh: Mesh, rounds: int = _ROUNDS
) -> Callable[[Array, Array], Array]:
    """A program of many collectives, each needing the last: run(x, shares) -> x, of all devices."""

    def chain(x: Array, shares: Array) -> Array:
        # XLA knows neither the shares nor that they are alike, so it can leave nothing out.
        mine = shares[lax.axis_index(_AXIS)]
        exchange = make(x[0], _AXIS)

        def links(_: int, x: Array) -> Array:
            for _ in range(_UNROLLED):
                x = kind.mix(exchange(x), shares, mine)
            return x

        return lax.fori_loop(0, rounds, links, x[0])[None]

    cut, whole = PartitionSpec(_AXIS), PartitionSpec()
    return jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=(cut, whole), out_specs=cut))


def _time_chain(
    kind: Collective, make: Make, *, mesh: Mesh, start: np.ndarray, rounds: int
) -> tuple[float, np.ndarray]:
    """Microseconds of one link, and what the chain makes of the starting values."""
    run = chained(kind, make, mesh, rounds)
    x = jax.device_put(start, NamedSharding(mesh, PartitionSpec(_AXIS)))
    shares = shares_of(mesh.size).astype(start.dtype)
    shares = jax.device_put(shares, NamedSharding(mesh, PartitionSpec()))
    result = np.asarray(run(x, shares))

    def rotate(times: int) -> None:
        for _ in range(times):
            last = run(x, shares)
        jax.block_until_ready(last)

    return time_of(rotate) / (rounds * _UNROLLED) * 1e6, result


def _collective_us(n: int, sent: float, speeds: Speeds) -> float:
    """What the planner expects of one collective over neighbouring devices."""
    collective = roofline.Collective(count=1, devices=n, bytes=sent)
    return 1e6 * roofline.seconds(collective, Sharding(tensor=n), speeds, devices_per_host=8)


class AttentionTimer:
    """Times attention to a long cache, cut over more and more devices.

    Attributes:
      config: gives the heads.
      read_ceiling: bytes per second of one device.
    """

    def __init__(
        self, config: LlamaConfig, devices: list[jax.Device], read_ceiling: float,
        speeds: Speeds | None, cold_bytes: float = COLD_BYTES,
    ):  # fmt: skip
        self.config, self.read_ceiling = config, read_ceiling
        self._devices, self._speeds, self._cold_bytes = devices, speeds, cold_bytes
        # The first result of each batch size, which the results on other meshes have to equal.
        self._results: dict[int, np.ndarray] = {}

    def row(self, case: AttentionCase) -> dict[str, Any]:
        """The row of a case: `us` of one call in a chain of them, on caches that are cold.

        Raises:
          RuntimeError: the result is not that of the mesh measured before.
        """
        n, B, config = case.devices, case.batch, self.config
        N, K, H = config.num_q_heads, config.num_kv_heads, config.head_dim
        dtype = jnp.dtype(config.dtype)
        # The same slots on every mesh.
        S = round_up_capacity(case.tokens, max(8, len(self._devices)))
        num_bytes = 2 * B * case.tokens * K * H * dtype.itemsize // n
        q = jax.ShapeDtypeStruct((B, 1, N, H), dtype)
        kv = jax.ShapeDtypeStruct((B, S // n, K, H), dtype)
        choice = jd.explain_attention(q, kv, kv, S // n)
        us = self._time(case, (B, S, K, H), num_bytes)
        bound_us = num_bytes / self.read_ceiling * 1e6
        return {
            "B": B, "S": S, "kv_len": case.tokens, "N": N, "K": K, "H": H, "dtype": dtype.name,
            "mesh": f"{_AXIS}={n}" if n > 1 else "", "devices": n,
            "implementation": choice.implementation, "us": us, "bytes": num_bytes,
            "bound_us": bound_us, "fraction_of_bound": bound_us / us,
            "predicted_us": self._speeds and self._predicted_us(case, num_bytes, self._speeds),
        }  # fmt: skip

    def _time(self, case: AttentionCase, shape: tuple[int, ...], num_bytes: int) -> float:
        mesh = Mesh(np.array(self._devices[: case.devices]), (_AXIS,))
        place = NamedSharding(mesh, PartitionSpec(None, _AXIS))
        buffers = max(1, math.ceil(self._cold_bytes / num_bytes))
        make = functools.partial(random_array, shape=shape, dtype=self.config.dtype, place=place)
        caches = [(make(np.uint32(2 * i)), make(np.uint32(2 * i + 1))) for i in range(buffers)]
        q_shape = (case.batch, 1, self.config.num_q_heads, self.config.head_dim)
        q = random_array(np.uint32(2**20), q_shape, self.config.dtype)
        q, kv_len = jax.device_put(
            (q, np.full(case.batch, case.tokens, np.int32)), NamedSharding(mesh, PartitionSpec())
        )
        attend = functools.partial(jd.sharded_decode_attention, mesh=mesh, seq_axis=_AXIS)
        if case.devices == 1:
            attend = jd.decode_attention

        @jax.jit
        def chain(q: Array, caches: list[tuple[Array, Array]], kv_len: Array) -> tuple:
            results = []
            for i in range(_CALLS):
                q = attend(q, *caches[i % buffers], kv_len)
                results.append(q)
            return results[0], results[-1]

        self._check(case, np.asarray(chain(q, caches, kv_len)[0], np.float32))

        def rotate(times: int) -> None:
            for _ in range(times):
                last = chain(q, caches, kv_len)
            jax.block_until_ready(last)

        return time_of(rotate) / _CALLS * 1e6

    def _check(self, case: AttentionCase, result: np.ndarray) -> None:
        expected = self._results.setdefault(case.batch, result)
        error = np.linalg.norm(result - expected) / np.linalg.norm(expected)
        if not error <= _TOLERANCE:
            raise RuntimeError(f"{case}: the result differs from another mesh's by {error:.2g}")

    def _predicted_us(self, case: AttentionCase, num_bytes: int, speeds: Speeds) -> float:
        """The planner's model: reading, then gathering the partial results."""
        reading = num_bytes / (speeds.read_tb_s * 1e6)
        if case.devices == 1:
            return reading
        partial = case.batch * self.config.num_q_heads * (self.config.head_dim + 1) * 4
        return reading + _collective_us(case.devices, (case.devices - 1) * partial, speeds)
