"""The attention benchmark's JAX side: jaxdecode and jax.nn. attention.py starts it and asks it.

A chain calls one implementation many times in one jitted function. The result of a call is the
next one's query, so the calls run one after the other and nothing is spent on keeping them so.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_cases import CASES, DTYPE, Case, H, T, check_result
from attention_worker import attempt, serve
from timing import cupti_kernels, time_of

import jaxdecode as jd

Array = jax.Array
Call = Callable[[Array, Array, Array, Array], Array]
KernelTimes = Callable[[Callable[[], object]], list[float]]

COMPILE_THREADS = 8
# A command buffer is recorded anew when addresses change, as they do from one rotation to the next:
# that would be timed in place of the calls.
COMPILER_OPTIONS = {"xla_gpu_enable_command_buffer": ""}
KERNEL_ROTATIONS = 3


def implementation_calls(case: Case) -> dict[str, Call]:
    """Every implementation as call(q, k, v, kv_len) -> out.

    jax.nn is told no lengths where the caches are full: it is faster without.
    """

    def jax_nn(implementation: str) -> Call:
        def call(q: Array, k: Array, v: Array, kv_len: Array) -> Array:
            lengths = None if case.is_full else kv_len
            return jax.nn.dot_product_attention(
                q, k, v, key_value_seq_lengths=lengths, implementation=implementation
            )

        return call

    ours = functools.partial(functools.partial, jd.decode_attention)
    chosen = jd.explain_attention(*shapes(case)).implementation
    return {
        **({} if chosen == "flash_decode" else {"jaxdecode": ours()}),
        "flash_decode": ours(implementation="flash_decode"),
        "flash_decode_nosplit": ours(implementation="flash_decode", num_splits=1),
        "jaxdecode_xla": ours(implementation="xla"),
        "xla": jax_nn("xla"),
        "cudnn": jax_nn("cudnn"),
    }


def shapes(case: Case) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of q, k, v and kv_len."""
    q = jax.ShapeDtypeStruct((case.B, T, case.N, H), DTYPE)
    kv = jax.ShapeDtypeStruct((case.B, case.S, case.K, H), DTYPE)
    return q, kv, kv, jax.ShapeDtypeStruct((case.B,), jnp.int32)


def chain(call: Call, calls: int) -> Callable:
    """run(q, keys, values, kv_len) -> results of the first and the last of `calls` calls."""
    call = jax.jit(call)  # traced and lowered once for the whole chain

    def run(q: Array, keys: list[Array], values: list[Array], kv_len: Array) -> tuple:
        results = []
        for i in range(calls):
            q = call(q, keys[i % len(keys)], values[i % len(keys)], kv_len)
            results.append(q)
        return results[0], results[-1]

    return run


def make_inputs(case: Case) -> tuple[Array, Array, Array]:
    """q, k, v: random, with needles that no implementation may lose and poison past the end.

    The queries of a KV head share a direction. Three keys along it weigh about as much as all the
    others together: the first, the middle and the last visible one. The first dead slot would
    outweigh everything.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    kv_shape = (case.B, case.S, case.K, H)
    k, v = (jax.random.normal(key, kv_shape, DTYPE) for key in keys[:2])
    pull = jax.random.normal(keys[2], (case.B, case.K, H))
    pull = 8 * pull / jnp.linalg.norm(pull, axis=-1, keepdims=True)
    q = jax.random.normal(keys[3], (case.B, T, case.N, H))
    q = (q + jnp.repeat(pull, case.N // case.K, axis=1)[:, None]).astype(DTYPE)

    row, kv_len = np.arange(case.B), np.array(case.kv_len)
    unit = pull * (math.sqrt(H) / 64)  # a logit of 1 for a query of that direction alone
    needle = (np.log(kv_len).astype(np.float32)[:, None, None] * unit).astype(DTYPE)
    for slot in (np.zeros_like(kv_len), kv_len // 2, kv_len - 1):
        k = k.at[row, slot].set(needle)
    k = k.at[row, kv_len].set(4 * needle, mode="drop")
    return q, k, v.at[row, kv_len].set(100.0, mode="drop")


def reference(q: Array, k: Array, v: Array, kv_len: Array) -> Array:
    """Plain attention in float32."""
    B, _, N, _ = q.shape
    _, S, K, _ = k.shape
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    q = q.reshape(B, K, N // K, H) * H**-0.5
    logits = jnp.einsum("bkgh,bskh->bkgs", q, k, precision="highest")
    visible = jnp.arange(S)[None, :] < kv_len[:, None]
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], logits, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgs,bskh->bkgh", weights, v, precision="highest")
    return out.reshape(B, T, N, H)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The compiled programs of one case; by implementation, a chain of calls and a call alone."""

    inputs: Future
    reference: Future
    programs: dict[str, tuple[Future, Future]]


