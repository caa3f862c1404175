"""The attention benchmark's torch side: SDPA, FlashAttention-3 and FlashInfer.

attention.py starts it and asks it. The calls of a case are captured in one CUDA graph.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from attention_cases import CASES, DTYPE, PAGE, Case, H, T, check_result, full
from attention_worker import attempt, describe, serve
from torch.nn.attention import SDPBackend, sdpa_kernel

Tensor = torch.Tensor
Call = Callable[[Tensor, Tensor], Tensor]
Timer = Callable[[list[Callable[[], Tensor]]], dict[str, float]]

# By implementation, what it needs: (module, distribution).
NEEDS = {
    "fa3": ("fa3_fwd_interface", "fa3-fwd"),
    "fa3_nosplit": ("fa3_fwd_interface", "fa3-fwd"),
    "flashinfer": ("flashinfer", "flashinfer-python"),
}
SAMPLES, SAMPLE_MS = 5, 20.0  # timings of `us`, and how much work each holds at least
KERNEL_REPLAYS = 3
WORKSPACE_BYTES = 256 * 2**20


def make_call(name: str, case: Case, q: Tensor) -> Call:
    """The implementation as call(k, v) -> out [B, T, N, H] for the queries `q`."""
    match name:
        case "sdpa_flash":
            return sdpa(case, q, SDPBackend.FLASH_ATTENTION)
        case "sdpa_cudnn":
            return sdpa(case, q, SDPBackend.CUDNN_ATTENTION)
        case "fa3":
            return flash_attention_3(case, q, num_splits=0)  # its own choice
        case "fa3_nosplit":
            return flash_attention_3(case, q, num_splits=1)
        case "flashinfer":
            obstacle = flashinfer_obstacle(case.B == 1, case.N != case.K)
            if obstacle is not None:
                raise RuntimeError(obstacle)
            return flashinfer_single(case, q) if case.B == 1 else flashinfer_batch(case, q)
    raise ValueError(f"unknown implementation {name}")


def sdpa(case: Case, q: Tensor, backend: SDPBackend) -> Call:
    """torch's own attention. It takes no lengths: equal ones are cut off beforehand, as views."""
    if case.is_ragged:
        raise NotImplementedError("scaled_dot_product_attention takes no lengths")
    length, grouped = case.kv_len[0], case.N != case.K

    def call(k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (q, k[:, :length], v[:, :length]))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*heads_first, enable_gqa=grouped).transpose(1, 2)

    return call


def flash_attention_3(case: Case, q: Tensor, num_splits: int) -> Call:
    """FlashAttention-3 on a cache. It is told no lengths of full ones: it is faster without."""
    import fa3_fwd_interface

    lengths = torch.tensor(case.kv_len, dtype=torch.int32, device=q.device)

    def call(k: Tensor, v: Tensor) -> Tensor:
        return fa3_fwd_interface.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=None if case.is_full else lengths, num_splits=num_splits
        )

    return call


def flashinfer_single(case: Case, q: Tensor) -> Call:
    """FlashInfer for one sequence; the length is that of a view."""
    import flashinfer

    length = case.kv_len[0]

    def call(k: Tensor, v: Tensor) -> Tensor:
        return flashinfer.single_decode_with_kv_cache(
            q[0, 0], k[0, :length], v[0, :length], use_tensor_cores=True
        )[None, None]

    return call


def flashinfer_batch(case: Case, q: Tensor) -> Call:
    """FlashInfer for a batch: the caches seen as pages in order, the work planned beforehand.

    With tensor cores, on Hopper, it would take its kernel "fa3" by itself, which is for prompts: it
    cuts no keys and reads those of a KV head once for each query head. "fa2" does neither. Its mode
    for CUDA graphs is for plans that change between replays, and splits even where that only costs.
    """
    import flashinfer

    tables = [torch.tensor(x, dtype=torch.int32, device=q.device) for x in case.page_tables()]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device),
        use_tensor_cores=case.N != case.K,  # faster for grouped queries, says its documentation
        backend="fa2",
    )
    wrapper.plan(*tables, case.N, case.K, H, PAGE, q_data_type=q.dtype, kv_data_type=q.dtype)

    def call(k: Tensor, v: Tensor) -> Tensor:
        paged = tuple(x.view(-1, PAGE, case.K, H) for x in (k, v))
        return wrapper.run(q[:, 0], paged)[:, None]

    return call


@functools.cache
def flashinfer_obstacle(single: bool, grouped: bool) -> str | None:
    """Builds FlashInfer's kernels, which takes a minute; the reason if they cannot be built."""
    case = full(1 if single else 2, 64, 8, 2 if grouped else 8)
    q, k, v, _ = make_inputs(case, "cuda")
    try:
        make = flashinfer_single if single else flashinfer_batch
        make(case, q)(k, v)
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  a compiler's errors are of many kinds
        return f"its kernels could not be built: {describe(error)}"
    return None


