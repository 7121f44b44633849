"""Kernels as machine code that is kept on disk: MLX keeps nothing of what it compiles for `mx.fast.cuda_kernel`.

The text is as MLX composes it, with three differences. Sizes of inputs are whole numbers behind the arrays. Strides are those
of rows without gaps, to which inputs are copied where they have some: nobody but MLX knows an array's own strides. And the
compiler is told how many threads are to run together, where the template says so.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from marlin_cli.ops.cuda_compile import machine_code
from marlin_cli.ops.cuda_text import TYPES
from marlin_cli.ops.kernel_source import KernelSource

TOGETHER = "TOGETHER"  # of a template: threads of a multiprocessor, whose registers must do for them; 0: as it comes
Template = tuple[tuple[str, Any], ...]


class Types(NamedTuple):
    """What a variant of a kernel is compiled for beside its template: of each input type and axes, of each output its type."""

    inputs: tuple[tuple[mx.Dtype, int], ...]
    outputs: tuple[mx.Dtype, ...]


class Variant(NamedTuple):
    """A variant of a kernel."""

    name: str  # its own: MLX finds what it has loaded by name
    text: str
    sized: tuple[int, ...]  # the inputs whose sizes it is told, by number


class KeptKernel:
    """A kernel with the call of what `mx.fast.cuda_kernel` makes. Raises BackendError where it does not compile."""

    def __init__(self, source: KernelSource) -> None:
        self._source = source

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, Any]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: list[tuple[int, ...]],
        output_dtypes: list[mx.Dtype],
    ) -> list[mx.array]:
        types = Types(tuple((each.dtype, each.ndim) for each in inputs), tuple(output_dtypes))
        found = variant(self._source, tuple(template), types, threadgroup[0])
        return mx.fast.precompiled_cuda_kernel(
            name=found.name,
            compiled_source=_machine_code(found),
            inputs=inputs,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            scalars=[size for i in found.sized for size in inputs[i].shape],
            grid=grid,
            threadgroup=threadgroup,
            ensure_row_contiguous=True,
        )


@functools.lru_cache(maxsize=1024)
def variant(source: KernelSource, template: Template, types: Types, threads: int) -> Variant:
    """The text of a kernel for a template, types and threads of a block."""
    body = source.body()
    parameters, sizes, first = [], [], []
    sized = []
    for i, (name, (dtype, axes)) in enumerate(zip(source.inputs, types.inputs, strict=True)):
        parameters.append(f"const {TYPES[dtype]}* {name}")
        strided = f"{name}_strides" in body
        if strided or f"{name}_shape" in body:
            sized.append(i)
            own = [f"{name}_size_{axis}" for axis in range(axes)]
            sizes += [f"const int {size}" for size in own]
            first.append(f"const int {name}_shape[] = {{{', '.join(own)}}};")
            if strided:
                strides = [" * ".join(["int64_t(1)", *own[axis + 1 :]]) for axis in range(axes)]
                first.append(f"const int64_t {name}_strides[] = {{{', '.join(strides)}}};")
    parameters += [f"{TYPES[dtype]}* {name}" for name, dtype in zip(source.outputs, types.outputs, strict=True)]
    constants = [_constant(name, value) for name, value in template]
    kernel = "\n".join([f"{', '.join([*parameters, *sizes])}) {{", *constants, *first, body, "}", ""])
    name = f"{source.name}_{hashlib.sha256(f'{source.header()}{threads}{kernel}'.encode()).hexdigest()[:16]}"
    together = dict(template).get(TOGETHER, 0)
    bound = f"__launch_bounds__({threads}, {together // threads}) " if together else ""
    return Variant(name, f'{source.header()}extern "C" __global__ void {bound}{name}({kernel}', tuple(sized))


@functools.cache
def _machine_code(found: Variant) -> bytes:
    return machine_code(found.text)


def _constant(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()};"
    if isinstance(value, int):
        return f"constexpr int {name} = {value};"
    return f"using {name} = {TYPES[value]};"
