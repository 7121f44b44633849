"""CUDA kernels on a CPU: the text MLX would compile, through a C++ compiler and emulator.hpp, behind the calls of `mx.fast`."""

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from cuda_composer import CUDA_NAMES, compose

from marlin_cli.engine import cuda_answers as engine_answers
from marlin_cli.engine import cuda_pages, cuda_patches, cuda_shared, encoder_decoder, whole_patches
from marlin_cli.ops import cuda_kept, cuda_kernels, cuda_mailbox, cuda_stages, cuda_text
from marlin_cli.ops.kernel_source import code

COMPILERS = ("g++", "clang++", "clang++-19", "c++")
FLAGS = ("-std=c++20", "-O1", "-fno-strict-aliasing", "-fPIC", "-shared", "-w")
OWN_HEADER = "ptx.cuh"  # the machine's instructions, which emulator.hpp has its own way for
MOST_AXES = 10
UNWRITTEN = 0xAA


def compiler() -> str | None:
    """A C++ compiler; None elsewhere than on Linux, whose fibers the emulator uses."""
    if sys.platform != "linux":
        return None
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


class Emulated:
    """A kernel as `cuda_kernels.kernel` returns it. `backwards` runs later threads first; `edit` changes its text."""

    def __init__(self, name: str, in_rows: bool = False, *, backwards: bool = False, edit: Callable[[str], str] = str) -> None:
        self.source, self.backwards, self.edit = cuda_kernels.SOURCES[name], backwards, edit
        self.kept = in_rows or self.source.row_contiguous

    def __call__(self, *, inputs, template, grid, threadgroup, output_shapes, output_dtypes):
        source = self.source
        body = source.body()
        assert all(threads % block == 0 for threads, block in zip(grid, threadgroup, strict=True))
        types = [_name(array.dtype) for array in inputs]
        outputs = [_name(dtype) for dtype in output_dtypes]
        if self.kept:
            given = cuda_kept.Types(tuple((array.dtype, array.ndim) for array in inputs), tuple(output_dtypes))
            variant = cuda_kept.variant(source, tuple(template), given, threadgroup[0])
            text = variant.text.replace(code(OWN_HEADER), "").replace('extern "C" ', "")
            sizes = [f"shape_of({i})[{axis}]" for i in variant.sized for axis in range(inputs[i].ndim)]
            run = _built(self.edit(text), "", _call(variant.name, types, outputs, sizes))
        else:
            constants = {key: value if isinstance(value, (bool, int)) else _name(value) for key, value in template}
            named = dict(zip(source.inputs, types, strict=True)), dict(zip(source.outputs, outputs, strict=True))
            text = compose(source, constants, *named)
            header = "".join(code(name) for name in source.headers if name != OWN_HEADER)
            run = _built(self.edit(header), self.edit(text), _strided_call(source, types, outputs, text))

        held, strides = [], np.zeros((len(inputs), MOST_AXES), np.int64)
        shapes = np.zeros((len(inputs), MOST_AXES), np.int32)
        for i, (name, array) in enumerate(zip(source.inputs, inputs, strict=True)):
            shapes[i, : array.ndim] = array.shape
            if re.search(rf"\b{name}\b", body) is None:  # only its shape is read, and it may be a vast one
                held.append(np.zeros(1, np.uint8))
                continue
            held.append(_placed(array, apart=not self.kept))
            strides[i, : array.ndim] = [stride // array.dtype.size for stride in held[-1].strides]
        results = [np.full(int(np.prod(shape)) * dtype.size, UNWRITTEN, np.uint8)
                   for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]  # fmt: skip
        pointers = (ctypes.c_void_p * (len(held) + len(results)))(*(array.ctypes.data for array in (*held, *results)))
        launch = (ctypes.c_int * 6)(*(t // b for t, b in zip(grid, threadgroup, strict=True)), *threadgroup)
        fault = run(pointers, shapes.ctypes.data, strides.ctypes.data, launch, self.backwards)
        assert fault is None, fault.decode()
        return [
            mx.array(result.view(np.uint32 if dtype.size == 4 else np.uint16)).view(dtype).reshape(shape)
            for result, shape, dtype in zip(results, output_shapes, output_dtypes, strict=True)
        ]


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _placed(array: mx.array, apart: bool) -> np.ndarray:
    """The bits of `array`, in rows; where the kernel follows strides, with a row of ones between the matrices."""
    dtype = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[array.dtype.size]
    bits = np.array(mx.contiguous(array).view(dtype)).reshape(array.shape)
    if apart and bits.ndim == 4:
        wider = np.full((*bits.shape[:2], bits.shape[2] + 1, bits.shape[3]), np.iinfo(bits.dtype).max, bits.dtype)
        wider[:, :, :-1] = bits
        return wider[:, :, :-1]
    return np.ascontiguousarray(bits)


def _call(name: str, inputs: list[str], outputs: list[str], sizes: list[str]) -> str:
    pointers = [f"const {CUDA_NAMES[dtype]}*" for dtype in inputs] + [f"{CUDA_NAMES[dtype]}*" for dtype in outputs]
    arguments = [f"({kind})pointers[{i}]" for i, kind in enumerate(pointers)]
    return f"{name}({', '.join([*arguments, *sizes])});"


def _strided_call(source, inputs: list[str], outputs: list[str], text: str) -> str:
    arguments = []
    for i, (name, dtype) in enumerate(zip(source.inputs, inputs, strict=True)):
        arguments.append(f"(const {CUDA_NAMES[dtype]}*)pointers[{i}]")
        arguments += [f"shape_of({i})"] if f" {name}_shape" in text.split("{")[0] else []
        arguments += [f"strides_of({i})"] if f" {name}_strides" in text.split("{")[0] else []
    arguments += [f"({CUDA_NAMES[dtype]}*)pointers[{len(inputs) + i}]" for i, dtype in enumerate(outputs)]
    name = re.search(r"void (\w+)\(", text).group(1)
    return f"mlx::core::cu::{name}({', '.join(arguments)});"


@functools.cache
def _built(header: str, kernel: str, call: str):
    """The function that runs a grid of this kernel."""
    text = f"""#include "emulator.hpp"
{header}
namespace mlx::core::cu {{
{kernel}
}}

static void** pointers;
static const int32_t* shapes;
static const int64_t* strides;
static mlx::core::cu::Shape shape_of(int i) {{
  mlx::core::cu::Shape shape;
  std::copy(shapes + 10 * i, shapes + 10 * i + 10, shape.begin());
  return shape;
}}
static mlx::core::cu::Strides strides_of(int i) {{
  mlx::core::cu::Strides own;
  std::copy(strides + 10 * i, strides + 10 * i + 10, own.begin());
  return own;
}}
static void call() {{ {call} }}

extern "C" const char* run(void** p, const int32_t* shape, const int64_t* stride, const int* launch, bool backwards) {{
  pointers = p, shapes = shape, strides = stride, kernel_call = call;
  gridDim = {{uint32_t(launch[0]), uint32_t(launch[1]), uint32_t(launch[2])}};
  blockDim = {{uint32_t(launch[3]), uint32_t(launch[4]), uint32_t(launch[5])}};
  return run_grid(backwards);
}}
"""
    run = _library(text).run
    run.restype = ctypes.c_char_p
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_bool]
    return run


def _library(text: str) -> ctypes.CDLL:
    folder = Path(_folder().name)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.cpp"
    path.write_text(text, encoding="utf-8")
    library = path.with_suffix(".so")
    command = [compiler(), *FLAGS, f"-I{Path(__file__).parent}", "-o", str(library), str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[:3000]
    return ctypes.CDLL(str(library))


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


class OwnMemory:
    """`cuda_driver.Memory` without a GPU."""

    def __init__(self, size: int) -> None:
        self._array = np.zeros(max(size, 16) // 16 + 2, np.dtype([("all", np.uint8, 16)]))
        self.address, self.size = -(-self._array.ctypes.data // 16) * 16, size


class OwnQueue:
    """`cuda_driver.Queue` without a GPU: what is queued is done at once. Its machine code is the kernel's text."""

    backwards = False
    edit: Callable[[str], str] = staticmethod(lambda text: text.replace("2000000000ull", "60000000000ull"))  # a busy machine

    def allocate(self, size: int) -> OwnMemory:
        return OwnMemory(size)

    def write(self, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    def copy(self, to: int, address: int, size: int) -> None:
        ctypes.memmove(to, address, size)

    def read(self, address: int, size: int) -> bytes:
        return ctypes.string_at(address, size)

    def wait(self) -> None:
        pass

    def load(self, code: bytes, name: str, blocks: int, threads: int, shared_bytes: int) -> Callable[..., None]:
        run = _built_whole(self.edit(code.decode()), name)

        def launch(*arguments) -> None:
            pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(each) for each in arguments))
            fault = run(pointers, (ctypes.c_int * 6)(blocks, 1, 1, threads, 1, 1), self.backwards, shared_bytes)
            assert fault is None, fault.decode()

        return launch


def own_code(texts) -> list[bytes]:
    """`cuda_compile.compiled` without a GPU."""
    return [text.encode() for text in texts]


@functools.cache
def _built_whole(text: str, name: str):
    """The function that runs a grid of a kernel that takes a stage whole, from the addresses of its arguments."""
    parameters = re.search(rf"{name}\((.*?)\)", text, re.DOTALL).group(1).split(",")
    types = [parameter.strip().rsplit(" ", 1)[0] for parameter in parameters]
    given = ", ".join(f"*static_cast<{kind}*>(arguments[{i}])" for i, kind in enumerate(types))
    source = f"""#define TOGETHER
#include "emulator.hpp"
{text.replace('extern "C" __global__', "__global__")}
static void call() {{ {name}({given}); }}

extern "C" const char* run(void** a, const int* launch, bool backwards, size_t shared) {{
  kernel_call = call, marlin::shared_bytes = shared;
  gridDim = {{uint32_t(launch[0]), uint32_t(launch[1]), uint32_t(launch[2])}};
  blockDim = {{uint32_t(launch[3]), uint32_t(launch[4]), uint32_t(launch[5])}};
  return run_grid(backwards, a);
}}
"""
    run = _library(source).run
    run.restype = ctypes.c_char_p
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_bool, ctypes.c_size_t]
    return run


def whole_text(kernel: str, sizes: str) -> str:
    """`cuda_text.text` without the machine's instructions."""
    return cuda_text.text(kernel, sizes, tuple(name for name in cuda_text.HEADERS if name != OWN_HEADER))


def own_addresses(arrays) -> list[int]:
    """Where arrays of MLX stand in the memory of this process, 0 for None: `cuda_stages.addresses` without a GPU."""
    mx.eval([array for array in arrays if array is not None])
    return [0 if array is None else np.asarray(memoryview(array.view(mx.uint8))).ctypes.data for array in arrays]


def own_memory(words: int) -> tuple[np.ndarray, int]:
    """`cuda_mailbox.pinned` without a GPU."""
    memory = np.zeros(words, np.int32)
    return memory, memory.ctypes.data


def emulate(monkeypatch) -> None:
    """Whole stages and decoders in the emulator, where there is no GPU, by three blocks of two warps."""
    monkeypatch.delenv("MARLIN_PATCHES", raising=False)
    if mx.cuda.is_available():
        return
    for module in (cuda_stages, cuda_pages, cuda_patches, cuda_shared, engine_answers):
        monkeypatch.setattr(module, "addresses", own_addresses)
    for module in (cuda_patches, engine_answers):
        monkeypatch.setattr(module, "Queue", OwnQueue)
    monkeypatch.setattr(cuda_stages, "text", whole_text)
    monkeypatch.setattr(cuda_patches, "compiled", own_code)
    monkeypatch.setattr(engine_answers, "machine_code", lambda text: own_code([text])[0])
    monkeypatch.setattr(cuda_mailbox, "pinned", own_memory)
    monkeypatch.setattr(cuda_stages, "multiprocessors", lambda: 3)
    monkeypatch.setattr(cuda_stages, "shared_memory", lambda: 1 << 18)
    monkeypatch.setattr(cuda_stages, "WARPS", 2)
    for module in (whole_patches, encoder_decoder):
        monkeypatch.setattr(module, "gpu", lambda: "cuda")
