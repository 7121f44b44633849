"""The page of `marlin quantize --report`: what was packed and what it cost, as sections and as one document of numbers."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from marlin_cli.page import Bars, Block, Grid, Histogram, Plot, Point, Section, Text
from marlin_cli.quality.packing_loss import DomainLoss
from marlin_cli.quantization.layers import LayerReport
from marlin_cli.quantization.reports import by_part, worst_layers
from marlin_cli.statistics.show import LayerRange, Summary

FORMAT_VERSION = 1  # of the document

# Edges of the histogram: half decades of KL, in bits. What lies outside counts at the ends.
KL_EDGES = tuple(10.0 ** (half / 2) for half in range(-16, 5))

SERIES = 6  # lines of a chart that can be told apart


def document_of(
    model: str,
    output: str,
    method: str,
    layers: Sequence[LayerReport],
    kept_bytes: Mapping[str, int],
    summary: Summary | None,
    errors: Mapping[str, Mapping[str, float]] | None,
    losses: Mapping[str, DomainLoss] | None,
    domain_weights: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Every number of the page as plain values.

    Args:
        domain_weights: share of each domain of the statistics; that of its bytes if None.
    """
    return {
        "format_version": FORMAT_VERSION,
        "model": model,
        "output": output,
        "method": method,
        "parts": [dataclasses.asdict(part) for part in by_part(layers)],
        "kept_bytes": sum(kept_bytes.values()),
        "kept_types": sorted(kept_bytes),
        "layers": [_layer(layer, (errors or {}).get(layer.plan.path)) for layer in layers],
        "worst_layers": [layer["path"] for layer in _worst(layers)],
        "domains": None if losses is None else {domain: _domain(loss) for domain, loss in losses.items()},
        "kl_edges_bits": list(KL_EDGES),
        "calibrated_on": None if summary is None else _shares(domain_weights or summary.domains),
        "statistics": None if summary is None else dataclasses.asdict(summary),
    }


def sections_of(document: Mapping[str, Any], summary: Summary | None) -> list[Section]:
    """The page for people, from the document."""
    sections = [_sizes(document), _by_layer(document), _worst_section(document)]
    if document["domains"] is not None or any(layer["output_error_by_domain"] for layer in document["layers"]):
        sections.append(_by_domain(document))
    if document["domains"] is not None:
        sections.append(_divergence(document["domains"]))
    if summary is not None:
        sections.append(_ranges(summary))
    return sections


def _layer(layer: LayerReport, errors: Mapping[str, float] | None) -> dict[str, Any]:
    squared_weight = layer.squared_weight or 0.0
    relative = (
        None if layer.squared_error is None else math.sqrt(layer.squared_error / squared_weight) if squared_weight else 0.0
    )
    theirs = layer.mlx_squared_error
    return {
        "path": layer.plan.path,
        "part": layer.plan.part,
        "format": layer.format if layer.plan.format else None,
        "kept_as": layer.kept_as,
        "weights": layer.plan.rows * layer.plan.columns,
        "bytes_before": layer.bytes_before,
        "bytes_after": layer.bytes_after,
        "relative_error": relative,
        "mlx_relative_error": None if theirs is None else math.sqrt(theirs / squared_weight) if squared_weight else 0.0,
        "output_error": layer.output_error,
        "mlx_output_error": layer.mlx_output_error,
        "output_error_by_domain": None if errors is None else dict(errors),
    }


def _worst(layers: Sequence[LayerReport], most: int = 10) -> list[dict[str, Any]]:
    """The layers that suffer most: by the error of the output where it was measured, else by that of the weights."""
    measured = worst_layers(layers, most)
    if not measured:
        packed = [layer for layer in layers if layer.squared_error is not None]
        measured = sorted(packed, key=lambda layer: -(_layer(layer, None)["relative_error"]))[:most]
    return [_layer(layer, None) for layer in measured]


def _domain(loss: DomainLoss) -> dict[str, Any]:
    clipped = np.clip(loss.divergences, KL_EDGES[0], KL_EDGES[-1])
    median, high, largest = (float(value) for value in np.percentile(loss.divergences, [50, 99, 100]))
    return {
        "bytes": loss.bytes,
        "bits_per_byte_before": loss.bits_before / loss.bytes,
        "bits_per_byte_after": loss.bits_after / loss.bytes,
        "bits_per_byte_lost_error": loss.standard_error,
        "kl_mean_bits": float(loss.divergences.mean(dtype=np.float64)),
        "kl_median_bits": median,
        "kl_percentile_99_bits": high,
        "kl_maximum_bits": largest,
        "kl_counts": np.histogram(clipped, KL_EDGES)[0].tolist(),
    }


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    """The domains that count something, and their shares of the whole."""
    total = sum(weights.values()) or 1.0
    return {domain: weight / total for domain, weight in weights.items() if weight > 0}


