"""Activation-aware scaling (AWQ, arXiv 2306.00978): channels are scaled up in a layer and down in what feeds it.

The product stays the same in exact arithmetic, and nothing is added to the network: the inverse factors go into the
gain of the norm before a layer, into the rows of `up_proj` before `down_proj`, or into those of `v_proj` before `o_proj`
where every head has values of its own. The norm that ends ByT5's encoder is left alone: what follows it is the model's
answer to `encode`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

# Exponents of the mean input that are tried; 0 leaves the channels as they are.
EXPONENTS = tuple(index / 10 for index in range(11))


@dataclass(frozen=True)
class Fold:
    """Layers that see one input, and the parameter that makes its channels.

    Attributes:
        consumers: paths of the linear layers whose columns are multiplied.
        producer: path of the parameter divided by the same factors: a gain [channels], or a weight [channels, ..].
        producer_bias: path of the producer's bias, divided too.
    """

    consumers: tuple[str, ...]
    producer: str
    producer_bias: str | None = None


def legal_folds(parameters: Mapping[str, mx.array], *, gated: bool) -> list[Fold]:
    """The folds of a network of blocks with `attention_norm`, `attention`, `ffn_norm` and `ffn`; some with `cross` too.

    Args:
        parameters: by path.
        gated: `down_proj` sees activation(gate) * up: linear in `up_proj`. An activation alone is not.
    """
    folds = []
    for path in parameters:
        block, found, _ = path.partition(".attention.q_proj.weight")
        if not found:
            continue
        attention = f"{block}.attention"
        folds.append(Fold(tuple(f"{attention}.{name}_proj" for name in "qkv"), f"{block}.attention_norm.weight"))
        ffn_inputs = [f"{block}.ffn.up_proj", *([f"{block}.ffn.gate_proj"] if gated else [])]
        folds.append(Fold(tuple(ffn_inputs), f"{block}.ffn_norm.weight"))
        if f"{block}.cross.q_proj.weight" in parameters:
            folds.append(Fold((f"{block}.cross.q_proj",), f"{block}.cross_norm.weight"))
        for reader in (attention, f"{block}.cross"):
            if f"{reader}.v_proj.weight" not in parameters:
                continue
            values, output = parameters[f"{reader}.v_proj.weight"], parameters[f"{reader}.o_proj.weight"]
            if values.shape[0] == output.shape[1]:
                bias = f"{reader}.v_proj.bias"
                folds.append(Fold((f"{reader}.o_proj",), f"{reader}.v_proj.weight", bias if bias in parameters else None))
        if gated:
            bias = f"{block}.ffn.up_proj.bias"
            folds.append(Fold((f"{block}.ffn.down_proj",), f"{block}.ffn.up_proj.weight", bias if bias in parameters else None))
    return folds


def awq_factors(
    weights: Sequence[mx.array],
    mean_square: npt.NDArray[np.float32],
    output_error: Callable[[int, mx.array, npt.NDArray[np.float32]], float],
) -> npt.NDArray[np.float32]:
    """The factor of each input channel [channels] under which packing the layers leaves the least error.

    Args:
        weights: [rows, channels] of each layer that sees the input.
        mean_square: of each input channel.
        output_error: (index of the layer, its scaled weight, the factors) -> squared error of the output.
    """
    size = np.sqrt(np.maximum(mean_square, 1e-12))
    best, least = np.ones_like(size), np.inf
    for exponent in EXPONENTS:
        factors = size**exponent
        # Powers of two, so that folding is exact in every type.
        factors = np.exp2(np.rint(np.log2(factors / np.sqrt(factors.max() * factors.min())))).astype(np.float32)
        error = sum(
            output_error(index, weight.astype(mx.float32) * mx.array(factors), factors) for index, weight in enumerate(weights)
        )
        if error < least:
            best, least = factors, error
    return best


def fold(parameters: dict[str, mx.array], found: Fold, factors: npt.NDArray[np.float32]) -> None:
    """Multiply the consumers' columns and divide the producer, in place of the mapping's values."""
    factor = mx.array(factors)
    for path in found.consumers:
        weight = parameters[f"{path}.weight"]
        parameters[f"{path}.weight"] = (weight.astype(mx.float32) * factor).astype(weight.dtype)
    for name in (found.producer, found.producer_bias):
        if name is not None:
            array = parameters[name]
            inverse = 1 / (factor[:, None] if array.ndim == 2 else factor)
            parameters[name] = (array.astype(mx.float32) * inverse).astype(array.dtype)
