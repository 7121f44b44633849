"""Reports of layers gathered: by part and format, and the layers that suffered most."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from marlin_cli.quantization.layers import LayerReport


@dataclass(frozen=True)
class PartReport:
    """The weights of one part's layers in one format, or in the type that they stay in.

    Relative errors are RMS error over RMS weight.
    """

    part: str
    format: str
    layers: int
    weights: int
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    relative_error: float | None
    mlx_relative_error: float | None
    output_error: float | None = None  # RMS error of outputs over their RMS, the mean of squares weighed by weights
    mlx_output_error: float | None = None


def by_part(layers: Sequence[LayerReport]) -> list[PartReport]:
    """Layer reports gathered by part and format, in the order of the layers."""
    groups: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault((layer.plan.part, layer.format), []).append(layer)
    return [_part(part, name, members) for (part, name), members in groups.items()]


def worst_layers(layers: Sequence[LayerReport], most: int = 10) -> list[LayerReport]:
    """The layers whose output suffers most, worst first; those without a measured error are left out."""
    measured = [layer for layer in layers if layer.output_error is not None]
    return sorted(measured, key=lambda layer: -(layer.output_error or 0.0))[:most]


def _part(part: str, name: str, members: Sequence[LayerReport]) -> PartReport:
    weights = sum(layer.plan.rows * layer.plan.columns for layer in members)
    after = sum(layer.bytes_after for layer in members)
    return PartReport(
        part=part,
        format=name,
        layers=len(members),
        weights=weights,
        bits_per_weight=after * 8 / weights,
        bytes_before=sum(layer.bytes_before for layer in members),
        bytes_after=after,
        relative_error=_relative([(layer.squared_error, layer.squared_weight) for layer in members]),
        mlx_relative_error=_relative([(layer.mlx_squared_error, layer.squared_weight) for layer in members]),
        output_error=_of_outputs([(layer.output_error, layer) for layer in members]),
        mlx_output_error=_of_outputs([(layer.mlx_output_error, layer) for layer in members]),
    )


def _of_outputs(errors: Sequence[tuple[float | None, LayerReport]]) -> float | None:
    """The root of the mean of squared errors, weighed by weights; None unless all were measured."""
    known = [(error, layer.plan.rows * layer.plan.columns) for error, layer in errors if error is not None]
    if len(known) < len(errors):
        return None
    return math.sqrt(sum(error * weights for error, weights in known) / sum(weights for _, weights in known))


def _relative(squares: Sequence[tuple[float | None, float | None]]) -> float | None:
    """RMS error over RMS weight from (squared error, squared weight) of each layer; None unless all were packed."""
    known = [(error, weight) for error, weight in squares if error is not None and weight is not None]
    if len(known) < len(squares):
        return None
    total = sum(weight for _, weight in known)
    return math.sqrt(sum(error for error, _ in known) / total) if total else 0.0
