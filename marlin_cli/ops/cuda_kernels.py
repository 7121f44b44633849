"""The CUDA kernels: kernels/*.cu, compiled at first use; those that take rows without gaps are kept, see `cuda_kept`."""

import functools

import mlx.core as mx

from marlin_cli.ops.cuda_kept import KeptKernel
from marlin_cli.ops.kernel_inputs import PAGE_INPUTS
from marlin_cli.ops.kernel_source import Kernel, KernelSource, by_name

PAGES_A_LAUNCH = 8

_PACKED = ("standard.cuh", "packed.cuh")
_ATTENTION = (*_PACKED, "attention.cuh")
_PAGES = tuple(f"{name}_{i}" for i in range(PAGES_A_LAUNCH) for name in PAGE_INPUTS)
SOURCES = by_name(
    KernelSource("marlin_gemm_fp4.cu", ("x", "weight", "scales", "zeros"), ("out",), (*_PACKED, "ptx.cuh")),
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
    KernelSource("unpack.cu", ("weight", "scales", "zeros"), ("out",), _PACKED),
    KernelSource("patch_embed.cu", ("ids", "table"), ("out",), _PACKED),
    KernelSource("strided_pool.cu", ("x",), ("out",), _PACKED),
)


@functools.cache
def kernel(name: str, in_rows: bool = False) -> Kernel:
    """The kernel, made at first use: MLX refuses to without CUDA.

    Args:
        in_rows: may it copy inputs of which it would follow the strides? Then what is compiled is kept, else MLX compiles it in
            each process.
    """
    source = SOURCES[name]
    return KeptKernel(source) if in_rows or source.row_contiguous else source.made_by(mx.fast.cuda_kernel)
