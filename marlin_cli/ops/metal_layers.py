"""A linear layer, dense or packed, as the Metal kernels of a few rows read it."""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from marlin_cli.ops.kernel_inputs import nothing, on_device
from marlin_cli.ops.layers import Linear, QuantizedLinear
from marlin_cli.ops.metal import PIECE

KINDS = ("dense", "nvfp4", "mxfp4", "mxfp8", "int4", "int8")  # as `Kind` in few_rows.h.metal


class LayerInputs(NamedTuple):
    """A linear layer as the kernels read it."""

    kind: int
    group: int
    arrays: list[mx.array]  # words, scales, zeros
    bias: mx.array | None
    factor: float
    out_rows: int
    depth: int

    @property
    def format(self) -> tuple[int, int, int]:
        return self.kind, self.group, self.depth

    @property
    def template(self) -> dict[str, int]:
        """What a kernel's template says of the format."""
        return {"KIND": self.kind, "GROUP": self.group}


def read_layer(layer: nn.Module, dtype: mx.Dtype) -> LayerInputs:
    """What `takes_layers` takes."""
    bias = layer.get("bias")
    if isinstance(layer, Linear):
        rows, depth = layer.weight.shape
        return LayerInputs(0, 1, [on_device(layer.weight), nothing(mx.uint8), nothing(dtype)], bias, 1.0, rows, depth)
    assert isinstance(layer, QuantizedLinear)
    affine = layer.mode == "affine"
    kind = f"int{layer.bits}" if affine else layer.mode
    zeros = on_device(layer["biases"]) if affine else nothing(dtype)
    factor = float(layer["global_scale"].item()) if "global_scale" in layer else 1.0
    words, scales = on_device(layer["weight"]), on_device(layer["scales"])
    rows, depth = layer["weight"].shape[0], layer["weight"].shape[1] * 32 // layer.bits
    return LayerInputs(KINDS.index(kind), layer.group_size, [words, scales, zeros], bias, factor, rows, depth)


def takes_layers(layers: list[nn.Module], x: mx.array, biased: bool = True) -> bool:
    """Whether the kernels know the layers, which are of one format; a bias only where it is `biased`, and of all or none."""
    for layer in layers:
        if type(layer) is Linear:
            known = layer.weight.dtype == x.dtype
        else:
            known = type(layer) is QuantizedLinear and layer.activation_bits == 16
            known = known and (f"int{layer.bits}" if layer.mode == "affine" else layer.mode) in KINDS
            known = known and layer["scales"].dtype == (x.dtype if layer.mode == "affine" else mx.uint8)
        bias = layer.get("bias")
        if not known or (bias is not None and (not biased or bias.dtype != x.dtype)):
            return False
    read = [read_layer(layer, x.dtype) for layer in layers]
    whole = all(each.depth % PIECE == 0 and (each.kind == 0 or each.group % PIECE == 0) for each in read)
    return whole and len({each.format for each in read}) == 1 and len({each.bias is None for each in read}) == 1
