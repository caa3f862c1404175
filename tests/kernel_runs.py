"""Running the GPU kernels on the CPU, in Mosaic's interpreter, and lowering them for CUDA."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter_state
from jax.experimental.pallas import mosaic_gpu as plgpu


@contextlib.contextmanager
def interpreted(detect_races=True):
    """Interprets every kernel called inside; a race is an error, unless they are not looked for."""
    interpreter_state.reset_gpu_interpret_mode_state()
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
            yield
        jax.effects_barrier()  # the interpreter's state is reset only after its last step
        if detect_races:
            assert not interpreter_state.get_races().races_found, "RACE DETECTED"
    finally:
        interpreter_state.reset_gpu_interpret_mode_state()


def accumulate(acc, p, v_tile):
    """What `mosaic.accumulate` computes, by means that the interpreter has."""
    values = v_tile[...]
    plgpu.commit_smem()  # a load, unlike that product, is not in order with TMA by itself
    return acc + jnp.dot(p, values, preferred_element_type=jnp.float32)


def inputs(B, T, S, N, K, H, dtype=jnp.bfloat16, kv_len=None, window=None):
    """q, k, v and lengths, if not given full, empty and in between; NaN where no query sees."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=s) for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
    kv_len = np.array([S - 37, 0, S, S // 2][:B] if kv_len is None else kv_len, np.int32)
    for row, length in enumerate(kv_len):
        first = 0 if window is None else max(0, length - T - window + 1)
        for x in (k, v):
            x[row, :first] = x[row, length:] = np.nan
    return *(jnp.asarray(x, dtype) for x in (q, k, v)), kv_len


def input_shapes(B, T, S, N, K, H, dtype=jnp.bfloat16):
    """Shapes of q, k, v and of both ends of the ranges that the queries see."""
    q = jax.ShapeDtypeStruct((B, T, N, H), dtype)
    kv = jax.ShapeDtypeStruct((B, S, K, H), dtype)
    ranges = jax.ShapeDtypeStruct((B, T), jnp.int32)
    return q, kv, kv, ranges, ranges


def lowered_for_cuda(call, *shapes):
    """What is compiled for CUDA, where this process has no GPU."""
    return jax.jit(call).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
