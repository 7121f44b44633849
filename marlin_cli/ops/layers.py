"""Linear layers, dense and packed, as the models use them. They hold weights; `ops` multiplies."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from marlin_cli.errors import UsageError
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
        y = self.product(x)
        return y + self.bias if "bias" in self else y

    def product(self, x: mx.array) -> mx.array:
        """x @ W.T"""
        return linear(x, self.weight)


class QuantizedLinear(nn.Module):
    """x @ W.T + bias for W packed in one of MLX's formats.

    It holds what `mlx.nn.QuantizedLinear` holds, and `global_scale`: a float32 scalar that multiplies the product.
    nvfp4 needs it, since group scales in E4M3 cannot reach small weights. Ours are powers of two, other tools' are not.
    `activation_bits` is 16, x as it comes, or 8, see `round_activations`.
    """

    def __init__(self, arrays: dict[str, mx.array], *, group_size: int, bits: int, mode: str) -> None:
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.activation_bits = 16
        for name in ("weight", "scales", "biases", "bias", "global_scale"):
            if name in arrays:
                self[name] = arrays[name]
        # In 16 bits a power of two multiplies exactly; another number is kept in float32, and the product rounded once.
        self._scale_is_exact = "global_scale" in arrays and _is_power_of_two(arrays["global_scale"])
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        y = self.product(x)
        return y + self["bias"] if "bias" in self else y

    def product(self, x: mx.array) -> mx.array:
        """x @ W.T"""
        y = packed_linear(
            x,
            self["weight"],
            self["scales"],
            self.get("biases"),
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            activation_bits=self.activation_bits,
        )
        if "global_scale" in self:
            scale = self["global_scale"]
            y = y * scale.astype(y.dtype) if self._scale_is_exact else (y * scale).astype(y.dtype)
        return y


def round_activations(network: nn.Module, activation_bits: int) -> None:
    """Let the packed layers of `network` multiply activations of 16 bits (or 32, as they come) or rounded to 8.

    Raises:
        UsageError: another number; or 8 where the device is no CPU, whose kernels alone gain by it.
    """
    if activation_bits not in (8, 16):
        raise UsageError(f"--activation-bits must be 8 or 16, found {activation_bits}")
    if activation_bits == 8 and mx.default_device() != mx.Device(mx.cpu):
        raise UsageError("--activation-bits 8 is for --device cpu: on a GPU activations keep their 16 bits")
    for module in network.modules():
        if isinstance(module, QuantizedLinear):
            module.activation_bits = activation_bits


def _is_power_of_two(scale: mx.array) -> bool:
    return abs(math.frexp(float(np.array(scale.astype(mx.float32)).reshape(())))[0]) == 0.5
