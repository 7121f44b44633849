"""A kernel for a GPU: its text in kernels/, its parameters, and how MLX makes and launches it; the same for CUDA and Metal."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import mlx.core as mx

from marlin_cli.files import shipped

Kernel: TypeAlias = Callable[..., list[mx.array]]


@dataclass(frozen=True)
class KernelSource:
    """A kernel's text and parameters, as `mx.fast.cuda_kernel` and `mx.fast.metal_kernel` want them."""

    file: str  # in kernels/; its stem is the kernel's name
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    headers: tuple[str, ...] = ()  # files whose text goes before the kernel's
    row_contiguous: bool = True  # inputs are copied to rows where they are not; else the kernel follows their strides

    @property
    def name(self) -> str:
        return self.file.split(".")[0]

    def header(self) -> str:
        return "".join(code(name) for name in self.headers)

    def body(self) -> str:
        return code(self.file)

    def made_by(self, maker: Callable[..., Any]) -> Kernel:
        """The kernel, of `mx.fast.cuda_kernel` or `mx.fast.metal_kernel`; MLX compiles each variant at its first launch."""
        made: Kernel = maker(
            name=self.name,
            input_names=self.inputs,
            output_names=self.outputs,
            source=self.body(),
            header=self.header(),
            ensure_row_contiguous=self.row_contiguous,
        )
        return made


@functools.cache
def code(name: str) -> str:
    """A kernel file without comments and indentation: MLX copies and hashes the text at every launch."""
    lines = (line.split("//")[0].strip() for line in shipped(f"kernels/{name}").read_text(encoding="utf-8").splitlines())
    return "".join(f"{line}\n" for line in lines if line)


def by_name(*sources: KernelSource) -> dict[str, KernelSource]:
    """The kernels of one back-end."""
    return {source.name: source for source in sources}


def launch(
    kernel: Kernel,
    inputs: list[mx.array],
    template: dict[str, Any],
    *,
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    shapes: list[tuple[int, ...]],
    dtypes: list[mx.Dtype],
) -> list[mx.array]:
    """Run a kernel; `grid` counts threads. Metal's last threadgroups may have fewer than the others; CUDA's blocks may not."""
    return kernel(
        inputs=inputs,
        template=list(template.items()),
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=shapes,
        output_dtypes=dtypes,
    )
