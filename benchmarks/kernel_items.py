"""What the kernels of a decode step are for: matvecs, attention, collectives, or the rest.

XLA names a kernel after the fusion that it comes from, such as input_reduce_fusion_19, which does
not say what it is for; but the compiled program says which operations a fusion consists of. Kernels
of NCCL, of libraries and of jaxdecode are known by their own names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

MATVECS, ATTENTION, COLLECTIVES, REST = ITEMS = ("matvecs", "attention", "collectives", "rest")

_BY_NAME = (
    (
        COLLECTIVES,
        re.compile(r"nccl|peer_|all_?reduce|all_?gather|all_?to_?all|exchange", re.IGNORECASE),
    ),
    (ATTENTION, re.compile(r"flash_decode|cudnn.*(attention|sdpa)", re.IGNORECASE)),
    # Triton's are fusions, so these are libraries'; XLA's attention may use them too.
    (
        MATVECS,
        re.compile(r"^(?!gemm_fusion).*(gem[mv]|nvjet|cutlass|cublas|splitk)", re.IGNORECASE),
    ),
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_FUSION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = .* fusion\(.*calls=%?([\w.-]+)")
_ATTENTION_PART = re.compile(r'op_name="[^"]*/portable_attention/')
# A product that XLA made a multiplication and a sum, or cut in parts and summed, is a reduction.
_PRODUCT = re.compile(r' dot\(| reduce\(.*op_name="[^"]*dot_general')


def items_of_fusions(hlo: str) -> dict[str, str]:
    """The item of each fusion of a compiled program, by the name that its kernel gets."""
    items: dict[str, str] = {}  # of computations
    fusions: dict[str, str] = {}
    computation = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header[1]
        if _ATTENTION_PART.search(line):
            items[computation] = ATTENTION
        elif _PRODUCT.search(line):
            items.setdefault(computation, MATVECS)
        if fusion := _FUSION.match(line):
            fusions[fusion[1]] = fusion[2]
    return {re.sub(r"[.-]", "_", name): items.get(called, REST) for name, called in fusions.items()}


def item_of_kernel(kernel: str, fusions: Mapping[str, str]) -> str:
    """The item of a kernel by the name that CUPTI gives it.

    Args:
      fusions: from `items_of_fusions`.
    """
    if kernel in fusions:
        return fusions[kernel]
    return next((item for item, pattern in _BY_NAME if pattern.search(kernel)), REST)


def itemised(
    kernels: Iterable[tuple[str, float]], fusions: Mapping[str, str]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(seconds of each item; count and seconds of each kernel, numbers in names dropped).

    Args:
      kernels: name and seconds of each run of a kernel.
    """
    items = dict.fromkeys(ITEMS, 0.0)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for kernel, seconds in kernels:
        item = item_of_kernel(kernel, fusions)
        items[item] += seconds
        name = re.sub(r"_\d+\b", "", kernel.split("(")[0])[:80]
        entry = found.setdefault(
            (name, item), {"name": name, "item": item, "count": 0, "seconds": 0.0}
        )
        entry["count"] += 1
        entry["seconds"] += seconds
    return items, sorted(found.values(), key=lambda entry: -entry["seconds"])
