"""Activation-aware scaling (AWQ, arXiv 2306.00978): channels are scaled up in a layer and down in what feeds it.

The product stays the same in exact arithmetic, and nothing is added to the network: the inverse factors go into the
gain of the norm before a layer, into the rows of `up_proj` before `down_proj`, into those of `v_proj` before `o_proj`
where every head has values of its own, or into the embeddings that a patch projection reads. The norm that ends ByT5's
encoder is left alone: what follows it is the model's answer to `encode`.

A factor is a power of the channel's mean input over a power of its mean weight, both searched: where a channel's inputs
are large only because its weights are small, as an outlier of trained networks often is, the two together tell how much.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

# Exponents that are tried, of the mean input and of the mean weight; the first pair leaves the channels as they are.
TENTHS = tuple(index / 10 for index in range(11))
EXPONENTS = tuple((input, 0.0) for input in TENTHS) + tuple((input, 1 - input) for input in TENTHS[:-1])


@dataclass(frozen=True)
class Fold:
    """Layers that see one input, and the parameter that makes its channels.

    Attributes:
        consumers: paths of the linear layers whose columns are multiplied.
        producer: path of the parameter divided by the same factors: a gain [channels], a weight [channels, ..], or an
            embedding [ids, channels].
        producer_bias: path of the producer's bias, divided too.
        repeats: how many times the producer's channels stand side by side in the consumers' columns.
    """

    consumers: tuple[str, ...]
    producer: str
    producer_bias: str | None = None
    repeats: int = 1


def legal_folds(parameters: Mapping[str, mx.array], *, gated: bool, norms_lead: bool = True) -> list[Fold]:
    """The folds of a network of blocks with `attention_norm`, `attention`, `ffn_norm` and `ffn`; some with `cross` too.

    In a MegaByte also what leads into a stage's rows, and from its last norm to the next stage.

    Args:
        parameters: by path.
        gated: `down_proj` sees activation(gate) * up: linear in `up_proj`. An activation alone is not.
        norms_lead: a norm that follows a sum makes what later layers add to as well: nothing can be folded into it.
    """
    folds = []
    for path in parameters:
        block, found, _ = path.partition(".attention.q_proj.weight")
        if not found:
            continue
        attention = f"{block}.attention"
        if norms_lead:
            # All that read the norm; queries to the states of a recurrent layer too.
            readers = [f"{attention}.{name}_proj" for name in ("q", "k", "v", "state_q")]
            found_readers = tuple(path for path in readers if f"{path}.weight" in parameters)
            folds.append(Fold(found_readers, f"{block}.attention_norm.weight"))
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
    return [*folds, *_between_stages(parameters)]


def _between_stages(parameters: Mapping[str, mx.array]) -> list[Fold]:
    """Embeddings or their norm before each patch projection, and the norm of each stage before the next one."""
    folds = []
    for path in parameters:
        stage, found, _ = path.rpartition("patch_projection.weight")
        if found and f"{stage}patch_norm.weight" in parameters:
            folds.append(Fold((f"{stage}patch_projection",), f"{stage}patch_norm.weight", f"{stage}patch_norm.bias"))
        elif found:
            embedding = f"{stage}byte_embedding.weight"
            repeats = parameters[path].shape[1] // parameters[embedding].shape[1]
            folds.append(Fold((f"{stage}patch_projection",), embedding, repeats=repeats))
        stage, found, _ = path.rpartition("to_next.weight")
        if found:
            folds.append(Fold((f"{stage}to_next",), f"{stage}norm.weight"))
    if "global_to_local.weight" in parameters and "global.norm.weight" in parameters:
        folds.append(Fold(("global_to_local",), "global.norm.weight"))
    return folds


def awq_factors(
    weights: Sequence[mx.array],
    mean_square: npt.NDArray[np.float32],
    output_error: Callable[[int, mx.array, npt.NDArray[np.float32]], float],
    repeats: int = 1,
) -> npt.NDArray[np.float32]:
    """The factor of each input channel [channels] under which packing the layers leaves the least error.

    Args:
        weights: [rows, channels * repeats] of each layer that sees the input.
        mean_square: of each of their columns.
        output_error: (index of the layer, its scaled weight, the factors of its columns) -> squared error of the output.
        repeats: see `Fold`.
    """
    inputs = channel_size(mean_square, repeats)
    columns = channel_size(column_square(weights), repeats)
    best, least = np.ones_like(inputs), np.inf
    for of_inputs, of_weights in EXPONENTS:
        factors = inputs**of_inputs / columns**of_weights
        # Powers of two, so that folding is exact in every type.
        factors = np.exp2(np.rint(np.log2(factors / np.sqrt(factors.max() * factors.min())))).astype(np.float32)
        tried = np.tile(factors, repeats)
        error = sum(
            output_error(index, weight.astype(mx.float32) * mx.array(tried), tried) for index, weight in enumerate(weights)
        )
        if error < least:
            best, least = factors, error
    return best


def column_square(weights: Sequence[mx.array]) -> npt.NDArray[np.float32]:
    """The mean square of each column [columns] over the rows of all these layers."""
    squares = [np.array(mx.square(weight.astype(mx.float32)).mean(axis=0)) for weight in weights]
    mean: npt.NDArray[np.float32] = np.stack(squares).mean(axis=0)
    return mean


def channel_size(mean_square: npt.NDArray[np.float32], repeats: int) -> npt.NDArray[np.float32]:
    """Root mean square of each channel [channels], never 0, from those of columns [channels * repeats]."""
    by_channel = mean_square.reshape(repeats, -1).mean(axis=0)
    return np.sqrt(np.maximum(by_channel, max(1e-8 * float(by_channel.mean()), 1e-30)))


def fold(parameters: dict[str, mx.array], found: Fold, factors: npt.NDArray[np.float32]) -> None:
    """Multiply the consumers' columns by `factors` [channels] and divide the producer, in place of the mapping's values."""
    factor, columns = mx.array(factors), mx.array(np.tile(factors, found.repeats))
    for path in found.consumers:
        weight = parameters[f"{path}.weight"]
        parameters[f"{path}.weight"] = (weight.astype(mx.float32) * columns).astype(weight.dtype)
    for name in (found.producer, found.producer_bias):
        if name is not None:
            array = parameters[name]
            by_row = array.ndim == 2 and not name.endswith("embedding.weight")
            inverse = 1 / (factor[:, None] if by_row else factor)
            parameters[name] = (array.astype(mx.float32) * inverse).astype(array.dtype)
