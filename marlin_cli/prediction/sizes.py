"""Bytes of weights by part of the model, for arrays as they are stored or as they lie in memory."""

from collections.abc import Collection, Iterable, Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from marlin_cli.engine.disk_tables import DiskTable
from marlin_cli.models import matrices_of, part_of
from marlin_cli.ops import PackedTable, QuantizedLinear

PARTS = ("patcher", "global", "middle", "local", "states", "encoder", "decoder", "cross", "embeddings", "head")

# How the names of what is looked up, and not multiplied, end: bytes, positions and leading rows.
_EMBEDDINGS = ("embedding", "positions", "start")


def bytes_by_part(weights: Mapping[str, mx.array]) -> dict[str, int]:
    """Bytes of the arrays (by parameter path) in each part that has any, in the order of `PARTS`.

    Scales of packed layers count with their layer. Nothing is read: an array knows its size before its values.
    """
    return _by_part((path, array.nbytes) for path, array in weights.items())


def bytes_in_float32(weights: Mapping[str, mx.array], looked_up: Collection[str] = ()) -> dict[str, int]:
    """As `bytes_by_part`, of weights as a CPU computes with them: what is 16 bits wide and not packed takes 32.

    Args:
        looked_up: paths of tables that keep the type in which they are stored, see `Architecture.looked_up`.
    """
    packed = {path.removesuffix(".scales") for path in weights if path.endswith(".scales")} | set(looked_up)
    return _by_part(
        (path, array.nbytes * (2 if array.dtype.size == 2 and path.rpartition(".")[0] not in packed else 1))
        for path, array in weights.items()
    )


def elements_by_part(weights: Mapping[str, mx.array]) -> dict[str, int]:
    """As `bytes_by_part`, the numbers in the arrays: the weights of a checkpoint that is not packed."""
    return _by_part((path, array.size) for path, array in weights.items())


def weights_by_part(network: nn.Module) -> dict[str, int]:
    """How many numbers each part has, packed ones counted one by one, in the order of `PARTS`."""
    return _by_part(_unpacked_sizes(network))


def _unpacked_sizes(network: nn.Module) -> Iterator[tuple[str, int]]:
    """(path, numbers) of each parameter that the network would have if no layer were packed."""
    packed = {
        path: module for path, module in matrices_of(network).items() if isinstance(module, (QuantizedLinear, PackedTable))
    }
    for path, array in tree_flatten(network.parameters()):
        layer, _, last = path.rpartition(".")
        if layer in packed and last == "weight":
            yield path, array.size * 32 // packed[layer].bits
        elif layer not in packed or last == "bias":
            yield path, array.size
    for path, module in network.named_modules():
        if isinstance(module, DiskTable):
            yield f"{path}.weight", module.numbers


def _by_part(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Sums of (path, size) by part."""
    sums = dict.fromkeys(PARTS, 0)
    for path, size in sizes:
        sums[part_of_weight(path)] += size
    return {part: size for part, size in sums.items() if size}


def part_of_weight(path: str) -> str:
    """The part that a parameter counts with: as its layer, but for embeddings."""
    layer, _, _ = path.rpartition(".")
    if any(name.endswith(_EMBEDDINGS) for name in path.split(".")):
        return "embeddings"
    return part_of(layer)
