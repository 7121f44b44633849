"""The text of a CUDA kernel that takes a stage whole: sizes and kinds as constants, what goes before it, and itself."""

from collections.abc import Mapping

import mlx.core as mx

from marlin_cli.ops.kernel_source import code

HEADERS = (
    "packed.cuh", "ptx.cuh", "grid.cuh", "exchange.cuh", "few_rows.cuh", "few_rows_stored.cuh",
    "few_rows_attention.cuh", "few_rows_stage.cuh", "few_rows_draw.cuh",
)  # fmt: skip
TYPES = {mx.bfloat16: "__nv_bfloat16", mx.float32: "float"}
PRELUDE = """#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/cstdint>
#include <cuda/std/limits>
#include <cuda/std/type_traits>
using cuda::std::int16_t;
using cuda::std::int32_t;
using cuda::std::int64_t;
using cuda::std::uint16_t;
using cuda::std::uint32_t;
using cuda::std::uint64_t;
using cuda::std::uint8_t;
using cuda::std::uintptr_t;
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
