"""What `marlin quantize` does once its options are read: settings, one library call, one table."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from marlin_cli import console
from marlin_cli.checkpoints import ImportOptions, read_checkpoint
from marlin_cli.checkpoints.export import EXPORTS, export_compressed_tensors
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.checkpoints.writer import write_model
from marlin_cli.config import did_you_mean
from marlin_cli.corpus import open_corpus
from marlin_cli.errors import ConfigError, UsageError
from marlin_cli.models import Network, build, config_as_mapping
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.quantization.apply import (
    LayerReport,
    PartReport,
    Quantized,
    by_part,
    check_method,
    dequantize_network,
    kept_bytes,
    plan_network,
    planned,
    quantize_network,
    worst_layers,
)
from marlin_cli.quantization.distill import DistillSettings, batches_of, distill
from marlin_cli.quantization.formats import FORMATS
from marlin_cli.quantization.methods import METHODS
from marlin_cli.quantization.plan import QuantizationSettings, format_from_bits, load_recipe
from marlin_cli.quantization.sequential import Batch, quantize_sequentially
from marlin_cli.quantization.stream import quantize_checkpoint
from marlin_cli.statistics import load_statistics

# Windows of both steps that run bytes through the model; a step of distillation takes so many.
WINDOW_BYTES = 1024
WINDOWS_PER_STEP = 8


@dataclass(frozen=True)
class ByteSteps:
    """What of `marlin quantize` runs calibration bytes through the model."""

    sequential_bytes: int = 0  # 0: layers are packed from statistics, each by itself
    sequential_corpora: Sequence[str] = ("default",)
    distill_steps: int = 0
    distill_corpora: Sequence[str] = ("default",)


def settings_of(
    recipe: str | None,
    global_bits: int | None,
    local_bits: int | None,
    kv_bits: int | None,
    global_format: str | None,
    local_format: str | None,
    group_size: int | None,
    overrides: Sequence[str],
) -> QuantizationSettings:
    """The recipe's settings (or the defaults), changed by the options that were given.

    Raises:
        UsageError: bits and a format that contradict each other, or an override without a format.
        ConfigError: an unknown recipe or format, or impossible bits.
    """
    base = load_recipe(recipe) if recipe is not None else QuantizationSettings()
    changes: dict[str, Any] = {
        "global_format": _format("global", global_bits, global_format),
        "local_format": _format("local", local_bits, local_format),
        "kv_bits": kv_bits,
        "group_size": group_size,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if overrides:
        changes["overrides"] = {**base.overrides, **dict(_override(text) for text in overrides)}
    return dataclasses.replace(base, **changes)


def domain_weights_of(texts: Sequence[str]) -> dict[str, float] | None:
    """`DOMAIN=SHARE` options as a mapping; None if there are none.

    Raises:
        UsageError: something else, or a share that is not a number of zero or more.
    """
    weights = {}
    for text in texts:
        name, separator, share = text.rpartition("=")
        try:
            weights[name] = float(share)
        except ValueError:
            separator = ""
        if not separator or not name or not 0 <= weights[name] < float("inf"):
            raise UsageError(f"--domain-weight {text!r} is not DOMAIN=SHARE, for example binary=0.2")
    return weights or None


def pack(
    model: str,
    options: ImportOptions,
    target: Path | None,
    settings: QuantizationSettings,
    statistics_file: str | None,
    method: str,
    domain_weights: dict[str, float] | None,
    steps: ByteSteps,
    *,
    page: Path | None,
    export: str | None,
    overwrite: bool,
    json_output: bool,
) -> None:
    """Pack `model` into the folder `target`, or only show the plan when it is None; then show the table.

    Args:
        page: file for the HTML report.
        export: another tool's form of the folder, see `check_export`.
    """
    if domain_weights is not None and statistics_file is None and not steps.sequential_bytes:
        raise UsageError("--domain-weight weighs the domains of statistics; give --stats")
    if steps.sequential_bytes and (statistics_file is not None or method == "awq"):
        found = "--stats" if statistics_file is not None else "--method awq"
        raise UsageError(f"--sequential measures each layer's input itself; leave out {found}")
    statistics = None if statistics_file is None else load_statistics(Path(statistics_file))
    if not steps.sequential_bytes:
        check_method(method, statistics)
    elif method not in METHODS:
        raise ConfigError(f"unknown method {method!r}{did_you_mean(method, METHODS)}")
    if export is not None:
        _check_exportable(_network(model, options, check_values=False), settings)
    if target is None:
        network = _network(model, options, check_values=False)
        reports, kept = [planned(plan) for plan in plan_network(network, settings)], kept_bytes(network)
    elif steps.distill_steps or steps.sequential_bytes:
        network = _network(model, options)
        weights = sum(plan.rows * plan.columns for plan in plan_network(network, settings) if plan.format)
        with console.byte_progress("packing", weights * 2) as progress:

            def on_layer(report: LayerReport) -> None:
                progress.advance(report.bytes_before)

            if steps.sequential_bytes:
                result = quantize_sequentially(
                    _megabyte(network, "--sequential", model),
                    settings,
                    _batches(network, "--calibration-corpus", steps),
                    method=method,
                    domain_weights=domain_weights,
                    on_layer=on_layer,
                )
            else:
                result = quantize_network(
                    network, settings, statistics, method=method, domain_weights=domain_weights, on_layer=on_layer
                )
        reports, kept = result.layers, kept_bytes(network)
        if steps.distill_steps:
            result = _distilled(model, options, result, steps)
        parameters = dict(tree_flatten(result.network.parameters()))
        write_model(
            target, config_as_mapping(network.config), parameters, result.quantization, result.marlin,
            overwrite=overwrite,
        )  # fmt: skip
    else:
        checkpoint = read_checkpoint(locate_model(model), options, check_values=False)
        with console.byte_progress("packing", sum(array.nbytes for array in checkpoint.weights.values())) as progress:
            written = quantize_checkpoint(
                checkpoint,
                target,
                settings,
                statistics,
                where=model,
                method=method,
                domain_weights=domain_weights,
                overwrite=overwrite,
                on_bytes=progress.advance,
            )
        reports, kept = written.layers, written.kept_bytes
    if export is not None and target is not None:
        export_compressed_tensors(target)
    parts = by_part(reports)
    if json_output:
        document = {
            "model": model,
            "output": None if target is None else str(target),
            "settings": dataclasses.asdict(settings),
            "method": method,
            "parts": [dataclasses.asdict(part) for part in parts],
            "worst_layers": [_worst(layer) for layer in worst_layers(reports)],
            "kept_bytes": kept,
        }
        print(json.dumps(document))
    else:
        _show(model, target, parts, kept)
        _show_worst(worst_layers(reports))
    if page is not None and target is not None:
        from marlin_cli.commands.packing_report import write_report

        write_report(page, model, options, target, method, reports, kept, statistics)


def _batches(network: Network, option: str, steps: ByteSteps) -> list[Batch]:
    """The calibration bytes of sequential packing: batches of windows of one domain."""
    by_domain: dict[str, list[npt.NDArray[np.uint8]]] = {}
    window = _window_bytes(_megabyte(network, option, ""))
    for found in open_corpus(steps.sequential_corpora, sequence_bytes=window, seed=0, max_bytes=steps.sequential_bytes):
        if len(found.bytes) == window:
            by_domain.setdefault(found.domain, []).append(found.bytes)
    if not by_domain:
        raise UsageError(f"{option}: no window of {window} bytes in {', '.join(steps.sequential_corpora)}")
    return [
        (domain, np.stack(windows[start : start + WINDOWS_PER_STEP]))
        for domain, windows in sorted(by_domain.items())
        for start in range(0, len(windows), WINDOWS_PER_STEP)
    ]


def _window_bytes(network: MegaByte) -> int:
    """Whole patches of at most `WINDOW_BYTES`, within the network's context."""
    patch = network.config.patch_size
    return max(min(WINDOW_BYTES, network.config.max_bytes) // patch, 1) * patch


def _megabyte(network: Network, option: str, model: str) -> MegaByte:
    if not isinstance(network, MegaByte):
        raise UsageError(f"{option}: {model} holds a {network.config.model_type}; name a MegaByte")
    return network


def check_export(name: str | None) -> None:
    """Raise `UsageError` unless `name` is None or a form that other tools read."""
    if name is not None and name not in EXPORTS:
        raise UsageError(f"--export {name!r} is not known; known: {', '.join(EXPORTS)}")


def _check_exportable(network: Network, settings: QuantizationSettings) -> None:
    plans = plan_network(network, settings)
    other = [plan for plan in plans if plan.format is not None and plan.format.name != "nvfp4"]
    if other:
        format_name = other[0].format.name if other[0].format else ""
        raise UsageError(
            f"--export: compressed-tensors is written with nvfp4 alone, and {other[0].path!r} would be {format_name}"
            f" ({len(other)} layers in all); choose 4 or 16 bits for the {other[0].part} part"
        )


def _distilled(model: str, options: ImportOptions, result: Quantized, steps: ByteSteps) -> Quantized:
    """The packed network, tuned on the corpora; its tables say so. Sizes stay; the report is of before."""
    checkpoint = read_checkpoint(locate_model(model), options)
    original = build(checkpoint.config, checkpoint.weights, checkpoint.quantization, where=model, dtype=mx.float32)
    teacher, packed = (_megabyte(network, "--distill-steps", model) for network in (original, result.network))
    window = _window_bytes(teacher)
    corpus = open_corpus(steps.distill_corpora, sequence_bytes=window, seed=0, max_bytes=None)
    seen: list[float] = []
    with console.byte_progress("distilling", steps.distill_steps * WINDOWS_PER_STEP * window) as progress:

        def stepped(step: int, divergence: float) -> None:
            seen.append(divergence)
            progress.advance(WINDOWS_PER_STEP * window)

        batches = batches_of(corpus, window, WINDOWS_PER_STEP)
        tuned = distill(teacher, packed, batches, DistillSettings(steps=steps.distill_steps), on_step=stepped)
    if not seen:
        raise UsageError(
            f"--distill-corpus: fewer than {WINDOWS_PER_STEP} windows of {window} bytes in {', '.join(steps.distill_corpora)}"
        )
    console.note(f"KL divergence at the first step {seen[0]:.5f}, at the last {seen[-1]:.5f} bits per byte ({len(seen)} steps)")
    tuning = f"distilled, {len(seen)} steps of {WINDOWS_PER_STEP} x {window} bytes"
    marlin = {**result.marlin, "method": f"{result.marlin['method']}; {tuning}"}
    return dataclasses.replace(result, network=tuned, marlin=marlin)


def unpack(model: str, options: ImportOptions, target: Path | None, *, overwrite: bool, json_output: bool) -> None:
    """Write `model` with plain 16-bit weights into the folder `target`."""
    network = _network(model, options)
    plain = dequantize_network(network)
    if target is not None:
        parameters = dict(tree_flatten(plain.parameters()))
        write_model(target, config_as_mapping(plain.config), parameters, None, None, overwrite=overwrite)
    before, after = _bytes(network), _bytes(plain)
    if json_output:
        output = None if target is None else str(target)
        print(json.dumps({"model": model, "output": output, "bytes_before": before, "bytes_after": after}))
    else:
        console.note(f"unpacked {model}: {before:,} bytes before, {after:,} after" + (f", in {target}" if target else ""))


def _network(model: str, options: ImportOptions, *, check_values: bool = True) -> Network:
    """The network with its weights in the type that they are stored in."""
    checkpoint = read_checkpoint(locate_model(model), options, check_values=check_values)
    return build(checkpoint.config, checkpoint.weights, checkpoint.quantization, where=model)


def _bytes(network: Network) -> int:
    return sum(array.nbytes for _, array in tree_flatten(network.parameters()))


def _format(part: str, bits: int | None, name: str | None) -> str | None:
    if bits is None:
        return name
    if name is None:
        return format_from_bits(bits)
    if name in FORMATS and FORMATS[name].bits != bits:
        raise UsageError(f"--{part}-bits {bits} and --{part}-format {name} contradict each other; give one")
    return name


def _override(text: str) -> tuple[str, str]:
    pattern, separator, name = text.rpartition("=")
    if not separator or not pattern:
        raise UsageError(f"--override {text!r} is not REGEX=FORMAT, for example 'global.*down_proj=mxfp8'")
    return pattern, name


def _show(model: str, target: Path | None, parts: Sequence[PartReport], kept: int) -> None:
    rows = [
        [
            part.part,
            part.format,
            str(part.layers),
            f"{part.bits_per_weight:.2f}",
            f"{part.bytes_before:,}",
            f"{part.bytes_after:,}",
            _percent(part.relative_error),
            _percent(part.mlx_relative_error),
        ]
        for part in parts
    ]
    before = sum(part.bytes_before for part in parts) + kept
    after = sum(part.bytes_after for part in parts) + kept
    weights = sum(part.weights for part in parts)
    rows.append(["other", "16-bit", "", "", f"{kept:,}", f"{kept:,}", "", ""])
    rows.append(["all", "", "", f"{8 * (after - kept) / weights:.2f}", f"{before:,}", f"{after:,}", "", ""])
    columns = ["part", "format", "layers", "bits/weight", "bytes before", "bytes after", "error", "MLX's encoder"]
    title = f"{model} -> {target}" if target is not None else f"{model}: plan, nothing written"
    console.table(title, columns, rows)


def _worst(layer: LayerReport) -> dict[str, Any]:
    return {
        "path": layer.plan.path,
        "format": layer.plan.format.name if layer.plan.format else None,
        "output_error": layer.output_error,
        "mlx_output_error": layer.mlx_output_error,
    }


def _show_worst(layers: Sequence[LayerReport]) -> None:
    rows = [
        [each["path"], each["format"], f"{each['output_error']:.2e}", f"{each['mlx_output_error']:.2e}"]
        for each in map(_worst, layers)
    ]
    if rows:
        title = "largest squared error of the output over its square, on the calibration's inputs"
        console.table(title, ["layer", "format", "error", "MLX's encoder"], rows)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"
