"""The Metal kernels: kernels/*.metal through `mx.fast.metal_kernel`, built at first use."""

import functools

import mlx.core as mx

from marlin_cli.ops.kernel_inputs import PAGE_INPUTS
from marlin_cli.ops.kernel_source import Kernel, KernelSource, by_name

PAGES_A_LAUNCH = 3  # a kernel has 31 buffers; a page takes eight

_ATTENTION = ("packed.h.metal", "attention.h.metal")
_PAGES = tuple(f"{name}_{i}" for i in range(PAGES_A_LAUNCH) for name in PAGE_INPUTS)
_PAGED = ("queries", *_PAGES, "left_padding", "lengths", "factor", "sizes")
SOURCES = by_name(
    KernelSource(
        "flash_attention.metal",
        ("queries", "keys", "values", "left_padding", "lengths", "relative_bias", "factor", "sizes"),
        ("out",),
        _ATTENTION,
        row_contiguous=False,
    ),
    KernelSource("flash_attention_kv_fp4.metal", _PAGED, ("parts", "stats"), _ATTENTION, row_contiguous=False),
    KernelSource("flash_attention_kv_fp4_prefill.metal", _PAGED, ("parts", "stats"), _ATTENTION, row_contiguous=False),
    KernelSource(
        "flash_attention_cross_asymmetric.metal",
        ("queries", *PAGE_INPUTS, "lengths", "factor", "sizes"),
        ("parts", "stats"),
        _ATTENTION,
        row_contiguous=False,
    ),
    KernelSource("attention_combine.metal", ("parts", "stats"), ("out",), _ATTENTION),
    KernelSource("patch_embed.metal", ("ids", "table"), ("out",)),
    KernelSource("strided_pool.metal", ("x",), ("out",)),
)


@functools.cache
def kernel(name: str) -> Kernel:
    """The kernel, made at first use."""
    return SOURCES[name].made_by(mx.fast.metal_kernel)
