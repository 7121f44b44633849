"""Linear layers of which every rank holds some columns: products are summed over the ranks, and each gets the sum.

A rank multiplies its columns by the channels of x that it has made. A global scale multiplies before the sum, a bias is
added after it, once. Sums of parts round otherwise than one product does; the ranks all get the same bits. In 16 bits parts of
many rows (prompts, and what is scored) are float32 until they are summed, as those of one product are.
"""

import mlx.core as mx
import mlx.nn as nn

from marlin_cli.ops.layers import Linear, QuantizedLinear
from marlin_cli.ranks import Ranks

# From so many rows on, weights as float32 cost little beside the product.
MANY_ROWS = 16


class SummedLinear(Linear):
    """A `Linear` with the columns of this rank."""

    def __init__(self, part: Linear, ranks: Ranks) -> None:
        nn.Module.__init__(self)
        self._ranks = ranks
        self.weight = part.weight
        if "bias" in part:
            self.bias = part.bias

    def product(self, x: mx.array) -> mx.array:
        if not _is_rounded(x):
            return _sum(super().product(x), self._ranks)
        return _sum(_exact(x, self.weight), self._ranks).astype(x.dtype)


class SummedQuantizedLinear(QuantizedLinear):
    """A `QuantizedLinear` with the columns of this rank."""

    def __init__(self, part: QuantizedLinear, ranks: Ranks) -> None:
        arrays = {name: part[name] for name in ("weight", "scales", "biases", "bias", "global_scale") if name in part}
        super().__init__(arrays, group_size=part.group_size, bits=part.bits, mode=part.mode)
        self.activation_bits = part.activation_bits
        self._ranks = ranks

    def product(self, x: mx.array) -> mx.array:
        if not _is_rounded(x) or self.activation_bits != 16:
            return _sum(super().product(x), self._ranks)
        how = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        weight = mx.dequantize(self["weight"], self["scales"], self.get("biases"), **how, dtype=x.dtype)
        part = _exact(x, weight)
        if "global_scale" in self:
            part = part * self["global_scale"]
        return _sum(part, self._ranks).astype(x.dtype)


def _is_rounded(x: mx.array) -> bool:
    """Would parts of its product be rounded before they are summed, where that can be helped?"""
    return x.dtype != mx.float32 and x.size >= MANY_ROWS * x.shape[-1]


def _exact(x: mx.array, weight: mx.array) -> mx.array:
    """x @ W.T in float32, of numbers of 16 bits."""
    return x.astype(mx.float32) @ weight.astype(mx.float32).T


def _sum(part: mx.array, ranks: Ranks) -> mx.array:
    ranks.settle()
    return mx.distributed.all_sum(part, group=ranks.group)


def summed(part: nn.Module, ranks: Ranks) -> nn.Module:
    """The layer that sums the products of this part and of those that the other ranks hold."""
    return SummedLinear(part, ranks) if isinstance(part, Linear) else SummedQuantizedLinear(part, ranks)