def _sizes(document: Mapping[str, Any]) -> Section:
    parts, kept = document["parts"], document["kept_bytes"]
    rows = [
        [f"{part['part']} ({part['format']})", str(part["layers"]), f"{part['weights']:,}", f"{part['bits_per_weight']:.2f}",
         f"{part['bytes_before']:,}", f"{part['bytes_after']:,}", _percent(part["relative_error"]),
         _percent(part["mlx_relative_error"])]
        for part in parts
    ]  # fmt: skip
    before, after = (sum(part[f"bytes_{when}"] for part in parts) + kept for when in ("before", "after"))
    weights = sum(part["weights"] for part in parts)
    rows.append([f"other ({', '.join(document['kept_types'])})", "", "", "", f"{kept:,}", f"{kept:,}", "", ""])
    rows.append(["all", "", f"{weights:,}", f"{8 * (after - kept) / weights:.2f}", f"{before:,}", f"{after:,}", "", ""])
    names = list(dict.fromkeys(part["part"] for part in parts))
    shares = {
        name: [sum(part[f"bytes_{when}"] for part in parts if part["part"] == name) / 1e6 for when in ("before", "after")]
        for name in names
    }
    columns = ["part", "layers", "weights", "bits/weight", "bytes before", "bytes after", "error", "MLX's encoder"]
    errors = {
        "marlin": [_hundred(part["relative_error"]) for part in parts],
        "MLX's encoder": [_hundred(part["mlx_relative_error"]) for part in parts],
    }
    labels = [f"{part['part']} {part['format']}" for part in parts]
    return Section(
        "Size and error by part",
        [
            Text(f"{before:,} bytes before, {after:,} after: {before / after:.2f} times smaller."),
            Grid("", columns, rows),
            Bars("Size by part", "MB", ["before", "after"], {**shares, "other": [kept / 1e6] * 2}, stacked=True),
            Bars("Root mean square error of the weights", "% of their root mean square", labels, errors),
        ],
    )


def _by_layer(document: Mapping[str, Any]) -> Section:
    layers = document["layers"]
    rows = [
        [layer["path"], layer["format"] or layer["kept_as"], f"{layer['bytes_before']:,}", f"{layer['bytes_after']:,}",
         _percent(layer["relative_error"]), _percent(layer["mlx_relative_error"]), _small(layer["output_error"]),
         _small(layer["mlx_output_error"])]
        for layer in layers
    ]  # fmt: skip
    columns = ["layer", "format", "bytes before", "bytes after", "error", "MLX's", "output error", "MLX's"]
    packed = [layer for layer in layers if layer["relative_error"] is not None]
    labels = [layer["path"] for layer in packed]
    blocks: list[Block] = [
        Bars("Size", "kB after", labels, {"": [layer["bytes_after"] / 1e3 for layer in packed]}),
        Bars("Error of the weights", "%", labels, {"": [_hundred(layer["relative_error"]) for layer in packed]}),
        Grid("All layers; errors of outputs are squared, over the output's square", columns, rows),
    ]
    return Section("Size and error by layer", blocks)


def _worst_section(document: Mapping[str, Any]) -> Section:
    by_path = {layer["path"]: layer for layer in document["layers"]}
    worst = [by_path[path] for path in document["worst_layers"]]
    measured = any(layer["output_error"] is not None for layer in worst)
    ours, theirs = ("output_error", "mlx_output_error") if measured else ("relative_error", "mlx_relative_error")
    unit = "squared error of the output over its square" if measured else "error of the weights over their root mean square"
    note = (
        "By the error of each layer's output on the calibration's inputs (x^T x)."
        if measured
        else "By the error of the weights; with Hessians (marlin calibrate --hessian) that of the outputs would be known."
    )
    series = {"marlin": [layer[ours] for layer in worst], "MLX's encoder": [layer[theirs] for layer in worst]}
    return Section("The ten worst layers", [Text(note), Bars("", unit, [layer["path"] for layer in worst], series)])


