"""One choice an operation: the twin that this device, shape and type call for, else the reference."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import mlx.core as mx

from marlin_cli.errors import UsageError
from marlin_cli.ops import cuda, metal, reference
from marlin_cli.ops.cpu import kernels, wanted_kernels
from marlin_cli.ops.reference import Activation, KeyValueRows, Packed


def linear(x: mx.array, weight: mx.array) -> mx.array:
    """See `reference.linear`."""
    twin = _cpu_twin(x, weight)
    return reference.linear(x, weight) if twin is None else _differentiable(twin.linear, reference.linear, x, weight)


def activation(x: mx.array, kind: Activation) -> mx.array:
    """See `reference.activation`."""
    twin = None if kind == "relu" else _cpu_twin(x)
    if twin is None:
        return reference.activation(x, kind)
    function = twin.Activation[kind]
    return _differentiable(lambda rows: twin.activation(rows, function), lambda rows: reference.activation(rows, kind), x)


def packed_linear(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str,
    activation_bits: int = 16,
) -> mx.array:
    """See `reference.packed_linear`."""
    settings: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}
    if gpu() == "cuda" and activation_bits == 16 and cuda.takes_packed_linear(x, weight, scales, biases, **settings):
        return cuda.packed_linear(x, weight, scales, biases, **settings)
    twin = _cpu_twin(x, *([] if biases is None else [scales, biases]))
    if twin is None:
        return reference.packed_linear(x, weight, scales, biases, **settings, activation_bits=activation_bits)
    kind = twin.Kind[f"int{bits}" if mode == "affine" else mode]
    return twin.marlin_gemm(x, weight, scales, biases, kind, group_size, activation_bits)


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    *,
    causal: bool = True,
    window: int | None = None,
    left_padding: mx.array | None = None,
    lengths: mx.array | None = None,
    relative_bias: mx.array | None = None,
) -> mx.array:
    """See `reference.attention`."""
    settings: dict[str, Any] = {
        "causal": causal, "window": window, "left_padding": left_padding, "lengths": lengths, "relative_bias": relative_bias,
    }  # fmt: skip
    twin: Callable[..., mx.array] | None = None
    if gpu() == "metal" and metal.takes_attention(queries, keys, values, scale, **settings):
        twin = metal.attention
    elif gpu() == "cuda" and cuda.takes_attention(queries, keys, values, scale, **settings):
        twin = cuda.attention
    elif (cpu := _cpu_twin(queries, keys, values, *([] if relative_bias is None else [relative_bias]))) is not None:
        twin = functools.partial(_cpu_attention, cpu)
    if twin is None:
        return reference.attention(queries, keys, values, scale, **settings)

    def run(function: Callable[..., mx.array], q: mx.array, k: mx.array, v: mx.array, *bias: mx.array) -> mx.array:
        return function(q, k, v, scale, **{**settings, "relative_bias": bias[0] if bias else None})

    arrays = (queries, keys, values) if relative_bias is None else (queries, keys, values, relative_bias)
    return _differentiable(functools.partial(run, twin), functools.partial(run, reference.attention), *arrays)


def _cpu_attention(
    cpu: Any,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    *,
    causal: bool,
    window: int | None,
    left_padding: mx.array | None,
    lengths: mx.array | None,
    relative_bias: mx.array | None,
) -> mx.array:
    """`reference.attention` by the CPU kernels, which take keys and values in pages: here one of each."""
    pages = [(keys, None, 32)], [(values, None, 32)]
    reach = -1 if window is None else window
    return cast(mx.array, cpu.flash_attention(queries, *pages, scale, causal, reach, left_padding, lengths, relative_bias))


def paged_attention(
    queries: mx.array,
    keys: Sequence[KeyValueRows],
    values: Sequence[KeyValueRows],
    scale: float,
    *,
    causal: bool = True,
    window: int | None = None,
    left_padding: mx.array | None = None,
    lengths: mx.array | None = None,
    relative_bias: mx.array | None = None,
) -> mx.array:
    """See `reference.paged_attention`; with a relative bias, GPUs run the reference."""
    settings: dict[str, Any] = {"causal": causal, "window": window, "left_padding": left_padding, "lengths": lengths}
    if gpu() is not None and relative_bias is not None:
        return reference.paged_attention(queries, keys, values, scale, **settings, relative_bias=relative_bias)
    if gpu() == "metal" and metal.takes_paged_attention(queries, keys, values, scale, **settings):
        return metal.paged_attention(queries, keys, values, scale, **settings)
    if gpu() == "cuda" and cuda.takes_paged_attention(queries, keys, values, scale, **settings):
        return cuda.paged_attention(queries, keys, values, scale, **settings)
    bias = [] if relative_bias is None else [relative_bias]
    twin = _cpu_twin(queries, *(page for pages in (keys, values) for page in pages if not isinstance(page, Packed)), *bias)
    if twin is None:
        return reference.paged_attention(queries, keys, values, scale, **settings, relative_bias=relative_bias)
    pages = [
        [(page.packed, page.scales, page.bits) if isinstance(page, Packed) else (page, None, 32) for page in each]
        for each in (keys, values)
    ]
    reach = -1 if window is None else window
    return twin.flash_attention(queries, *pages, scale, causal, reach, left_padding, lengths, relative_bias)


def patch_embed(ids: mx.array, table: mx.array) -> mx.array:
    """See `reference.patch_embed`."""
    device = gpu()
    twins: Any = metal if device == "metal" else cuda
    if device is None or not twins.takes_patch_embed(ids, table):
        return reference.patch_embed(ids, table)
    return _differentiable(lambda t: twins.patch_embed(ids, t), lambda t: reference.patch_embed(ids, t), table)


def strided_pool(x: mx.array, stride: int, kind: Literal["mean", "max"]) -> mx.array:
    """See `reference.strided_pool`."""
    device = gpu()
    twins: Any = metal if device == "metal" else cuda
    if device is None or not twins.takes_strided_pool(x, stride, kind):
        return reference.strided_pool(x, stride, kind)
    return _differentiable(
        lambda rows: twins.strided_pool(rows, stride, kind), lambda rows: reference.strided_pool(rows, stride, kind), x
    )


class Choice(NamedTuple):
    """Which twin of an operation runs on the device in use, and why."""

    op: str
    twin: str  # cpu, metal, cuda, or reference: plain MLX
    reason: str


# The operations, and where each has a twin of its own.
OPERATIONS = {
    "linear": ("cpu",),
    "activation": ("cpu",),
    "marlin_gemm": ("cpu", "cuda"),
    "flash_attention": ("cpu", "metal", "cuda"),
    "flash_attention_kv_fp4": ("cpu", "metal", "cuda"),
    "flash_attention_cross_asymmetric": ("cpu", "metal", "cuda"),
    "patch_embed": ("metal", "cuda"),
    "strided_pool": ("metal", "cuda"),
    "stack": ("cpu", "metal", "cuda"),
    "character_encoder": ("cpu",),
    "answer_decode": ("cpu", "metal", "cuda"),
    "sliced_encoding": ("cpu",),
    "sequence_costs": ("cpu",),
    "local_patch_decode": ("cpu", "metal", "cuda"),
}


# Which have kernels of another kind on an NVIDIA GPU.
WHOLE = {
    "stack": "a launch a patch of up to 16 streams, groups up to 64",
    "local_patch_decode": "a launch a patch of up to 16 streams, groups up to 64",
    "answer_decode": "a launch for some steps of up to 16 answers, groups up to 64",
}


def choices() -> list[Choice]:
    """The twin of each operation on the device in use, for the shapes and types that it takes."""
    device = gpu() or "cpu"
    if wanted_kernels() == "reference":
        return [Choice(op, "reference", "MARLIN_KERNELS=reference") for op in OPERATIONS]
    why = {
        "cpu": kernels()[1] if device == "cpu" else "",
        "metal": "MLX compiles it at first use, where its own is not the faster one",
        "cuda": "NVRTC compiles it at first use, where MLX's own is not the faster one",
    }[device]
    here = device != "cpu" or kernels()[0] is not None
    chosen = []
    for op, twins in OPERATIONS.items():
        if device != "cpu" and op in WHOLE and by_operations():
            chosen.append(Choice(op, "reference", "MARLIN_PATCHES=operations"))
        elif device == "cuda" and op in WHOLE:
            chosen.append(Choice(op, device, f"{WHOLE[op]}; compiled once for each shape and kept"))
        elif device in twins:
            chosen.append(Choice(op, device if here else "reference", why))
        else:
            chosen.append(Choice(op, "reference", f"MLX's own: no {device} twin is faster"))
    return chosen


def gpu() -> str | None:
    """`metal` or `cuda` if the default device is a GPU and kernels are wanted, else None."""
    if mx.default_device() == mx.Device(mx.cpu) or wanted_kernels() == "reference":
        return None
    return "metal" if mx.metal.is_available() else "cuda"


def by_operations() -> bool:
    """Shall a GPU decode operation by operation? MARLIN_PATCHES: `auto` (the default) or `operations`.

    Raises:
        UsageError: another value.
    """
    wanted = os.environ.get("MARLIN_PATCHES", "auto")
    if wanted not in ("auto", "operations"):
        raise UsageError(f"MARLIN_PATCHES must be auto or operations, found {wanted!r}")
    return wanted == "operations"


def _differentiable(twin: Callable[..., mx.array], plain: Callable[..., mx.array], *arrays: mx.array) -> mx.array:
    """`twin(*arrays)`, with the gradients of `plain`, which computes the same: the kernels have none of their own.

    What is differentiated must be among `arrays`: MLX sees nothing else that the functions hold.
    """
    run = mx.custom_function(twin)

    @run.vjp
    def gradient(primals: mx.array | list[mx.array], cotangent: mx.array, output: mx.array) -> Any:
        gradients = mx.vjp(plain, [primals] if isinstance(primals, mx.array) else list(primals), [cotangent])[1]
        return gradients[0] if len(arrays) == 1 else gradients

    return cast(mx.array, run(*arrays))


def _cpu_twin(*arrays: mx.array) -> Any:
    """The CPU kernels, where this is the CPU and they take these arrays: float32, and not empty."""
    if mx.default_device() != mx.Device(mx.cpu) or any(a.dtype != mx.float32 or a.size == 0 for a in arrays):
        return None
    return kernels()[0]
