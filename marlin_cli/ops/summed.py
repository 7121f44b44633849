"""Linear layers of which every rank holds some columns: products are summed over the ranks, and each gets the sum.

A rank multiplies its columns by the channels of x that it has made. A global scale multiplies before the sum, a bias is
added after it, once. Sums of parts round otherwise than one product does; the ranks all get the same bits.
"""

import mlx.core as mx
import mlx.nn as nn

from marlin_cli.ops.layers import Linear, QuantizedLinear
from marlin_cli.ranks import Ranks


class SummedLinear(Linear):
    """A `Linear` with the columns of this rank."""

    def __init__(self, part: Linear, ranks: Ranks) -> None:
        nn.Module.__init__(self)
        self._ranks = ranks
        self.weight = part.weight
        if "bias" in part:
            self.bias = part.bias

    def product(self, x: mx.array) -> mx.array:
        return _sum(super().product(x), self._ranks)


class SummedQuantizedLinear(QuantizedLinear):
    """A `QuantizedLinear` with the columns of this rank."""

    def __init__(self, part: QuantizedLinear, ranks: Ranks) -> None:
        arrays = {name: part[name] for name in ("weight", "scales", "biases", "bias", "global_scale") if name in part}
        super().__init__(arrays, group_size=part.group_size, bits=part.bits, mode=part.mode)
        self.activation_bits = part.activation_bits
        self._ranks = ranks

    def product(self, x: mx.array) -> mx.array:
        return _sum(super().product(x), self._ranks)


def _sum(part: mx.array, ranks: Ranks) -> mx.array:
    """Of all ranks' parts, in float32: sums of more than two would be rounded to 16 bits in between."""
    ranks.settle()
    return mx.distributed.all_sum(part.astype(mx.float32), group=ranks.group).astype(part.dtype)


def summed(part: nn.Module, ranks: Ranks) -> nn.Module:
    """The layer that sums the products of this part and of those that the other ranks hold."""
    return SummedLinear(part, ranks) if isinstance(part, Linear) else SummedQuantizedLinear(part, ranks)
