"""Kernels as MLX hands them to CUDA's runtime compiler, composed without CUDA, and nvcc to compile them."""

import os
import shutil
import subprocess
from pathlib import Path

from marlin_cli.ops.kernel_source import KernelSource

CUDA_NAMES = {
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "int32": "int32_t",
    "int64": "int64_t",
    "uint8": "uint8_t",
    "uint32": "uint32_t",
}
# What MLX's own header (device/utils.cuh), which ships inside its library, gives a kernel.
PRELUDE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cooperative_groups.h>
#include <cuda/std/array>
#include <cuda/std/limits>
#include <cuda/std/tuple>

namespace mlx::core::cu {
using Shape = cuda::std::array<int32_t, 10>;
using Strides = cuda::std::array<int64_t, 10>;
}
"""


def compose(source: KernelSource, template: dict, inputs: dict[str, str], outputs: dict[str, str], suffix: str = "") -> str:
    """The text of one variant. `inputs` and `outputs` map names to MLX dtypes; no input is 0-d."""
    values = "".join(f"_{'ft'[value] if isinstance(value, bool) else value}" for value in template.values())
    body = source.body()
    parameters = []
    for parameter in source.inputs:
        parameters.append(f"const {CUDA_NAMES[inputs[parameter]]}* {parameter}")
        parameters += [
            f"const __grid_constant__ {kind} {parameter}_{what}"
            for kind, what in (("Shape", "shape"), ("Strides", "strides"), ("int", "ndim"))
            if f"{parameter}_{what}" in body
        ]
    parameters += [f"{CUDA_NAMES[outputs[parameter]]}* {parameter}" for parameter in source.outputs]
    constants = []
    for key, value in template.items():
        if isinstance(value, bool):
            constants.append(f"  constexpr bool {key} = {str(value).lower()};")
        elif isinstance(value, int):
            constants.append(f"  constexpr int {key} = {value};")
        else:
            constants.append(f"  using {key} = {CUDA_NAMES[value]};")
    return "\n".join(
        [
            f"__global__ void custom_kernel_{source.name}{values}{suffix}(",
            ",\n".join(f"    {parameter}" for parameter in parameters) + ") {",
            *constants,
            "",
            body,
            "}",
        ]
    )


def translation_unit(source: KernelSource, kernels: list[str]) -> str:
    """Several variants of one kernel in one file: the compiler reads CUDA's own headers, its slowest part, once."""
    text = "\n\n".join(kernels)
    return f"{PRELUDE}\n{source.header()}\nnamespace mlx::core::cu {{\n\nnamespace cg = cooperative_groups;\n\n{text}\n}}\n"


def nvcc() -> str | None:
    """nvcc, where it finds the host's compiler, without which it compiles nothing."""
    return shutil.which("nvcc") if shutil.which(os.environ.get("NVCC_CCBIN", "gcc")) else None


def compile_to_cubin(text: str, architecture: str, folder: Path, strict: bool = True) -> str:
    """What nvcc and its assembler say about `text`, with the registers of each kernel. Raises AssertionError where it fails."""
    path = folder / f"kernels_{architecture}.cu"
    path.write_text(text, encoding="utf-8")
    number = architecture.removeprefix("sm_")
    command = [
        *(nvcc(), "-std=c++20", "-cubin", f"-gencode=arch=compute_{number},code=sm_{number}"),
        *(
            "-Xptxas",
            "-v",
            "-diag-suppress",
            "177",
            *(("-Werror", "all-warnings") if strict else ()),
            "-o",
            str(path.with_suffix(".cubin")),
            str(path),
        ),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stderr
