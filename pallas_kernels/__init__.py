"""Decode attention on arrays: the ops, without any model. Imports jax and numpy only."""

if __name__ != "jaxdecode.pallas_kernels":
    raise ImportError(
        f"this package was imported as {__name__!r}; import it as 'jaxdecode.pallas_kernels', "
        "or its functions would exist twice"
    )

from jaxdecode.pallas_kernels.attention_choice import IMPLEMENTATIONS, AttentionChoice
from jaxdecode.pallas_kernels.combine import combine_partials
from jaxdecode.pallas_kernels.decode_attention import decode_attention, explain_attention
from jaxdecode.pallas_kernels.sharded import (
    Part,
    attend_part,
    merge_columns,
    sharded_decode_attention,
)

__all__ = [
    "IMPLEMENTATIONS",
    "AttentionChoice",
    "Part",
    "attend_part",
    "combine_partials",
    "decode_attention",
    "explain_attention",
    "merge_columns",
    "sharded_decode_attention",
]