def prepare(case: Case, implementations: list[str], pool: concurrent.futures.Executor) -> Prepared:
    """Lowers here, where Python is the limit, and compiles in the threads of `pool`."""
    q, kv, _, kv_len = shapes(case)
    rotation = case.rotation

    def compiled(function: Callable, *operands: Any) -> Future:
        try:
            lowered = jax.jit(function).lower(*operands)
            return pool.submit(lowered.compile, COMPILER_OPTIONS)
        except Exception as error:  # noqa: BLE001  what it cannot serve is its result
            future: Future = Future()
            future.set_exception(error)
            return future

    return Prepared(
        compiled(functools.partial(make_inputs, case)),
        compiled(reference, q, kv, kv, kv_len),
        {
            name: tuple(
                compiled(chain(call, calls), q, [kv] * buffers, [kv] * buffers, kv_len)
                for calls, buffers in ((rotation.calls, rotation.buffers), (1, 1))
            )
            for name, call in implementation_calls(case).items()
            if name in implementations
        },
    )


def measure(case: Case, prepared: Prepared, kernel_times: KernelTimes) -> dict[str, dict]:
    """{"us", "kernel_us", "once_us"} of each implementation, or its {"failure"}."""
    q, k, v = prepared.inputs.result()()
    kv_len = jnp.asarray(case.kv_len, jnp.int32)
    ref = prepared.reference.result()(q, k, v, kv_len)
    rotation = case.rotation
    caches = [
        tuple([x.copy() for _ in range(rotation.buffers)] for x in (k, v))
        for _ in range(rotation.chains)
    ]
    pairs = [([x], [y]) for keys, values in caches for x, y in zip(keys, values, strict=True)]

    def rotate(program: Callable, caches: list[tuple], times: int) -> None:
        for _ in range(times):
            for keys, values in caches:
                last = program(q, keys, values, kv_len)
        jax.block_until_ready(last)

    def kernels_of_a_call(program: Callable, caches: list[tuple], calls: int) -> float:
        kernels = kernel_times(lambda: rotate(program, caches, KERNEL_ROTATIONS))
        calls *= len(caches) * KERNEL_ROTATIONS
        if len(kernels) < calls:
            raise RuntimeError(f"CUPTI saw {len(kernels)} kernels of {calls} calls")
        return sum(kernels) / calls * 1e6

    def one(programs: tuple[Future, Future]) -> dict:
        many, alone = (program.result() for program in programs)
        check_result(many(q, *caches[0], kv_len)[0], ref)
        calls = rotation.calls
        us = time_of(lambda times: rotate(many, caches, times)) / calls / len(caches) * 1e6
        shared = kernels_of_a_call(many, caches, calls)
        whole = kernels_of_a_call(alone, pairs, 1)
        # What a chain does once, such as a plan, is in `whole`, and a part of it in `shared`.
        kernel_us = (calls * shared - whole) / (calls - 1)
        return {"us": us, "kernel_us": kernel_us, "once_us": whole - kernel_us}

    return {name: attempt(functools.partial(one, x)) for name, x in prepared.programs.items()}


def main() -> None:
    """Answers attention.py: first "prepare", then "read_peak" and "measure"."""
    prepared: dict[int, Prepared] = {}

    def kernel_times(run: Callable[[], object]) -> list[float]:
        return [seconds for _, seconds in cupti_kernels(run)]

    pool = concurrent.futures.ThreadPoolExecutor(COMPILE_THREADS)

    def answer(request: dict) -> Any:
        match request["do"]:
            case "prepare":
                deadline = time.monotonic() + request["seconds"]
                for index in request["cases"]:
                    if time.monotonic() > deadline:
                        break
                    prepared[index] = prepare(CASES[index], request["implementations"], pool)
                pool.shutdown()  # waits for all of them
                device = jax.devices()[0].device_kind
                return {
                    "versions": {"jax": jax.__version__},
                    "device": device,
                    "missing": {},
                    "cases": list(prepared),
                }
            case "read_peak":
                from jaxdecode.read_bandwidth import measure_read_ceiling

                return measure_read_ceiling().methods
            case "measure":
                index = request["case"]
                # Popped: a measured case's programs are not needed again.
                return measure(CASES[index], prepared.pop(index), kernel_times)
        raise ValueError(f"unknown request {request}")

    serve(answer)


if __name__ == "__main__":
    main()
