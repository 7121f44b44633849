"""What `marlin quantize` does once its options are read: settings, one library call, one table."""

import dataclasses
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from marlin_cli import console
from marlin_cli.checkpoints import ImportOptions, fingerprint, lasting, read_checkpoint
from marlin_cli.checkpoints.export import export_compressed_tensors
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.checkpoints.writer import write_model
from marlin_cli.commands.calibration_bytes import CalibrationBytes
from marlin_cli.commands.options import about
from marlin_cli.commands.quantization_settings import check_exportable
from marlin_cli.commands.quantization_tables import document_of, show
from marlin_cli.config import did_you_mean
from marlin_cli.errors import AssumptionWarning, ConfigError, UsageError
from marlin_cli.models import Network, architecture_of, build, config_as_mapping, matrices_of
from marlin_cli.quantization.apply import (
    Quantized,
    check_method,
    dequantize_network,
    kept_bytes,
    plan_network,
    quantize_network,
)
from marlin_cli.quantization.card import CARD, card_of, carried_files, of_compressed_tensors, plain_card_of
from marlin_cli.quantization.distill import distill, settings_for
from marlin_cli.quantization.feeds import feed_of
from marlin_cli.quantization.layers import LayerReport, planned
from marlin_cli.quantization.methods import METHODS, NEED_HESSIANS, RESCALING
from marlin_cli.quantization.plan import QuantizationSettings
from marlin_cli.quantization.sequential import quantize_sequentially
from marlin_cli.quantization.stream import quantize_checkpoint
from marlin_cli.statistics import Statistics, load_statistics
from marlin_cli.writing import scratch_folder


@dataclass(frozen=True)
class ByteSteps:
    """What of `marlin quantize` runs calibration bytes through the model."""

    sequential_bytes: int = 0  # 0: layers are packed from statistics, each by itself
    sequential: CalibrationBytes = CalibrationBytes("calibration")
    distill_steps: int = 0
    distill: CalibrationBytes = CalibrationBytes("distill")


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
    measure: bool = False,
) -> None:
    """Pack `model` into the folder `target`, or only show the plan when it is None; then show the table.

    Args:
        page: file for the HTML report.
        export: another tool's form of the folder, see `check_export`.
        measure: compare with the original, and say in the card what packing cost.
    """
    if steps.sequential_bytes and method in RESCALING:
        raise UsageError(f"--sequential measures each layer's input itself; leave out --method {method}")
    statistics = None if statistics_file is None else load_statistics(Path(statistics_file))
    if not steps.sequential_bytes:
        check_method(method, statistics)
    elif method not in METHODS:
        raise ConfigError(f"unknown method {method!r}{did_you_mean(method, METHODS)}")
    if measure and target is not None:
        from marlin_cli.commands.measured_card import check_measurable

        check_measurable(model, _network(model, options, check_values=False))
    if export is not None:
        check_exportable(plan_network(_network(model, options, check_values=False), settings))
    if target is None:
        network = _network(model, options, check_values=False)
        layers, kept = matrices_of(network), kept_bytes(network)
        reports = [planned(plan, layers[plan.path].weight) for plan in plan_network(network, settings)]
    else:
        packing = _Packing(model, options, settings, statistics, method, domain_weights, steps)
        if export is None:
            reports, kept = packing.write(target, overwrite=overwrite)
        else:
            # Under the target's name stands the other form or nothing, whenever the run is cut short.
            with scratch_folder(target) as scratch:
                packed = scratch / target.name
                reports, kept = packing.write(packed, overwrite=False)
                card = of_compressed_tensors((packed / CARD).read_text(encoding="utf-8"))
                beside = {**carried_files(packed), CARD: card.encode()}
                export_compressed_tensors(packed, target, overwrite=overwrite, beside=beside)
    if statistics is not None and statistics.model != fingerprint(locate_model(model), options):
        warnings.warn(
            f"{statistics_file}: measured on other weights than those of {model}, or with other --import options; its layers"
            " have these names too, and that is right where one was tuned from the other",
            AssumptionWarning,
            stacklevel=2,
        )
    if statistics is not None and method in NEED_HESSIANS and (few := _too_few_rows(statistics, reports)):
        console.note(f"marlin: {statistics_file}: {few}; {method} fits noise then: calibrate on more bytes (--max-bytes)")
    if json_output:
        print(json.dumps(document_of(model, target, settings, method, reports, kept), allow_nan=False))
    else:
        show(model, target, reports, kept)
    if measure and target is not None:
        from marlin_cli.commands.measured_card import write_measured_card

        write_measured_card(model, options, target)
    if page is not None and target is not None:
        from marlin_cli.commands.packing_report import write_report

        write_report(page, model, options, target, method, reports, kept, statistics, domain_weights)


