"""MLX's own Metal kernels on the emulator: their text from the installed wheel's headers, launched as MLX launches them.

Nobody here wrote them and many people run them, so they show what the emulator is worth: it must find nothing wrong with
them, their results must be right, and a fault planted in them must be found.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
from checks import ALL, Check, Report, check
from compose import Composed, Role, Size, Slot
from toolchain import MLX_HEADERS

FOLDER = "mlx/backend/metal/kernels"
# What has to stand before a header's text. Of MLX's matrix tiles, which its kernels for many rows use, the names are enough.
TILES = """
namespace mlx { namespace steel {
template <typename T, typename U, int, int, int, int, int, bool, bool, short, short> struct BlockMMA;
template <typename T, short, short, short, short, short, short = 1, short = 1> struct BlockLoader;
} }
"""
INCLUDES = "".join(f'#include "{FOLDER}/{name}"\n' for name in ("steel/utils.h", "quantized_utils.h"))
BEFORE = {"fp_quantized.h": TILES + INCLUDES, "sdpa_vector.h": ""}
TYPES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat"}
# MLX writes C++17 and const members of `thread`, which the strict pass for our own kernels refuses.
CHECKS = ALL - {Check.ADDRESS_SPACES}


def missing() -> str | None:
    """Why MLX's kernels cannot be had here, or None."""
    absent = [name for name in BEFORE if not (MLX_HEADERS / FOLDER / name).is_file()]
    return f"this MLX has no {', '.join(absent)} among its headers" if absent else None


@dataclass(frozen=True)
class Output:
    """A buffer that the kernel writes."""

    shape: tuple[int, ...]
    dtype: mx.Dtype


ABSENT = mx.zeros((0,))  # an argument that the launch leaves out; reading it is an error


def launch(
    header: str,
    kernel: str,
    template: Sequence[object],
    buffers: Sequence[mx.array | Output],
    *,
    grid: Size,
    threadgroup: Size,
    constants: Mapping[str, int | bool] | None = None,
    expected: mx.array | None = None,
    tolerance: float = 0.0,
    checks: frozenset[Check] = CHECKS,
    change: Callable[[str], str] = str,
) -> Report:
    """Run and check a kernel of one of MLX's headers.

    Buffers come by index; `grid` counts threadgroups and `threadgroup` threads, as in MLX's host code; `constants` are
    function constants (others are 0); `expected` belongs to the only output; `change` is applied to the header's text.
    """
    text = (MLX_HEADERS / FOLDER / header).read_text(encoding="utf-8").replace("#pragma once", "")
    arguments = ", ".join(TYPES[each] if isinstance(each, mx.Dtype) else str(each).lower() for each in template)
    inputs = [buffer for buffer in buffers if not isinstance(buffer, Output)]
    outputs = [buffer for buffer in buffers if isinstance(buffer, Output)]
    counts = {Role.INPUT: 0, Role.OUTPUT: 0}
    slots = []
    for buffer in buffers:
        role = Role.OUTPUT if isinstance(buffer, Output) else Role.INPUT
        slots.append(Slot(role, counts[role]))
        counts[role] += 1
    composed = Composed(
        text=BEFORE[header] + change(text),
        grid=(grid[0] * threadgroup[0], grid[1] * threadgroup[1], grid[2] * threadgroup[2]),
        threadgroup=threadgroup,
        slots=tuple(slots),
        output_shapes=tuple(output.shape for output in outputs),
        output_dtypes=tuple(output.dtype for output in outputs),
        kernel=kernel,
        instance=f"{kernel}<{arguments}>",
        constants=constants or {},
    )
    return check(composed, inputs, expected, tolerance, checks, name=f"MLX's {kernel}")
