"""What kernels are for: from the text of a compiled program, and from their own names."""

from __future__ import annotations

import ast

import jax
import jax.numpy as jnp
import pytest

import jaxdecode as jd

# As XLA prints a program for GPUs, shortened.
HLO = """\
HloModule jit_decode

%fused_reduce.22 (param_0: bf16[8192,2,128], param_1: bf16[8192]) -> bf16[2,128] {
  %mul.1 = f32[8192,2,128] multiply(%a, %b), metadata={op_name="btd,dckh->btckh/dot_general"}
  ROOT %sum.1 = f32[2,128] reduce(%mul.1, %zero), metadata={op_name="btd,dckh->btckh/dot_general"}
}

%gemm_fusion_dot.43_computation (p.0: bf16[5504,1], p.1: bf16[5504,8192]) -> f32[4,1,8192] {
  ROOT %dot.66 = f32[4,8192,1] dot(%p.1, %p.0), lhs_contracting_dims={1}
}

%gemm_fusion_dot.17_computation (p.0: bf16[8192,2,128], p.1: bf16[2,8,128]) -> f32[2,8192,8] {
  ROOT %dot.3 = f32[2,8192,8] dot(%p.0, %p.1), metadata={op_name="x/portable_attention/dot_general"}
}

%fused_select (p.0: bf16[2,128]) -> bf16[1,1,2,128] {
  %cast.1 = bf16[2,128] convert(%p.0), metadata={op_name="btd,dckh->btckh/dot_general"}
  ROOT %select.1 = bf16[1,1,2,128] select(%c, %cast.1, %d), metadata={op_name="select"}
}

ENTRY %main (param: bf16[8192]) -> bf16[8192] {
  %input_reduce_fusion.19 = bf16[2,128] fusion(%w, %x), kind=kInput, calls=%fused_reduce.22
  %gemm_fusion_dot.43 = f32[4,1,8192] fusion(%y, %w), calls=%gemm_fusion_dot.43_computation, x={}
  %gemm_fusion_dot.17 = f32[2,8192,8] fusion(%k, %q), calls=%gemm_fusion_dot.17_computation
  %loop_select_fusion = bf16[1,1,2,128] fusion(%input_reduce_fusion.19), calls=%fused_select
  ROOT %reduce.9 = f32[] reduce(%z, %zero), metadata={op_name="dot_general"}
}
"""


@pytest.fixture
def items(script):
    return script("kernel_items")


def test_fusions_are_what_they_consist_of(items):
    assert items.items_of_fusions(HLO) == {
        "input_reduce_fusion_19": "matvecs",
        "gemm_fusion_dot_43": "matvecs",
        "gemm_fusion_dot_17": "attention",
        "loop_select_fusion": "rest",
    }


@pytest.mark.parametrize(
    ("kernel", "item"),
    [
        ("gemm_fusion_dot_17", "attention"),
        ("gemm_fusion_dot_43", "matvecs"),
        ("gemm_fusion_dot_99", "rest"),
        ("loop_select_fusion", "rest"),
        (
            "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
            "collectives",
        ),
        ("stream_executor::gpu::AllReduceKernelImpl<bfloat16>", "collectives"),
        ("all_reduce_add_norm_mosaic_gpu_kernel", "collectives"),
        ("exchange_and_merge_mosaic_gpu_kernel", "collectives"),
        ("peer_sum_mosaic_gpu_kernel", "collectives"),
        ("peer_sum_and_norm_mosaic_gpu_kernel", "collectives"),
        ("add_and_norm_mosaic_gpu_kernel", "rest"),
        ("peer_merge_mosaic_gpu_kernel", "collectives"),
        ("flash_decode_split_mosaic_gpu_kernel", "attention"),
        ("flash_decode_combine_mosaic_gpu_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "matvecs"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "matvecs"),
        ("void cutlass::Kernel2<cutlass_80_tensorop>", "matvecs"),
        ("void cublasLt::splitKreduce_kernel<32, 16>", "matvecs"),
        ("wrapped_transpose_1", "rest"),
    ],
)
def test_kernels(items, kernel, item):
    assert items.item_of_kernel(kernel, items.items_of_fusions(HLO)) == item


def kernel_names(text: str) -> tuple[int, list[str]]:
    """How many kernels of a source file get no name, and the names that it gives."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    given = [{each.arg: each.value for each in call.keywords} for call in calls]
    unnamed = [
        call
        for call, keywords in zip(calls, given, strict=True)
        if ast.unparse(call.func) == "plgpu.kernel" and "kernel_name" not in keywords
    ]
    values = [keywords["kernel_name"] for keywords in given if "kernel_name" in keywords]
    return len(unnamed), [each.value for each in values if isinstance(each, ast.Constant)]


def test_the_kernels_of_the_package_have_names_that_say_it(items, project_root):
    """A collective's kernel would be taken for attention if all were called anonymous."""
    found = {}
    for path in sorted((project_root / "pallas_kernels").glob("*.py")):
        unnamed, names = kernel_names(path.read_text())
        assert unnamed == 0, path.name
        assert not found.keys() & names
        found |= {name: items.item_of_kernel(f"{name}_mosaic_gpu_kernel", {}) for name in names}
    assert len(found) >= 7
    assert {name for name, item in found.items() if item == "collectives"} == {
        "peer_sum", "peer_sum_and_norm", "peer_merge",
    }  # fmt: skip
    assert {name for name, item in found.items() if item == "attention"} == {
        name for name in found if name.startswith("flash_decode")
    }


def test_a_kernel_without_a_name_is_found():
    assert kernel_names("plgpu.kernel(f, grid=())(x)") == (1, [])
    assert kernel_names('plgpu.kernel(f, kernel_name="a")(x)') == (0, ["a"])
    assert kernel_names('plgpu.kernel(f, kernel_name=n)(x); g(kernel_name="b")') == (0, ["b"])


def test_times_are_added_up(items):
    fusions = items.items_of_fusions(HLO)
    kernels = [
        ("gemm_fusion_dot_43", 3.0), ("gemm_fusion_dot_43", 1.0), ("gemm_fusion_dot_17", 2.0),
        ("loop_add_fusion_1", 0.5), ("loop_add_fusion_2", 0.25), ("nccl_x(int, long)", 8.0),
    ]  # fmt: skip
    times, by_name = items.itemised(kernels, fusions)
    assert times == {"matvecs": 4.0, "attention": 2.0, "collectives": 8.0, "rest": 0.75}
    assert [tuple(entry.values()) for entry in by_name] == [
        ("nccl_x", "collectives", 1, 8.0),
        ("gemm_fusion_dot", "matvecs", 2, 4.0),
        ("gemm_fusion_dot", "attention", 1, 2.0),
        ("loop_add_fusion", "rest", 2, 0.75),
    ]
    assert items.itemised([], fusions)[0] == dict.fromkeys(items.ITEMS, 0.0)


def test_a_real_program_tells_products_from_attention(items):
    """On this machine's compiler; its fusions have other names but the same metadata."""

    def step(q, w, kv):
        q = jnp.tanh(q @ w).reshape(1, 1, 2, 8)
        out = jd.decode_attention(q, kv, kv, 70, implementation="xla")
        return jnp.cumsum(jnp.sort(out.reshape(1, 16) @ w))

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in [(1, 16), (16, 16), (1, 128, 2, 8)]]
    found = items.items_of_fusions(jax.jit(step).lower(*shapes).compile().as_text())
    assert {"attention", "rest"} <= set(found.values())