# Rows of a layer's input for each of its channels, below which x^T x is mostly chance.
LEAST_ROWS_A_CHANNEL = 4


def _too_few_rows(statistics: Statistics, reports: Sequence[LayerReport]) -> str:
    """What is said where the calibration was too short for its Hessians; empty where it was not."""
    packed = [report.plan for report in reports if report.plan.format is not None and report.plan.part != "hash"]
    short = [plan for plan in packed if statistics.rows(plan.path) < LEAST_ROWS_A_CHANNEL * plan.columns]
    if not short:
        return ""
    worst = min(short, key=lambda plan: statistics.rows(plan.path) / plan.columns)
    return (
        f"{len(short)} of {len(packed)} layers were measured on fewer than {LEAST_ROWS_A_CHANNEL} rows a channel"
        f" ({worst.path}: {statistics.rows(worst.path):,} rows, {worst.columns:,} channels)"
    )


@dataclass(frozen=True)
class _Packing:
    """A model, and how it is to be packed."""

    model: str
    options: ImportOptions
    settings: QuantizationSettings
    statistics: Statistics | None
    method: str
    domain_weights: dict[str, float] | None
    steps: ByteSteps

    def write(self, target: Path, *, overwrite: bool) -> tuple[list[LayerReport], dict[str, int]]:
        """Pack into the folder `target`; a report by layer, and the bytes by type of all else."""
        if self.steps.distill_steps or self.steps.sequential_bytes:
            return self._write_whole(target, overwrite=overwrite)
        checkpoint = read_checkpoint(locate_model(self.model), self.options, check_values=False)
        with console.byte_progress("packing", sum(array.nbytes for array in checkpoint.weights.values())) as progress:
            written = quantize_checkpoint(
                checkpoint,
                target,
                self.settings,
                self.statistics,
                where=self.model,
                method=self.method,
                domain_weights=self.domain_weights,
                overwrite=overwrite,
                on_bytes=progress.advance,
                with_card=True,
            )
        return written.layers, written.kept_bytes

    def _write_whole(self, target: Path, *, overwrite: bool) -> tuple[list[LayerReport], dict[str, int]]:
        """As `write`, by the methods that run bytes through the model, which is in memory."""
        checkpoint = read_checkpoint(locate_model(self.model), self.options)
        network = build(checkpoint.config, checkpoint.weights, checkpoint.quantization, where=self.model)
        tuning = _tuning_batches(network, self.steps) if self.steps.distill_steps else None
        layers = matrices_of(network)
        packed = sum(layers[plan.path].weight.nbytes for plan in plan_network(network, self.settings) if plan.format)
        with console.byte_progress("packing", packed) as progress:
            result = self._quantized(network, lambda report: progress.advance(report.bytes_before))
        reports = result.layers
        if tuning is not None:
            result = _distilled(self.model, self.options, result, tuning, self.steps.distill_steps)
        parameters = dict(tree_flatten(result.network.parameters()))
        marlin = {**lasting(checkpoint.marlin), **result.marlin}
        config, kept = config_as_mapping(network.config), kept_bytes(network)
        card = card_of(self.model, checkpoint.path, config, marlin, reports, kept)
        beside = {**carried_files(checkpoint.path), CARD: card.encode()}
        write_model(target, config, parameters, result.quantization, marlin, overwrite=overwrite, beside=beside)
        return reports, kept

    def _quantized(self, network: Network, on_layer: Callable[[LayerReport], None]) -> Quantized:
        how: dict[str, Any] = {"method": self.method, "domain_weights": self.domain_weights, "on_layer": on_layer}
        if not self.steps.sequential_bytes:
            return quantize_network(network, self.settings, self.statistics, **how)
        batches = self.steps.sequential.up_to(network, self.steps.sequential_bytes)
        return quantize_sequentially(network, self.settings, batches, **how)


