"""How the linear layers of a model are multiplied on this CPU: the way by rows, and the share of the bandwidth that one has."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from marlin_cli.ops.cpu import kernels
from marlin_cli.prediction.bandwidth import Bandwidth
from marlin_cli.prediction.prediction import LayerShape, ProductsOfLayers

ROWS = (1, 8, 64)  # decoding, a batch, a prompt
ROUNDS = 5


class LayerWays(NamedTuple):
    """Layers of one shape and format, and how they are multiplied."""

    shape: LayerShape
    layers: int
    ways: tuple[str, ...]  # for each of `ROWS`
    bytes_a_second: float  # at which one row reads the weights, all layers in turn
    share: float  # of the bandwidth of a copy


def layer_ways(shapes: Sequence[LayerShape], bandwidth: Bandwidth) -> list[LayerWays]:
    """The layers by shape and format, in the order in which a model has them first."""
    module = kernels()[0]
    assert module is not None
    alike: dict[LayerShape, list[LayerShape]] = {}
    for shape in shapes:
        alike.setdefault(dataclasses.replace(shape, path=""), []).append(shape)
    found = []
    for shape, layers in alike.items():
        probe = ProductsOfLayers(module, layers)
        seconds = min(probe.seconds() for _ in range(ROUNDS))
        speed = sum(layer.nbytes for layer in layers) / seconds
        found.append(
            LayerWays(layers[0], len(layers), tuple(_way(module, shape, rows) for rows in ROWS), speed, speed / bandwidth.copy)
        )
    return found


def _way(module: Any, shape: LayerShape, rows: int) -> str:
    if shape.format is None:
        return "dense"
    kind = getattr(module.Kind, shape.format)
    return str(module.chosen_way(kind, shape.columns, shape.depth, shape.group_size, rows, shape.activation_bits))
