"""Linear layers that stay in their file, of which each is read when it multiplies: to calibrate models larger than memory.

Reading all weights once a window costs little beside what a window of thousands of bytes costs to compute, and every number is
the one of the model in memory. It is not for decoding, which would read all of the model for a byte.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from marlin_cli.checkpoints.stored_rows import Stored, StoredRows, open_rows
from marlin_cli.engine.disk_tables import free_memory_bytes
from marlin_cli.models import linear_layers, set_modules
from marlin_cli.ops import Linear

# A network that would take more than this share of the memory that is free leaves its layers in their files.
MOST_OF_FREE_MEMORY = 0.75

# Of a file that are read at once.
BLOCK_BYTES = 1 << 24


class DiskLinear(Linear):
    """A `Linear` of which the weight is read and forgotten in each call; `weight` tells shape and type, and takes no memory."""

    def __init__(self, layer: Linear, rows: StoredRows) -> None:
        super().__init__(1, 1, bias=False)
        self.weight = mx.broadcast_to(mx.zeros((), dtype=layer.weight.dtype), layer.weight.shape)
        if "bias" in layer:
            self.bias = layer.bias
        self._rows = rows

    def product(self, x: mx.array) -> mx.array:
        """x @ W.T"""
        blocks = []
        for block in self._rows.blocks(BLOCK_BYTES):
            blocks.append(block.astype(self.weight.dtype))
            mx.eval(blocks[-1])  # so that no more than a block of the file is there beside them
        loaded = Linear(1, 1, bias=False)
        loaded.weight = mx.concatenate(blocks) if len(blocks) > 1 else blocks[0]
        found = loaded.product(x)
        mx.eval(found)  # the graph would keep the weight
        return found


def leave_layers_on_disk(network: Any, stored: Stored) -> list[str]:
    """Let the linear layers of a network, none of which has been read, stay in the files that they lie in: their paths."""
    layers = {path: layer for path, layer in linear_layers(network).items() if isinstance(layer, Linear)}
    found = open_rows(stored, {f"{path}.weight": layer.weight for path, layer in layers.items()})
    swapped: list[tuple[str, nn.Module]] = [
        (path, DiskLinear(layer, found[f"{path}.weight"])) for path, layer in layers.items() if f"{path}.weight" in found
    ]
    set_modules(network, swapped)
    return [path for path, _ in swapped]


def is_larger_than_memory(network: Any) -> bool:
    """Would a network take more of the memory that is free than it should?"""
    return bool(
        sum(array.nbytes for _, array in tree_flatten(network.parameters())) > MOST_OF_FREE_MEMORY * free_memory_bytes()
    )