def make_inputs(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, kv_len in the manner of attention_jax.make_inputs."""
    torch.manual_seed(0)
    options = {"device": device, "dtype": getattr(torch, DTYPE)}
    k, v = (torch.randn(case.B, case.S, case.K, H, **options) for _ in range(2))
    pull = torch.randn(case.B, case.K, H, device=device)
    pull = 8 * pull / pull.norm(dim=-1, keepdim=True)
    q = torch.randn(case.B, T, case.N, H, device=device)
    q = (q + pull.repeat_interleave(case.N // case.K, dim=1)[:, None]).to(k.dtype)

    row = torch.arange(case.B, device=device)
    kv_len = torch.tensor(case.kv_len, dtype=torch.int32, device=device)
    needle = kv_len.log()[:, None, None] * pull * (math.sqrt(H) / 64)
    last = kv_len.long() - 1
    for slot in (torch.zeros_like(last), kv_len.long() // 2, last):
        k[row, slot] = needle.to(k.dtype)
    dead = kv_len < case.S
    k[row[dead], last[dead] + 1] = 4 * needle[dead].to(k.dtype)
    v[row[dead], last[dead] + 1] = 100.0
    return q, k, v, kv_len


def reference(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor) -> Tensor:
    """Plain attention in float32."""
    B, _, N, _ = q.shape
    _, S, K, _ = k.shape
    q = q.float().view(B, K, N // K, H) * H**-0.5
    logits = torch.einsum("bkgh,bskh->bkgs", q, k.float())
    visible = torch.arange(S, device=q.device) < kv_len[:, None]
    logits = logits.masked_fill(~visible[:, None, None], -math.inf)
    return torch.einsum("bkgs,bskh->bkgh", logits.softmax(-1), v.float()).view(B, T, N, H)


def measure(case: Case, names: list[str], device: str, timer: Timer) -> dict[str, dict]:
    """{"us", "kernel_us"} of each implementation, or its {"failure"}."""
    q, k, v, kv_len = make_inputs(case, device)
    ref = reference(q, k, v, kv_len).cpu().numpy()
    rotation = case.rotation
    distinct = rotation.buffers * rotation.chains
    caches = [(k.clone(), v.clone()) for _ in range(distinct)]

    def one(name: str) -> dict:
        call = make_call(name, case, q)
        check_result(call(*caches[0]).float().cpu().numpy(), ref)
        calls = rotation.calls * rotation.chains
        return timer([functools.partial(call, *caches[i % distinct]) for i in range(calls)])

    return {name: attempt(functools.partial(one, name)) for name in names}


def time_graph(calls: list[Callable[[], Tensor]]) -> dict[str, float]:
    """{"us", "kernel_us"} per call, all of them in one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()

    def milliseconds(times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / times

    times = math.ceil(SAMPLE_MS / milliseconds(1))
    us = statistics.median(milliseconds(times) for _ in range(SAMPLES)) * 1e3
    kernels = kernel_microseconds(lambda: [graph.replay() for _ in range(KERNEL_REPLAYS)])
    if len(kernels) < KERNEL_REPLAYS * len(calls):
        raise RuntimeError(f"the profiler saw {len(kernels)} kernels of {len(calls)} calls")
    return {"us": us / len(calls), "kernel_us": sum(kernels) / KERNEL_REPLAYS / len(calls)}


def kernel_microseconds(run: Callable[[], Any]) -> list[float]:
    """The duration of each kernel that runs on the GPU while `run` does."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return [
        event.time_range.elapsed_us()
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))  # as on the JAX side
    ]


def prepare(names: list[str], cases: list[Case]) -> dict:
    """Imports what the implementations need, and builds FlashInfer's kernels for the cases."""
    versions, missing = {"torch": torch.__version__}, {}
    for name in names:
        module, distribution = NEEDS.get(name, ("torch", "torch"))
        try:
            importlib.import_module(module)
            versions[distribution] = importlib.metadata.version(distribution)
        except Exception as error:  # noqa: BLE001  a wheel for another torch fails in many ways
            missing[name] = describe(error)
    if not torch.cuda.is_available():
        return {"versions": versions, "missing": dict.fromkeys(names, "torch finds no GPU")}
    if "flashinfer" in names and "flashinfer" not in missing:
        for case in cases:
            flashinfer_obstacle(case.B == 1, case.N != case.K)
    return {"versions": versions, "missing": missing}


def main() -> None:
    """Answers attention.py: first "prepare", then "measure"."""
    names: list[str] = []

    def answer(request: dict) -> Any:
        match request["do"]:
            case "prepare":
                cases = [CASES[index] for index in request["cases"]]
                found = prepare(request["implementations"], cases)
                names.extend(
                    name for name in request["implementations"] if name not in found["missing"]
                )
                return found
            case "measure":
                results = measure(CASES[request["case"]], names, "cuda", time_graph)
                torch.cuda.empty_cache()  # the GPU is shared with JAX
                return results
        raise ValueError(f"unknown request {request}")

    serve(answer)


if __name__ == "__main__":
    main()
