"""What `marlin quantize` tells of the layers it packed: tables for a person, a document for programs."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marlin_cli import console
from marlin_cli.quantization.layers import LayerReport
from marlin_cli.quantization.plan import QuantizationSettings
from marlin_cli.quantization.reports import by_part, worst_layers


def document_of(
    model: str,
    target: Path | None,
    settings: QuantizationSettings,
    method: str,
    layers: Sequence[LayerReport],
    kept: Mapping[str, int],
) -> dict[str, Any]:
    """The report as plain values; arguments as in `show`."""
    return {
        "model": model,
        "output": None if target is None else str(target),
        "settings": dataclasses.asdict(settings),
        "method": method,
        "parts": [dataclasses.asdict(part) for part in by_part(layers)],
        "worst_layers": [_worst(layer) for layer in worst_layers(layers)],
        "kept_bytes": sum(kept.values()),
        "kept_types": sorted(kept),
    }


def show(model: str, target: Path | None, layers: Sequence[LayerReport], kept: Mapping[str, int]) -> None:
    """The table by part, and the worst layers where an error was measured.

    Args:
        target: the folder that was written; None where nothing was.
        kept: bytes of all but the layers' weights, by type.
    """
    parts = by_part(layers)
    # Where errors of outputs were measured, they are what was made small; those of the weights may be larger for it.
    by_output = any(part.output_error is not None for part in parts)
    rows = [
        [
            part.part,
            part.format,
            str(part.layers),
            f"{part.bits_per_weight:.2f}",
            f"{part.bytes_before:,}",
            f"{part.bytes_after:,}",
            *([_percent(part.output_error), _percent(part.mlx_output_error)] if by_output else []),
            _percent(part.relative_error),
            *([] if by_output else [_percent(part.mlx_relative_error)]),
        ]
        for part in parts
    ]
    others = sum(kept.values())
    before = sum(part.bytes_before for part in parts) + others
    after = sum(part.bytes_after for part in parts) + others
    weights = sum(part.weights for part in parts)
    blank = [""] * (3 if by_output else 2)
    rows.append(["other", ", ".join(sorted(kept)), "", "", f"{others:,}", f"{others:,}", *blank])
    rows.append(["all", "", "", f"{8 * (after - others) / weights:.2f}", f"{before:,}", f"{after:,}", *blank])
    columns = ["part", "format", "layers", "bits/weight", "bytes before", "bytes after"]
    columns += ["error of outputs", "MLX's", "of weights"] if by_output else ["error", "MLX's encoder"]
    title = f"{model} -> {target}" if target is not None else f"{model}: plan, nothing written"
    console.table(title, columns, rows)
    worst = [
        [each["path"], each["format"], f"{each['output_error']:.2e}", f"{each['mlx_output_error']:.2e}"]
        for each in map(_worst, worst_layers(layers))
    ]
    if worst:
        title = "Largest squared error of the output over its square, on the calibration's inputs"
        console.table(title, ["layer", "format", "error", "MLX's encoder"], worst)


def _worst(layer: LayerReport) -> dict[str, Any]:
    return {
        "path": layer.plan.path,
        "format": layer.format if layer.plan.format else None,
        "output_error": layer.output_error,
        "mlx_output_error": layer.mlx_output_error,
    }


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"