def _by_domain(document: Mapping[str, Any]) -> Section:
    blocks: list[Block] = []
    domains = document["domains"]
    if domains is not None:
        rows = [
            [name, f"{each['bytes']:,}", f"{each['bits_per_byte_before']:.4f}", f"{each['bits_per_byte_after']:.4f}",
             _lost(each), _small(each["kl_mean_bits"]),
             _small(each["kl_median_bits"]), _small(each["kl_percentile_99_bits"]), _small(each["kl_maximum_bits"])]
            for name, each in domains.items()
        ]  # fmt: skip
        columns = ["domain", "bytes", "bits/byte before", "after", "difference", "KL, mean", "median", "99 %", "max"]
        blocks.append(Grid("On the shipped sample, each window from an empty context; KL in bits per byte", columns, rows))
        unseen = [name for name in domains if name not in (document["calibrated_on"] or domains)]
        if unseen:
            seen = " and ".join(document["calibrated_on"])
            blocks.append(Text(f"Calibrated on {seen} alone: no {' and no '.join(unseen)} was weighed, so it may lose more."))
        means = [each["kl_mean_bits"] for each in domains.values()]
        blocks.append(Bars("Mean KL divergence from the 16-bit model", "bits per byte", list(domains), {"": means}))
    known = [layer for layer in document["layers"] if layer["output_error_by_domain"]]
    if known:
        names = list(known[0]["output_error_by_domain"])
        parts = list(dict.fromkeys(layer["part"] for layer in known))
        means_of = {
            name: [
                100 * float(np.mean([each["output_error_by_domain"][name] for each in known if each["part"] == part]))
                for part in parts
            ]
            for name in names
        }
        title = "Squared error of outputs over their square, mean"
        blocks.append(Bars(title, "%", parts, means_of))
        rows = [[layer["path"], *(_small(layer["output_error_by_domain"][name]) for name in names)] for layer in known]
        blocks.append(Grid("The same by layer, on the calibration's inputs of each domain", ["layer", *names], rows))
        left_out = sum(layer["relative_error"] is not None for layer in document["layers"]) - len(known)
        if left_out:
            blocks.append(Text(f"{left_out} layers were rescaled before they were packed, and are left out."))
    return Section("Error by domain", blocks)


def _lost(domain: Mapping[str, Any]) -> str:
    difference = f"{domain['bits_per_byte_after'] - domain['bits_per_byte_before']:+.4f}"
    error = domain["bits_per_byte_lost_error"]
    return difference if error is None else f"{difference} ± {error:.4f}"


def _divergence(domains: Mapping[str, Any]) -> Section:
    counts = {name: each["kl_counts"] for name, each in domains.items()}
    used = [index for index in range(len(KL_EDGES) - 1) if any(each[index] for each in counts.values())]
    first, last = min(used), max(used) + 1
    histogram = Histogram(
        "Bytes by their KL divergence",
        "KL(16-bit || packed), bits",
        KL_EDGES[first : last + 1],
        {name: each[first:last] for name, each in counts.items()},
        log_x=True,
    )
    smallest = f"Divergences below {KL_EDGES[0]:.0e} bits count as that." if first == 0 else ""
    return Section(
        "KL divergence of the packed model from the 16-bit model", [*([Text(smallest)] if smallest else []), histogram]
    )


def _ranges(summary: Summary) -> Section:
    local = [layer for layer in summary.layers if len(layer.input.rms_by_group) > 1]
    note = f"From {summary.bytes:,} bytes of calibration: " + ", ".join(
        f"{name} {count:,}" for name, count in summary.domains.items()
    )
    blocks: list[Block] = [Text(f"{note}. Row i of the local sequence predicts byte i of a patch.")]
    for start in range(0, len(local), SERIES):
        some = local[start : start + SERIES]
        which = f", {start + 1} to {start + len(some)} of {len(local)}" if len(local) > SERIES else ""
        blocks.append(_positions(f"Largest absolute input{which}", "maximum_by_group", some))
        blocks.append(_positions(f"Root mean square of inputs{which}", "rms_by_group", some))
    if not local:
        blocks.append(Text("No layer of this model tells positions apart."))
    labels = [layer.layers[0] for layer in summary.layers]
    blocks.append(
        Bars("Largest absolute input of every layer", "", labels, {"": [x.input.absolute_maximum for x in summary.layers]})
    )
    peaks = [layer.input.channel_peak for layer in summary.layers]
    blocks.append(Bars("Largest channel over the median one", "times", labels, {"": peaks}))
    return Section("Activation ranges by byte position", blocks)


def _positions(title: str, field: str, layers: Sequence[LayerRange]) -> Plot:
    series = {
        layer.layers[0]: [Point(row, value) for row, value in enumerate(getattr(layer.input, field)) if value > 0]
        for layer in layers
    }
    return Plot(title, "row of the local sequence", "activation", series, log_y=True)


def _hundred(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
