"""Running the GPU kernels on the CPU, in Mosaic's interpreter."""

from __future__ import annotations

import contextlib

import jax
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter_state
from jax.experimental.pallas import mosaic_gpu as plgpu


@contextlib.contextmanager
def interpreted():
    """Interprets every kernel called inside; a race is an error."""
    interpreter_state.reset_gpu_interpret_mode_state()
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
        jax.effects_barrier()  # the interpreter's state is reset only after its last step
        assert not interpreter_state.get_races().races_found, "RACE DETECTED"
    finally:
        interpreter_state.reset_gpu_interpret_mode_state()
