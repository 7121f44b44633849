"""Bytes of weights by part of the model, for arrays as they are stored or as they lie in memory."""

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from marlin_cli.models import linear_layers, part_of
from marlin_cli.ops import QuantizedLinear

PARTS = ("global", "middle", "local", "encoder", "decoder", "cross", "embeddings", "head")

# How the names of what is looked up, and not multiplied, end: bytes, positions and leading rows.
_EMBEDDINGS = ("embedding", "positions", "start")


def bytes_by_part(weights: Mapping[str, mx.array]) -> dict[str, int]:
    """Bytes of the arrays (by parameter path) in each part that has any, in the order of `PARTS`.

    Scales of packed layers count with their layer. Nothing is read: an array knows its size before its values.
    """
    sizes = dict.fromkeys(PARTS, 0)
    for path, array in weights.items():
        sizes[_part(path)] += array.nbytes
    return {part: size for part, size in sizes.items() if size}


def weights_by_part(network: nn.Module) -> dict[str, int]:
    """How many numbers each part has, packed ones counted one by one, in the order of `PARTS`."""
    packed = {path: module for path, module in linear_layers(network).items() if isinstance(module, QuantizedLinear)}
    counts = dict.fromkeys(PARTS, 0)
    for path, array in tree_flatten(network.parameters()):
        layer, _, last = path.rpartition(".")
        if layer not in packed:
            counts[_part(path)] += array.size
        elif last == "weight":
            counts[_part(path)] += array.size * 32 // packed[layer].bits
        elif last == "bias":
            counts[_part(path)] += array.size
    return {part: count for part, count in counts.items() if count}


def elements_by_part(weights: Mapping[str, mx.array]) -> dict[str, int]:
    """Numbers in the arrays of each part that has any, in the order of `PARTS`; of a checkpoint that is not packed."""
    counts = dict.fromkeys(PARTS, 0)
    for path, array in weights.items():
        counts[_part(path)] += array.size
    return {part: count for part, count in counts.items() if count}


def _part(path: str) -> str:
    layer, _, _ = path.rpartition(".")
    if any(name.endswith(_EMBEDDINGS) for name in path.split(".")):
        return "embeddings"
    return part_of(layer)
