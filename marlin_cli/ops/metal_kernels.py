"""The Metal kernels: kernels/*.metal through `mx.fast.metal_kernel`, built at first use."""

import functools

import mlx.core as mx

from marlin_cli.ops.kernel_inputs import PAGE_INPUTS
from marlin_cli.ops.kernel_source import Kernel, KernelSource, by_name

PAGES_A_LAUNCH = 3  # a kernel has 31 buffers; a page takes eight

_ATTENTION = ("packed.h.metal", "attention.h.metal")
_FEW_ROWS = (*_ATTENTION, "few_rows.h.metal")
_PAGES = tuple(f"{name}_{i}" for i in range(PAGES_A_LAUNCH) for name in PAGE_INPUTS)
_PAGED = ("queries", *_PAGES, "left_padding", "lengths", "factor", "sizes")


def _weights(layer: str) -> tuple[str, str, str]:
    """The inputs that are a linear layer's weights."""
    return f"{layer}_words", f"{layer}_scales", f"{layer}_zeros"


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
    KernelSource(
        "norm_linear.metal",
        ("rows", "gains", *_weights("layer"), "bias", "added", "factors", "sizes"),
        ("out",),
        _FEW_ROWS,
    ),
    KernelSource(
        "norm_feed_forward.metal",
        ("rows", "gains", *_weights("up"), "up_bias", *_weights("gate"), "gate_bias", "factors", "sizes"),
        ("out",),
        _FEW_ROWS,
    ),
    KernelSource(
        "norm_projections.metal",
        (
            "rows",
            "gains",
            *_weights("query"),
            *_weights("key"),
            *_weights("value"),
            "keys_before",
            "values_before",
            "left_padding",
            "counts",
            "factors",
            "sizes",
        ),
        ("queries", "keys", "values"),
        _FEW_ROWS,
    ),
    KernelSource(
        "tail_attention_linear.metal",
        ("queries", "keys", "values", *_weights("layer"), "added", "counts", "factors", "sizes"),
        ("out",),
        _FEW_ROWS,
    ),
    KernelSource(
        "cache_attention.metal",
        (
            "queries",
            "stored_keys",
            "stored_values",
            "keys",
            "values",
            "left_padding",
            "relative_bias",
            "counts",
            "factors",
            "sizes",
        ),
        ("parts", "stats"),
        _ATTENTION,
    ),
    KernelSource(
        "joined_linear.metal", ("parts", "stats", *_weights("layer"), "added", "factors", "sizes"), ("out",), _FEW_ROWS
    ),
    KernelSource(
        "draw_embed.metal",
        ("logits", "noise", "filters", "ids_before", "table", "positions", "sizes"),
        ("ids", "rows"),
    ),
    KernelSource("patch_embed.metal", ("ids", "table"), ("out",)),
    KernelSource("strided_pool.metal", ("x",), ("out",)),
)


@functools.cache
def kernel(name: str) -> Kernel:
    """The kernel, made at first use."""
    return SOURCES[name].made_by(mx.fast.metal_kernel)
