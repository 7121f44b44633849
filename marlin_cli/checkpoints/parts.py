"""A checkpoint of which one rank reads its part: rows and columns of arrays, and no more of a file than these lie on."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from marlin_cli.checkpoints import native
from marlin_cli.checkpoints.foreign import Checkpoint
from marlin_cli.tensor_files import read_slices

# A checkpoint, of which nothing has been read but headers -> what is wanted of those arrays that are not wanted whole.
Wanted: TypeAlias = Callable[[Checkpoint], Mapping[str, tuple[slice, ...]]]

# Unsigned integers by the bytes of a number: what has no type in numpy crosses as these.
WORDS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}


def part_of(checkpoint: Checkpoint, wanted: Wanted) -> Checkpoint:
    """The checkpoint with some arrays cut. Of marlin's own layout only the part is read; of others one array after the other.

    Raises:
        CheckpointError: a file changed while it was read.
    """
    cuts = wanted(checkpoint)
    weights = dict(checkpoint.weights)
    there: dict[str, mx.array] = {}
    if checkpoint.layout == "native":
        path = checkpoint.path
        for file in native.weight_files(path) if path.is_dir() else [path]:
            there.update(read_slices(file, {name: cut for name, cut in cuts.items() if name in weights}, _shapes(weights)))
    checkpoint = dataclasses.replace(checkpoint, weights=weights)
    for name, cut in cuts.items():
        whole = weights.pop(name)
        weights[name] = there[name] if name in there else _copied(whole, cut)
        del whole
    return checkpoint


def _shapes(weights: Mapping[str, mx.array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in weights.items()}


def _copied(whole: mx.array, cut: tuple[slice, ...]) -> mx.array:
    """A part that does not hold the whole in memory, as a slice of MLX would."""
    words = WORDS[whole.dtype.size]
    part = np.ascontiguousarray(np.array(whole.view(words))[cut])
    return mx.array(part).view(whole.dtype)
