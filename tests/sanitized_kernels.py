"""Runs kernels under compute-sanitizer: `sanitized_kernels.py flash_decode|out_of_bounds|race`.

The last two have a planted fault each, which shows that the tool sees such faults in our kernels.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdecode.pallas_kernels import decode_attention


def flash_decode():
    """Capacities that are and are not a multiple of a tile, one query token and several, few query
    rows and as many as two warpgroups share, heads that fill no tile; in one launch and in two."""
    in_two = (
        (2, 512, 1, 4, 128, None), (2, 200, 3, 4, 128, 3), (2, 512, 2, 4, 128, 1),
        (2, 512, 1, 32, 128, None), (2, 200, 2, 32, 128, 2), (6, 200, 17, 3, 80, None),
        (60, 128, 1, 3, 96, None),
    )  # fmt: skip
    for case in (*in_two, (1, 512, 1, 8, 128, None), (1, 4096, 5, 3, 80, None)):
        attend(*case)


def attend(B, S, T, group, H, num_splits):
    rng = np.random.default_rng(0)
    shapes = ((B, T, 2 * group, H), (B, S, 2, H), (B, S, 2, H))
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    kv_len = jnp.asarray([S, S // 2 + 1] * (B // 2) or [S], jnp.int32)
    out = decode_attention(q, k, v, kv_len, implementation="flash_decode", num_splits=num_splits)
    assert np.isfinite(np.asarray(out, np.float32)).all()


def out_of_bounds():
    """Writes far past the end of its result: JAX allocates more than it needs."""

    def kernel(out_ref):
        out_ref[lax.axis_index("i") + (2**31 - 2**10)] = jnp.float32(1)

    shape = jax.ShapeDtypeStruct((128,), jnp.float32)
    plgpu.kernel(kernel, out_type=shape, grid=(1,), grid_names=("i",))().block_until_ready()


def race():
    """Two warpgroups write the same shared memory, and neither waits for the other. So often that
    they do it at the same time: the tool forgets a warp that has ended."""

    def kernel(out_ref, smem):
        thread = lax.axis_index("thread").astype(jnp.float32)
        layout = plgpu.Layout.WG_STRIDED((128,), vec_size=1)

        @pl.loop(0, 1000)
        def _(i):
            smem[...] = plgpu.layout_cast(jnp.full((128,), thread + i), layout)
            out_ref[...] = plgpu.load(smem, layout=layout)

    plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
        scratch_types=[plgpu.SMEM((128,), jnp.float32)],
        num_threads=2,
        thread_name="thread",
    )().block_until_ready()


if __name__ == "__main__":
    {"flash_decode": flash_decode, "out_of_bounds": out_of_bounds, "race": race}[sys.argv[1]]()
    print("done")
