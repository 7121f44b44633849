"""The CUDA kernels: kernels/*.cu through `mx.fast.cuda_kernel`, built at first use."""

import functools

import mlx.core as mx

from marlin_cli.ops.kernel_inputs import PAGE_INPUTS
from marlin_cli.ops.kernel_source import Kernel, KernelSource, by_name

PAGES_A_LAUNCH = 8

_ATTENTION = ("packed.cuh", "attention.cuh")
_PAGES = tuple(f"{name}_{i}" for i in range(PAGES_A_LAUNCH) for name in PAGE_INPUTS)
SOURCES = by_name(
    KernelSource("marlin_gemm_fp4.cu", ("x", "weight", "scales", "zeros"), ("out",), ("packed.cuh", "ptx.cuh")),
    KernelSource(
        "flash_attention.cu",
        ("queries", "keys", "values", "left_padding", "lengths", "relative_bias", "factor"),
        ("out",),
        _ATTENTION,
        row_contiguous=False,
    ),
    KernelSource(
        "flash_attention_kv_fp4.cu",
        ("queries", *_PAGES, "left_padding", "lengths", "factor", "span"),
        ("parts", "log_weights"),
        _ATTENTION,
        row_contiguous=False,
    ),
    KernelSource(
        "flash_attention_cross_asymmetric.cu",
        ("queries", *PAGE_INPUTS, "lengths", "factor", "span"),
        ("parts", "log_weights"),
        _ATTENTION,
        row_contiguous=False,
    ),
    KernelSource("attention_combine.cu", ("parts", "log_weights"), ("out",), _ATTENTION),
    KernelSource("unpack.cu", ("weight", "scales", "zeros"), ("out",), ("packed.cuh",)),
    KernelSource("patch_embed.cu", ("ids", "table"), ("out",), ("packed.cuh",)),
    KernelSource("strided_pool.cu", ("x",), ("out",), ("packed.cuh",)),
)


@functools.cache
def kernel(name: str, shared_memory: int = 0) -> Kernel:
    """The kernel, made at first use: MLX refuses to without CUDA. `shared_memory` bytes are beside what its text declares."""
    maker = functools.partial(mx.fast.cuda_kernel, shared_memory=shared_memory) if shared_memory else mx.fast.cuda_kernel
    return SOURCES[name].made_by(maker)
