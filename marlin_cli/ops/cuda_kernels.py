"""The CUDA kernels: their text in kernels/, their parameters, and MLX's runtime compiler, which builds them at first use."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from marlin_cli.files import shipped
from marlin_cli.ops.kernel_inputs import PAGE_INPUTS

PAGES_A_LAUNCH = 8


@dataclass(frozen=True)
class KernelSource:
    """A kernel's text and parameters, as `mx.fast.cuda_kernel` wants them."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    headers: tuple[str, ...] = ("packed.cuh",)
    row_contiguous: bool = True  # inputs are copied to rows where they are not; else the kernel follows their strides

    def header(self) -> str:
        return "".join(code(name) for name in self.headers)

    def body(self) -> str:
        return code(f"{self.name}.cu")


def code(name: str) -> str:
    """A kernel file without comments and indentation: MLX copies and hashes the text at every launch."""
    lines = (line.split("//")[0].strip() for line in shipped(f"kernels/{name}").read_text(encoding="utf-8").splitlines())
    return "".join(f"{line}\n" for line in lines if line)


_ATTENTION = ("packed.cuh", "attention.cuh")
_PAGES = tuple(f"{name}_{i}" for i in range(PAGES_A_LAUNCH) for name in PAGE_INPUTS)
SOURCES = {
    source.name: source
    for source in (
        KernelSource("marlin_gemm_fp4", ("x", "weight", "scales"), ("out",), ("packed.cuh", "ptx.cuh")),
        KernelSource(
            "flash_attention",
            ("queries", "keys", "values", "left_padding", "lengths", "relative_bias", "factor"),
            ("out",),
            _ATTENTION,
            row_contiguous=False,
        ),
        KernelSource(
            "flash_attention_kv_fp4",
            ("queries", *_PAGES, "left_padding", "lengths", "factor", "span"),
            ("parts", "log_weights"),
            _ATTENTION,
            row_contiguous=False,
        ),
        KernelSource(
            "flash_attention_cross_asymmetric",
            ("queries", *PAGE_INPUTS, "lengths", "factor", "span"),
            ("parts", "log_weights"),
            _ATTENTION,
            row_contiguous=False,
        ),
        KernelSource("attention_combine", ("parts", "log_weights"), ("out",), _ATTENTION),
        KernelSource("patch_embed", ("ids", "table"), ("out",)),
        KernelSource("strided_pool", ("x",), ("out",)),
    )
}


@functools.cache
def kernel(name: str) -> Callable[..., list[mx.array]]:
    """The kernel, built at first use: MLX refuses to without CUDA."""
    source = SOURCES[name]
    return mx.fast.cuda_kernel(  # type: ignore[return-value]  # MLX declares it an object
        name=source.name,
        input_names=source.inputs,
        output_names=source.outputs,
        source=source.body(),
        header=source.header(),
        ensure_row_contiguous=source.row_contiguous,
    )
