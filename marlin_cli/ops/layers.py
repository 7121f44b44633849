"""Linear layers, dense and packed, as the models use them. They hold weights; `ops` multiplies."""

import math

import mlx.core as mx
import mlx.nn as nn

from marlin_cli.ops.dispatch import linear, packed_linear


class Linear(nn.Module):
    """x @ W.T + bias."""

    def __init__(self, columns: int, rows: int, bias: bool = True) -> None:
        super().__init__()
        scale = 1 / math.sqrt(columns)
        self.weight = mx.random.uniform(-scale, scale, (rows, columns))
        if bias:
            self.bias = mx.zeros((rows,))

    def __call__(self, x: mx.array) -> mx.array:
        y = linear(x, self.weight)
        return y + self.bias if "bias" in self else y


class QuantizedLinear(nn.Module):
    """x @ W.T + bias for W packed in one of MLX's formats.

    It holds what `mlx.nn.QuantizedLinear` holds, and `global_scale`: a float32 scalar (a power of two) that
    multiplies the product. nvfp4 needs it, since group scales in E4M3 cannot reach small weights.
    """

    def __init__(self, arrays: dict[str, mx.array], *, group_size: int, bits: int, mode: str) -> None:
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        for name in ("weight", "scales", "biases", "bias", "global_scale"):
            if name in arrays:
                self[name] = arrays[name]
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        y = packed_linear(
            x,
            self["weight"],
            self["scales"],
            self.get("biases"),
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )
        if "global_scale" in self:
            y = y * self["global_scale"].astype(y.dtype)
        return y + self["bias"] if "bias" in self else y
