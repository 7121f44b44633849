"""One choice an operation: the twin that this device, shape and type call for, else the reference."""

import mlx.core as mx

from marlin_cli.ops import reference
from marlin_cli.ops.cpu import kernels


def linear(x: mx.array, weight: mx.array) -> mx.array:
    """See `reference.linear`."""
    twin = _cpu_twin(x, weight)
    return reference.linear(x, weight) if twin is None else twin.linear(x, weight)


def packed_linear(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str,
) -> mx.array:
    """See `reference.packed_linear`."""
    twin = _cpu_twin(x, *([] if biases is None else [scales, biases]))
    if twin is None:
        return reference.packed_linear(x, weight, scales, biases, group_size=group_size, bits=bits, mode=mode)
    kind = twin.Kind[f"int{bits}" if mode == "affine" else mode]
    return twin.marlin_gemm(x, weight, scales, biases, kind, group_size)


def _cpu_twin(*arrays: mx.array):  # type: ignore[no-untyped-def]  # a module built at run time
    """The CPU kernels, where this is the CPU and they take these arrays: float32, and not empty."""
    if mx.default_device() != mx.Device(mx.cpu) or any(a.dtype != mx.float32 or a.size == 0 for a in arrays):
        return None
    return kernels()[0]
