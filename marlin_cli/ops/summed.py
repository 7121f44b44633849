"""Linear layers of which every rank holds some columns: products are summed over the ranks, and each gets the sum.

A rank multiplies its columns by the channels of x that it has made. A global scale multiplies before the sum, a bias is
added after it, once. Sums of parts round otherwise than one product does; the ranks all get the same bits.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from marlin_cli.ops.layers import Linear, QuantizedLinear


class SummedLinear(Linear):
    """A `Linear` with the columns of this rank, of a group of `mx.distributed`."""

    def __init__(self, part: Linear, group: Any) -> None:
        nn.Module.__init__(self)
        self._group = group
        self.weight = part.weight
        if "bias" in part:
            self.bias = part.bias

    def product(self, x: mx.array) -> mx.array:
        return mx.distributed.all_sum(super().product(x), group=self._group)


class SummedQuantizedLinear(QuantizedLinear):
    """A `QuantizedLinear` with the columns of this rank, of a group of `mx.distributed`."""

    def __init__(self, part: QuantizedLinear, group: Any) -> None:
        arrays = {name: part[name] for name in ("weight", "scales", "biases", "bias", "global_scale") if name in part}
        super().__init__(arrays, group_size=part.group_size, bits=part.bits, mode=part.mode)
        self.activation_bits = part.activation_bits
        self._group = group

    def product(self, x: mx.array) -> mx.array:
        return mx.distributed.all_sum(super().product(x), group=self._group)


def summed(part: nn.Module, group: Any) -> nn.Module:
    """The layer that sums the products of this part and of those that the other ranks hold."""
    return SummedLinear(part, group) if isinstance(part, Linear) else SummedQuantizedLinear(part, group)
