"""How long work takes on the device: by the host's clock, and kernel by kernel."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

from jaxdecode.errors import DeviceError

SAMPLES, SAMPLE_S = 5, 0.02  # timings of `time_of`, and how much work each holds at least


def time_of(rotate: Callable[[int], None]) -> float:
    """Seconds of one rotation among many in a row, the median of several samples.

    Args:
      rotate: rotate(n) makes n rotations and waits for their end.
    """
    rotate(1)

    def seconds(times: int) -> float:
        start = time.perf_counter()
        rotate(times)
        return (time.perf_counter() - start) / times

    times = math.ceil(SAMPLE_S / seconds(1))
    return statistics.median(seconds(times) for _ in range(SAMPLES))


def cupti_kernels(run: Callable[[], object]) -> list[tuple[str, float]]:
    """Name and seconds of each kernel that runs on the GPUs while `run` does, which waits for it.

    Raises:
      DeviceError: there is no CUPTI here.
    """
    from jax.experimental.mosaic.gpu import profiler

    if profiler.mosaic_gpu_lib is None:
        raise DeviceError("kernel times need CUPTI, which comes with JAX's CUDA plugin")
    cupti = profiler.mosaic_gpu_lib._mosaic_gpu_ext
    cupti._cupti_init()
    try:
        run()
    finally:
        # False: the process stays attached to CUPTI, which it will need again.
        kernels = cupti._cupti_get_timings(False)
    return [(name, milliseconds / 1e3) for name, milliseconds in kernels]
