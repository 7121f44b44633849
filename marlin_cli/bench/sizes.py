"""Bytes of weights by part of the model, for arrays as they are stored or as they lie in memory."""

from collections.abc import Mapping

import mlx.core as mx

from marlin_cli.models import part_of

PARTS = ("global", "middle", "local", "embeddings", "head")

# How the names of what is looked up, and not multiplied, end: bytes, positions and leading rows.
_EMBEDDINGS = ("byte_embedding", "positions", "start")


def bytes_by_part(weights: Mapping[str, mx.array]) -> dict[str, int]:
    """Bytes of the arrays (by parameter path) in each part that has any, in the order of `PARTS`.

    Scales of packed layers count with their layer. Nothing is read: an array knows its size before its values.
    """
    sizes = dict.fromkeys(PARTS, 0)
    for path, array in weights.items():
        sizes[_part(path)] += array.nbytes
    return {part: size for part, size in sizes.items() if size}


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
