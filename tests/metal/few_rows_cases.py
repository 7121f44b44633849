"""Layers, rows and caches that the kernels of a step of decoding are checked with, and the same in float32."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from metal_text import barriers_of, without_barrier

from marlin_cli.models.megabyte_layers import VarianceNorm
from marlin_cli.ops import Linear, QuantizedLinear
from marlin_cli.ops.few_rows import Norm, Place, Projections, Reading, Tail
from marlin_cli.ops.reference import KeyValueRows, Packed, pack_rows

# Group, bits and mode as `mx.quantize` has them.
FORMATS: dict[str, tuple[int, int, str] | None] = {
    "dense": None, "nvfp4": (16, 4, "nvfp4"), "mxfp4": (32, 4, "mxfp4"), "mxfp8": (32, 8, "mxfp8"),
    "int4": (64, 4, "affine"), "int4 of 32": (32, 4, "affine"), "int8": (64, 8, "affine"), "int8 of 128": (128, 8, "affine"),
}  # fmt: skip
# Results are a rounding of float32 sums; norms and softmax in another order cost a little more.
TOLERANCES = {mx.float32: 4e-6, mx.float16: 6e-4, mx.bfloat16: 4.5e-3}


@dataclass(frozen=True)
class Case:
    """A step: rows of x, and what they meet."""

    streams: int = 1
    width: int = 128
    out_rows: int = 64
    format: str = "dense"
    norm: str = "rmsnorm"
    bias: bool = False
    factor: float = 1.0  # the global scale of packed weights
    # Attention.
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    base: float | None = None
    interleaved: bool = False
    tail_rows: int = 8
    at: int = 3
    before: int = 0  # rows before the tail
    capacity: int | None = None  # of the storage that has them; None: nothing is stored
    window: int | None = None
    left_padding: tuple[int, ...] | None = None
    most: int | None = None  # of the relative bias
    memory: tuple[int, int, int] | None = None  # rows of another sequence, bits of its keys and of its values
    lengths: tuple[int, ...] | None = None  # real ones of these rows
    # Feed-forward.
    gated: bool = True
    activation: str = "silu"
    fast: bool = False  # also part of the plain suite


def rows(case: Case, dtype: mx.Dtype, width: int | None = None, seed: int = 0) -> mx.array:
    return mx.random.normal((case.streams, width or case.width), key=mx.random.key(seed)).astype(dtype)


def layer(case: Case, dtype: mx.Dtype, out_rows: int, width: int | None = None, seed: int = 1) -> tuple[nn.Module, nn.Module]:
    """A linear layer, and the same in float32 with weights that it really multiplies."""
    width = width or case.width
    random = mx.random.split(mx.random.key(seed), 2)
    weight = (mx.random.normal((out_rows, width), key=random[0]) * width**-0.5).astype(dtype)
    bias = mx.random.normal((out_rows,), key=random[1]).astype(dtype) if case.bias else None
    exact = Linear(width, out_rows, bias=case.bias)
    how = FORMATS[case.format]
    if how is None:
        found: nn.Module = Linear(width, out_rows, bias=case.bias)
        found.weight = weight
        exact.weight = weight.astype(mx.float32)
    else:
        group, bits, mode = how
        packed = mx.quantize(weight.astype(mx.float32), group_size=group, bits=bits, mode=mode)
        arrays = dict(zip(("weight", "scales", "biases"), packed, strict=False))
        if mode == "affine":
            arrays = {name: a if name == "weight" else a.astype(dtype) for name, a in arrays.items()}
        wide = [a.astype(mx.float32) if a.dtype == dtype else a for a in arrays.values()]
        exact.weight = mx.dequantize(*wide, group_size=group, bits=bits, mode=mode, dtype=mx.float32) * case.factor
        if case.factor != 1.0:
            arrays["global_scale"] = mx.array(case.factor)
        found = QuantizedLinear(arrays, group_size=group, bits=bits, mode=mode)
    if bias is not None:
        found["bias"] = bias
        exact.bias = bias.astype(mx.float32)
    return found, exact


def norm(case: Case, dtype: mx.Dtype) -> tuple[Norm, Norm]:
    kinds = {
        "rmsnorm": nn.RMSNorm,
        "layernorm": partial(nn.LayerNorm, bias=False),
        "variance": VarianceNorm,
    }
    made = [Norm(case.norm, kinds[case.norm](case.width, eps=1e-5)) for _ in range(2)]
    gains = (1 + 0.2 * mx.random.normal((case.width,), key=mx.random.key(2))).astype(dtype)
    made[0].module.weight, made[1].module.weight = gains, gains.astype(mx.float32)
    return made[0], made[1]


def projections(case: Case, dtype: mx.Dtype) -> tuple[Projections, Projections]:
    widths = [heads * case.head_dim for heads in (case.heads, case.kv_heads, case.kv_heads)]
    pairs = [layer(replace(case, bias=False), dtype, width, seed=3 + i) for i, width in enumerate(widths)]
    rest = (case.heads, case.kv_heads, case.head_dim, None, case.base, case.interleaved)
    return Projections(*(pair[0] for pair in pairs), *rest), Projections(*(pair[1] for pair in pairs), *rest)


def tail(case: Case, dtype: mx.Dtype, count: int | None = None, seed: int = 7) -> tuple[Tail, Tail]:
    shape = (case.streams, case.kv_heads, count or case.tail_rows, case.head_dim)
    made = Tail(*(mx.random.normal(shape, key=key).astype(dtype) for key in mx.random.split(mx.random.key(seed), 2)))
    return made, Tail(*(array.astype(mx.float32) for array in made))


def memory(case: Case, dtype: mx.Dtype) -> tuple[list[KeyValueRows], list[KeyValueRows]]:
    """Keys and values of another sequence, dense or packed, and the same dense rows in float32."""
    assert case.memory is not None
    total, *bits = case.memory
    shape = (case.streams, case.heads, total, case.head_dim)
    made = [mx.random.normal(shape, key=key).astype(dtype) for key in mx.random.split(mx.random.key(11), 2)]
    rows = [each if n == 16 else pack_rows(each.astype(mx.float32), n) for each, n in zip(made, bits, strict=True)]
    return rows, [each if isinstance(each, Packed) else each.astype(mx.float32) for each in rows]


def place(case: Case) -> Place:
    padding = None if case.left_padding is None else mx.array(case.left_padding, dtype=mx.int32)
    return Place(mx.array([case.before, case.at], dtype=mx.int32), padding)


def reading(case: Case, dtype: mx.Dtype) -> tuple[Reading, Reading]:
    bias = None
    if case.most is not None:
        bias = mx.random.normal((case.heads, 2 * case.most + 1), key=mx.random.key(9)).astype(dtype)
    out, exact = layer(replace(case, bias=False), dtype, case.width, case.heads * case.head_dim, seed=10)
    wide = None if bias is None else bias.astype(mx.float32)
    return Reading(case.head_dim**-0.5, case.window, bias, out), Reading(case.head_dim**-0.5, case.window, wide, exact)


def close(found: mx.array, expected: mx.array, dtype: mx.Dtype) -> None:
    """The result is the reference's, rounded once."""
    assert found.shape == expected.shape and mx.isfinite(found).all()
    off = mx.abs(found.astype(mx.float32) - expected).max().item()
    assert off <= TOLERANCES[dtype] * mx.abs(expected).max().item(), off


def check_barrier(call: Callable[..., object], number: int) -> None:
    """A launch whose text lacks its barrier `number` depends on the order of threads; `call` takes the change of texts."""
    cut = []

    def without(text: str) -> str:
        if number >= len(barriers_of(text)):
            return text
        cut.append(number)
        return without_barrier(text, number)

    with pytest.raises(AssertionError, match="order-dependent|events: ended"):
        call(change=without)
    assert cut
