"""The text of a CUDA kernel that takes a stage whole: sizes and kinds as constants, what goes before it, and itself."""

from collections.abc import Mapping

import mlx.core as mx

from marlin_cli.ops.kernel_source import code

HEADERS = (
    "standard.cuh", "packed.cuh", "ptx.cuh", "grid.cuh", "exchange.cuh", "few_rows.cuh", "few_rows_stored.cuh",
    "few_rows_attention.cuh", "few_rows_stage.cuh", "few_rows_draw.cuh",
)  # fmt: skip
TYPES = {
    mx.bfloat16: "__nv_bfloat16", mx.float16: "__half", mx.float32: "float", mx.uint8: "uint8_t", mx.int32: "int32_t",
    mx.int64: "int64_t", mx.uint32: "uint32_t",
}  # fmt: skip
# Whole numbers are named here, as headers that name them take the compiler longer than a small kernel.
PRELUDE = """#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef unsigned long uintptr_t;
"""

Constant = bool | int | list[int] | list[bool]


def constants(dtype: mx.Dtype, values: Mapping[str, Constant]) -> str:
    """What the kernels know when they are compiled; T is the type of weights that are not packed, and of caches."""
    lines = [f"constexpr {_declared(name, value)};" for name, value in values.items()]
    return "\n".join(["namespace marlin {", f"using T = {TYPES[dtype]};", *lines, "}", ""])


def text(kernel: str, sizes: str, headers: tuple[str, ...] = HEADERS) -> str:
    """The text of `kernels/<kernel>.cu` for constants `sizes`, without what the compiler brings itself."""
    return sizes + "".join(code(name) for name in headers) + code(f"{kernel}.cu")


def _declared(name: str, value: Constant) -> str:
    if isinstance(value, list):
        kind = "bool" if isinstance(value[0], bool) else "int"
        return f"{kind} {name}[] = {{{', '.join(map(_literal, value))}}}"
    return f"{'bool' if isinstance(value, bool) else 'int'} {name} = {_literal(value)}"


def _literal(value: int) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
