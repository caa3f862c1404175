"""The mailboxes of a decoder: what its steps exchange through the peers' memory.

To open one, all devices wait for each other, which takes as long as several exchanges. So a loop of
steps opens them once, before it, and every step goes on with the turns where the last one stopped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.sharding import Sharding
from jaxdecode.pallas_kernels import peer


class Mailboxes(NamedTuple):
    """What a step's exchanges go through; None where they are left to XLA.

    Attributes:
      sums: for sums of [B, T, D] over the devices.
      merges: for the parts of attention.
    """

    sums: peer.Mailbox | None = None
    merges: peer.Mailbox | None = None


def open_mailboxes(
    config: LlamaConfig, sharding: Sharding, shape: tuple[int, ...], dtype: Any
) -> Mailboxes:
    """For steps of tokens [B, T] of this shape, with weights of this dtype: see `peer.open_around`,
    also for where they can be used."""
    if sharding.mesh is None or sharding.collectives != "peer":
        return Mailboxes()
    tokens = sharding.local_shape("BT", shape)
    columns = sharding.local_shape("NH", (config.num_q_heads, config.head_dim))

    def open_here() -> Mailboxes:
        # The devices that hold parts of F are those that hold parts of NH, and of V if any do.
        sums = sharding.mailbox("F", (*tokens, config.embed_dim), dtype)
        return Mailboxes(sums, sharding.mailbox("S", (*tokens, *columns), "float32", arrays=2))

    return peer.open_around(open_here, sharding.mesh)