def _tuning_batches(network: Network, steps: ByteSteps) -> Iterator[Any]:
    """The batches of distillation, the first of which is there: what cannot be tuned is refused before it is packed."""
    batches = steps.distill.endless(network)
    first = next(batches, None)
    if first is None:
        needed = feed_of(network).batch_text(network)
        raise UsageError(f"--distill-corpus: less than one batch ({needed}) in {steps.distill.names}")
    architecture_of(network).logits(network, first)  # of a network that predicts nothing; what it gives is not computed
    return itertools.chain([first], batches)


def _distilled(model: str, options: ImportOptions, result: Quantized, batches: Iterator[Any], steps: int) -> Quantized:
    """The packed network, tuned on batches; its tables say so. Sizes stay; the report is of before."""
    checkpoint = read_checkpoint(locate_model(model), options)
    original = build(checkpoint.config, checkpoint.weights, checkpoint.quantization, where=model, dtype=mx.float32)
    seen: list[float] = []
    feed = feed_of(original)
    batch_bytes = feed.batch_bytes(original)
    with console.byte_progress("distilling", steps * batch_bytes) as progress:

        def stepped(step: int, divergence: float) -> None:
            seen.append(divergence)
            progress.advance(batch_bytes)

        tuned = distill(original, result.network, batches, settings_for(original, steps), on_step=stepped)
    console.note(
        f"KL divergence at the first step {seen[0]:.5f}, at the last {seen[-1]:.5f} bits a prediction ({len(seen)} steps)"
    )
    tuning = f"distilled, {len(seen)} steps of {feed.batch_text(original)}"
    marlin = {**result.marlin, "method": f"{result.marlin['method']}; {tuning}"}
    return dataclasses.replace(result, network=tuned, marlin=marlin)


def unpack(model: str, options: ImportOptions, target: Path | None, *, overwrite: bool, json_output: bool) -> None:
    """Write `model` with plain 16-bit weights into the folder `target`."""
    checkpoint = read_checkpoint(locate_model(model), options)
    network = build(checkpoint.config, checkpoint.weights, checkpoint.quantization, where=model)
    with about(f"{model}:"):
        plain = dequantize_network(network)
    if target is not None:
        parameters = dict(tree_flatten(plain.parameters()))
        marlin = lasting(checkpoint.marlin) or None
        config = config_as_mapping(plain.config)
        card = plain_card_of(config, marlin, _bytes(plain), model, checkpoint.path)
        beside = {**carried_files(checkpoint.path), CARD: card.encode()}
        write_model(target, config, parameters, None, marlin, overwrite=overwrite, beside=beside)
    before, after = _bytes(network), _bytes(plain)
    if json_output:
        output = None if target is None else str(target)
        print(json.dumps({"model": model, "output": output, "bytes_before": before, "bytes_after": after}, allow_nan=False))
    else:
        console.note(f"unpacked {model}: {before:,} bytes before, {after:,} after" + (f", in {target}" if target else ""))


def _network(model: str, options: ImportOptions, *, check_values: bool = True) -> Network:
    """The network with its weights in the type that they are stored in."""
    checkpoint = read_checkpoint(locate_model(model), options, check_values=check_values)
    return build(checkpoint.config, checkpoint.weights, checkpoint.quantization, where=model)


def _bytes(network: Network) -> int:
    return sum(array.nbytes for _, array in tree_flatten(network.parameters()))
