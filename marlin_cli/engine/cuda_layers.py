"""Linear layers as the CUDA kernels that take a network whole know them, and what is said of networks that they do not take."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from marlin_cli import console
from marlin_cli.ops import Linear, QuantizedLinear
from marlin_cli.ops.cuda_arrays import LinearArrays, StageArrays, dense_arrays
from marlin_cli.ops.summed import SummedLinear, SummedQuantizedLinear


@dataclass(eq=False)
class Prepared:
    """A stage of a network, which costs more to find out than a patch: kept with the network while its weights are the same."""

    weights: list[mx.array]
    stage: StageArrays
    known: list[int] | None = None  # addresses of the stage's arrays

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of the network has none."""
        return type(None), ()


def prepared(
    network: nn.Module, parts: Sequence[nn.Module | mx.array], make: Callable[[], StageArrays | None]
) -> Prepared | None:
    """What `make` gives of a network, made anew where a weight of its `parts` is another array than before."""
    weights = [
        array for part in parts for _, array in tree_flatten(part.parameters() if isinstance(part, nn.Module) else [part])
    ]
    kept: Prepared | None = vars(network).get("_prepared")
    if kept is None or len(kept.weights) != len(weights) or any(a is not b for a, b in zip(kept.weights, weights, strict=True)):
        stage = make()
        if stage is None:
            return None
        kept = Prepared(weights, stage)
        object.__setattr__(network, "_prepared", kept)
    return kept


def linear_arrays(layer: nn.Module | None, *, summed: bool = False) -> LinearArrays | None:
    """The arrays of a linear layer; None where it is of a kind that the kernels do not know.

    Args:
        summed: may the layer be this rank's part of one, whose products are summed?
    """
    if type(layer) is Linear or (summed and type(layer) is SummedLinear):
        return dense_arrays(layer.weight, layer.get("bias"))
    kinds = (QuantizedLinear, SummedQuantizedLinear) if summed else (QuantizedLinear,)
    if not isinstance(layer, QuantizedLinear) or type(layer) not in kinds or layer.activation_bits != 16:
        return None
    kind = f"int{layer.bits}" if layer.mode == "affine" else layer.mode
    if kind not in ("nvfp4", "mxfp4", "mxfp8", "int4", "int8"):
        return None
    factor = layer["global_scale"].item() if "global_scale" in layer else 1.0
    return LinearArrays(
        layer["weight"], kind, layer["scales"], layer.get("biases"), layer.get("bias"), factor, layer.group_size
    )


@functools.cache
def say_once(message: str) -> None:
    console.note(message)
