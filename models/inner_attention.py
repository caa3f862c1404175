"""Which decode steps attend inside the layers' kernel, told from the shapes of a model.

`fused_layers` decides it as a step is traced; this is for those who have no step, only a model's
configuration, and want to say what would run.
"""

from __future__ import annotations

from typing import Any

import jax

from jaxdecode.models.config import LlamaConfig
from jaxdecode.models.params import param_shapes
from jaxdecode.models.sharding import Sharding
from jaxdecode.pallas_kernels import fused_layer
from jaxdecode.pallas_kernels.fused_layer import LayerWeights

_ONE_DEVICE = Sharding()
_CAPACITY = 128  # that of every cache is a multiple of it


def attends_in_layers(
    config: LlamaConfig, dtype: Any, sharding: Sharding = _ONE_DEVICE, batch: int = 1
) -> bool:
    """Whether a step of one token for each of `batch` sequences attends in the layers' kernel, on
    this machine; of a call that leaves the splits to flash_decode."""
    if batch != 1 or config.num_layers < 2 or sharding.mesh is not None:
        return False
    shapes = param_shapes(config)

    def weight(name: str) -> Any:
        return jax.ShapeDtypeStruct(shapes[name], dtype)

    weights = LayerWeights(
        o=weight("layers.0.attn.o"),
        gate_up=weight("layers.0.mlp.gate_up"),
        down=weight("layers.0.mlp.down"),
        mlp_scale=weight("layers.0.mlp_norm.scale"),
        next_scale=weight("layers.1.attn_norm.scale"),
        projections=(weight("layers.1.attn.q"), weight("layers.1.attn.kv")),
    )
    N, K, H = config.num_q_heads, config.num_kv_heads, config.head_dim
    q = jax.ShapeDtypeStruct((1, 1, N, H), dtype)
    keys = jax.ShapeDtypeStruct((1, _CAPACITY, K, H), dtype)
    return fused_layer.why_not(weights) is None and fused_layer.can_attend(weights, q, keys)
