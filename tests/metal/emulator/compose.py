"""A kernel's text as MLX composes it for a Mac, and how a launch gives it buffers. Nothing is run here."""

import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import Any

import metal_text
import mlx.core as mx
import numpy as np

Size = tuple[int, int, int]
COMPOSED = re.compile(r"Generated source code for `[^`]*`:\n```\n(.*)\n```", re.DOTALL)


class Role(Enum):
    """What a buffer of a launch holds."""

    INPUT = auto()
    SHAPE = auto()
    STRIDES = auto()
    NDIM = auto()
    OUTPUT = auto()


@dataclass(frozen=True)
class Slot:
    """A buffer of a launch: its role, and the input or output that it belongs to."""

    role: Role
    index: int


@dataclass(frozen=True)
class Composed:
    """A kernel's whole text and its launch, but for the inputs."""

    text: str
    grid: Size  # threads
    threadgroup: Size  # threads
    slots: tuple[Slot, ...]  # by buffer index
    output_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[mx.Dtype, ...]
    kernel: str  # the function's name
    instance: str  # as MLX instantiates it: the name, with template arguments if it has any
    constants: Mapping[str, int | bool] = field(default_factory=dict)  # Metal's function constants
    row_contiguous: bool = True  # inputs are copied unless they are so
    init_value: float | None = None  # what outputs hold before the launch; None: anything

    def changed(self, change: Callable[[str], str]) -> "Composed":
        """The same launch of another text."""
        return replace(self, text=change(self.text))


@dataclass(frozen=True)
class Buffer:
    """The bytes of one buffer; `offset` is its first byte's distance from an address that 16 divides."""

    content: bytes
    offset: int = 0
    is_output: bool = False


def capture(
    kernel: Callable[..., Any],
    *inputs: Any,
    grid: Size,
    threadgroup: Size,
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    template: Sequence[tuple[str, Any]] | None = None,
    init_value: float | None = None,
    row_contiguous: bool = True,
) -> Composed:
    """What MLX hands to Apple's compiler for one call of a kernel that `mx.fast.metal_kernel` made; as the call's arguments.

    `row_contiguous` is what the kernel was made with as `ensure_row_contiguous`.
    """

    def call(*arrays: mx.array) -> Any:
        return kernel(
            inputs=list(arrays),
            template=list(template or []),
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=[list(shape) for shape in output_shapes],
            output_dtypes=list(output_dtypes),
            init_value=init_value,
            verbose=True,
        )

    text = _printed_by_export(call, [as_array(given) for given in inputs])
    name = metal_text.kernel_name(text)
    return Composed(
        text=text,
        grid=grid,
        threadgroup=threadgroup,
        slots=_slots(text, name, len(inputs), len(output_shapes)),
        output_shapes=tuple(tuple(shape) for shape in output_shapes),
        output_dtypes=tuple(output_dtypes),
        kernel=name,
        instance=metal_text.instance(text),
        row_contiguous=row_contiguous,
        init_value=init_value,
    )


def _printed_by_export(call: Callable[..., Any], inputs: Sequence[mx.array]) -> str:
    """Without Metal, MLX composes a kernel's text only while a function is exported, and prints it to the process's stdout."""
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryDirectory() as folder:
        os.dup2(printed.fileno(), 1)
        try:
            mx.export_function(os.path.join(folder, "kernel.mlxfn"), call, *inputs)
        finally:
            ctypes.CDLL(None).fflush(None)
            os.dup2(kept, 1)
            os.close(kept)
        printed.seek(0)
        match = COMPOSED.search(printed.read().decode())
    if match is None:
        raise ValueError("MLX printed no kernel: the function must call one kernel of mx.fast.metal_kernel")
    return match[1]


def _slots(text: str, kernel: str, inputs: int, outputs: int) -> tuple[Slot, ...]:
    """MLX numbers buffers so: each input, followed by its shape, strides and ndim if the body names them; then the outputs."""
    names = [parameter.name for parameter in metal_text.parameters(text, kernel) if parameter.buffer is not None]
    slots: list[Slot] = []
    owner, extras = "", {}
    for name in names[: len(names) - outputs]:
        if name in extras:
            slots.append(Slot(extras.pop(name), slots[-1].index))
            continue
        slots.append(Slot(Role.INPUT, slots[-1].index + 1 if slots else 0))
        owner = name
        extras = {f"{owner}_shape": Role.SHAPE, f"{owner}_strides": Role.STRIDES, f"{owner}_ndim": Role.NDIM}
    found = slots[-1].index + 1 if slots else 0
    if found != inputs:
        raise ValueError(f"{kernel} has {found} inputs where {inputs} were given")
    return (*slots, *(Slot(Role.OUTPUT, i) for i in range(outputs)))


def buffers_of(composed: Composed, inputs: Sequence[Any]) -> list[Buffer]:
    """The buffers of a launch on these inputs, exactly as long as what they hold."""
    arrays = [as_array(given) for given in inputs]
    if composed.row_contiguous:
        arrays = [mx.contiguous(array) for array in arrays]
    mx.eval(arrays)
    return [_buffer(composed, slot, arrays) for slot in composed.slots]


def _buffer(composed: Composed, slot: Slot, arrays: Sequence[mx.array]) -> Buffer:
    if slot.role is Role.OUTPUT:
        shape, dtype = composed.output_shapes[slot.index], composed.output_dtypes[slot.index]
        start = mx.full(shape, composed.init_value or 0, dtype=dtype)
        return Buffer(raw(start).tobytes(), is_output=True)
    values = raw(arrays[slot.index])
    strides = [stride // values.itemsize for stride in values.strides]
    if slot.role is Role.SHAPE:
        return Buffer(np.array(values.shape, np.int32).tobytes())
    if slot.role is Role.STRIDES:
        return Buffer(np.array(strides, np.int64).tobytes())
    if slot.role is Role.NDIM:
        return Buffer(np.array([values.ndim], np.int32).tobytes())
    if not values.size:
        return Buffer(b"")
    # From the first element to the last one in memory: for strided inputs that is more than their elements.
    span = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    memory = np.lib.stride_tricks.as_strided(values, (span,), (values.itemsize,))
    return Buffer(memory.tobytes(), offset=values.ctypes.data % 16)


def as_array(value: Any) -> mx.array:
    """The value as MLX takes a kernel's input."""
    return value if isinstance(value, mx.array) else mx.array(value)


def raw(array: mx.array) -> np.ndarray[Any, Any]:
    """The array's memory as NumPy sees it, without a copy; 16-bit floats as their bits."""
    array = array.view(mx.uint16) if array.dtype in (mx.bfloat16, mx.float16) else array
    mx.eval(array)
    return np.array(array, copy=False)


def from_bytes(content: bytes, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """The array of an output's bytes."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.size]
    bits = np.frombuffer(content, unsigned).copy()
    return mx.array(bits).view(dtype).reshape(shape) if bits.size else mx.zeros(shape, dtype)
