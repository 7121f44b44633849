"""Bits per byte that each method loses in each format, in one Markdown table; what is measured already is kept.

    python benchmarks/quantization_quality.py --heldout FOLDER --results quality.jsonl [--markdown docs/results.md]
        [--only alike,mixed,auto,outliers] [--formats nvfp4,mxfp4,int4,mxfp8] [--methods rtn,gptq,sequential+distill]
        [--model megabyte-demo] [--device cpu] [--corpus CORPUS ..] [--table-only]

FOLDER (or MARLIN_HELDOUT) holds a folder a domain; windows are spread evenly over all its bytes, as many a domain, and errors
are of paired windows. Statistics are measured on other bytes and kept beside RESULTS, and so are the formats that `auto` chose.
`sequential` is gptq layer after layer, `hadamard` gptq+hadamard so, `+distill` tunes what came out. `outliers` is a model
that computes the same with channels up to 100 times larger than others (`outlier_model`). Hours on 2 cores; --only, --formats
and --methods take a share, and the table always has all that RESULTS holds.
"""

import argparse
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import yaml
from calibrated import calibration_batches, corpus_of, statistics_of
from outlier_model import with_outliers
from paired_losses import WINDOW_BYTES, Key, PairedLosses, spread_windows
from published import markers_of, write_between_markers

from marlin_cli import load
from marlin_cli.corpus import open_corpus
from marlin_cli.engine.scoring import log2_predictions
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.quantization import windows
from marlin_cli.quantization.apply import dequantize_network, plan_network, quantize_network
from marlin_cli.quantization.automatic import choose, measure_choices, recipe_text, with_choices
from marlin_cli.quantization.distill import DistillSettings, distill
from marlin_cli.quantization.methods.mse import mse
from marlin_cli.quantization.plan import QuantizationSettings
from marlin_cli.quantization.scaled import rescaled
from marlin_cli.quantization.sequential import quantize_sequentially
from marlin_cli.statistics import Statistics

MARKERS = markers_of("quantization_quality")
FORMATS = "nvfp4", "mxfp4", "int4", "mxfp8"
FOUR_BITS = FORMATS[:3]
BASE = "16-bit"
MARKS = "", "¹", "²", "³"

# Methods that pack layer after layer, by the name of the method that packs each.
SEQUENTIAL = {"sequential": "gptq", "hadamard": "gptq+hadamard", "awq+sequential": "gptq"}
LABELS = {
    "rtn": "rtn (MLX's own)",
    "sequential": "gptq, sequential",
    "hadamard": "gptq+hadamard, sequential",
    "awq+sequential": "awq, then gptq, sequential",
}
DISTILL = "+distill"

# Bytes that a choice of formats is measured on.
CHOICE_BYTES = 32 << 10


@dataclass(frozen=True)
class Part:
    """Rows of the table that are of one model and one way to give formats to its layers.

    Attributes:
        title: where {budget} stands for the bits a weight of `auto`.
        windows: of each domain.
        local: the format of the local stage where it is not that of the others.
        is_chosen: `formats` are the smallest that `auto` starts from, and it chooses.
    """

    title: str
    formats: tuple[str, ...]
    methods: tuple[str, ...]
    windows: int = 32
    calibration_bytes: int = 1 << 20
    local: str | None = None
    has_outliers: bool = False
    is_chosen: bool = False


DISTILLED = tuple(f"{name}{DISTILL}" for name in ("rtn", "sequential", "hadamard"))
ALIKE = "rtn", "mse", "awq", "gptq", "awq+gptq", "sequential", "hadamard", *DISTILLED
PARTS = {
    "alike": Part("all layers alike", FORMATS, ALIKE),
    "mixed": Part("global as named, local mxfp8", FOUR_BITS, ("rtn", "gptq", "sequential"), local="mxfp8"),
    "auto": Part("auto, {budget:g} bits a weight", ("nvfp4",), ("rtn", "mse", "gptq"), is_chosen=True),
    "outliers": Part(
        "channels up to 100 times larger",
        FOUR_BITS,
        ("rtn", "mse", "awq", "gptq", "awq+gptq", *SEQUENTIAL),
        windows=16,
        calibration_bytes=512 << 10,
        has_outliers=True,
    ),
}


@dataclass(frozen=True)
class Options:
    """What the rows have in common."""

    model: str
    device: str
    corpora: Sequence[str]
    results: Path
    budget: float
    sequential_bytes: int
    distill_steps: int


def network_of(options: Options) -> MegaByte:
    """The model of the rows in float32, on their device."""
    network = load(options.model, device=options.device).network
    if not isinstance(network, MegaByte):
        raise SystemExit(f"{options.model} is no MegaByte; name one with --model")
    network.set_dtype(mx.float32)
    return network


def key_of(options: Options, part: Part, name: str, method: str) -> Key:
    """A row's key in the results; a share of them is (model, windows, "16-bit")."""
    kind = "outliers" if part.has_outliers else f"auto {options.budget:g}" if part.is_chosen else "plain"
    if method.endswith(DISTILL):
        method += f" {options.distill_steps}"
    return options.model, kind, part.windows, name, part.local or name, method


def base_of(options: Options, part: Part) -> Key:
    """The key of the model in 16 bits on the same windows."""
    return options.model, part.windows, BASE


class Packing:
    """The model of a part, its statistics, and its packed copies; made when they are first asked for."""

    def __init__(self, options: Options, name: str) -> None:
        self.options, self.name, self.part = options, name, PARTS[name]
        network = network_of(options)
        self.network = with_outliers(network) if self.part.has_outliers else network
        self._statistics: Statistics | None = None

    def unpacked(self, name: str, method: str) -> MegaByte:
        """A copy with its layers packed by the method in the format, and unpacked again in float32."""
        packed = self._packed(self.settings(name), method.removesuffix(DISTILL))
        if method.endswith(DISTILL):
            corpus = open_corpus(self.options.corpora, sequence_bytes=windows.WINDOW_BYTES, seed=1, max_bytes=None)
            batches = windows.batches_of(corpus, windows.WINDOW_BYTES)
            packed = distill(self.network, packed, batches, DistillSettings(steps=self.options.distill_steps))
        return dequantize_network(packed, mx.float32)

    def settings(self, name: str) -> QuantizationSettings:
        """Formats of the layers."""
        if not self.part.is_chosen:
            return QuantizationSettings(name, self.part.local or name)
        budget = self.options.budget
        file = self._beside(f"auto-{budget:g}.yaml")
        if not file.exists():
            corpus = open_corpus(self.options.corpora, sequence_bytes=windows.WINDOW_BYTES, seed=0, max_bytes=CHOICE_BYTES)
            some = np.stack([window for _, window in windows.whole_windows(corpus, windows.WINDOW_BYTES)])
            choices = measure_choices(
                self.network, [some], lambda weight, plan: mse(weight, plan.format, plan.group_size), log2_predictions
            )
            chosen = choose(choices, budget)
            mixed = with_choices(QuantizationSettings(name, name), chosen)
            file.write_text(recipe_text(mixed, choices, chosen, f"{budget:g} bits a weight: mse, {some.size} bytes"))
        return QuantizationSettings(**yaml.safe_load(file.read_text(encoding="utf-8")))

    def _packed(self, settings: QuantizationSettings, method: str) -> MegaByte:
        if method not in SEQUENTIAL:
            statistics = None if method == "rtn" else self.statistics()
            result = quantize_network(self.network, settings, statistics, method=method)
        else:
            ready = self.network
            if method.startswith("awq"):
                ready, _ = rescaled(ready, plan_network(ready, settings), self.statistics())
            batches = calibration_batches(self.options.corpora, self.options.sequential_bytes)
            result = quantize_sequentially(ready, settings, batches, method=SEQUENTIAL[method])
        assert isinstance(result.network, MegaByte)
        return result.network

    def statistics(self) -> Statistics:
        """Of the model, with x^T x."""
        if self._statistics is None:
            kind = "outliers" if self.part.has_outliers else "plain"
            corpus = corpus_of(self.options.corpora, self.part.calibration_bytes)
            self._statistics = statistics_of(self.network, corpus, self._beside(f"{kind}.safetensors"))
        return self._statistics

    def _beside(self, ending: str) -> Path:
        return self.options.results.with_name(f"{self.options.results.stem}.{ending}")


def measure(options: Options, name: str, losses: PairedLosses, formats: Sequence[str], methods: Callable[[str], bool]) -> None:
    """The rows of a part that the results lack, and a line for each that was asked for."""
    part, packing = PARTS[name], Packing(options, name)
    base = base_of(options, part)
    bits = losses.measure(base, lambda: network_of(options))
    print(f"{name}: {len(bits)} windows of {WINDOW_BYTES} bytes, {bits.mean():.5f} bits per byte in 16 bits", flush=True)
    for format in [format for format in part.formats if format in formats]:
        for method in filter(methods, part.methods):
            key = key_of(options, part, format, method)
            losses.measure(key, lambda format=format, method=method: packing.unpacked(format, method))
            print(losses.line(key, base), flush=True)


def table(options: Options, losses: dict[int, PairedLosses]) -> str:
    """All rows there are, in Markdown; each loss with its share of MLX's own in the same format and on the same windows."""
    rows: list[tuple[str, str, list[Key]]] = []
    sizes, machines = [], Counter[str]()
    for part in PARTS.values():
        found, base = losses[part.windows], base_of(options, part)
        if base not in found.bits:
            continue
        sizes.append(f"{len(found.bits[base])} windows, {found.bits_per_byte(base):.3f} bits per byte in 16 bits")
        for method in part.methods:
            keys = [key_of(options, part, name, method) if name in part.formats else () for name in FORMATS]
            machines.update(found.machines[key] for key in keys if key in found.bits)
            plain = method.removesuffix(DISTILL)
            label = LABELS.get(plain, plain)
            if plain != method:
                label += f", {options.distill_steps} steps of distillation"
            if any(key in found.bits for key in keys):
                rows.append((part.title.format(budget=options.budget), label, keys))
    marks = {machine: MARKS[number] for number, (machine, _) in enumerate(machines.most_common())}
    lines = [f"| layers | method | {' | '.join(FORMATS)} |", "|---|---|" + "---|" * len(FORMATS)]
    for title, label, keys in rows:
        lines.append(f"| {title} | {label} | {' | '.join(_cell(losses, key, marks) for key in keys)} |")
    measured = "; ".join(f"{mark} {machine}".strip() for machine, mark in marks.items())
    head = f"`benchmarks/quantization_quality.py`, {options.model}, held-out bytes: {'; '.join(dict.fromkeys(sizes))}."
    return "\n".join([head, f"Measured on {measured}.", "", *lines]) + "\n"


def _cell(losses: dict[int, PairedLosses], key: Key, marks: dict[str, str]) -> str:
    """What a row loses, and its share of what MLX's own loses with all layers in that format."""
    if not key:
        return ""
    model, kind, count, name = key[:4]
    own = (model, "outliers" if kind == "outliers" else "plain", count, name, name, "rtn")
    return losses[int(str(count))].cell(key, (model, count, BASE), own, marks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heldout", type=Path, default=os.environ.get("MARLIN_HELDOUT"))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--model", default="megabyte-demo")
    parser.add_argument("--device", default="cpu", help="auto, metal, cuda or cpu; the numbers are float32's on each")
    parser.add_argument("--only", default=",".join(PARTS), help="parts of the table, with commas")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--methods", help="with commas; default: each part's")
    parser.add_argument("--corpus", action="append", help="calibration bytes, as calibrate's --corpus; default: default")
    parser.add_argument("--target-bpw", type=float, default=5.0, help="bits a weight of `auto`")
    parser.add_argument("--sequential-bytes", type=int, default=512 << 10)
    parser.add_argument("--distill-steps", type=int, default=400)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--table-only", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if arguments.heldout is None:
        parser.error("--heldout is missing; name a folder that holds a folder a domain, or set MARLIN_HELDOUT")
    names, formats = arguments.only.split(","), arguments.formats.split(",")
    methods = None if arguments.methods is None else arguments.methods.split(",")
    known = {method for part in PARTS.values() for method in part.methods}
    for given, allowed in ((names, PARTS), (formats, FORMATS), (methods or [], known)):
        if unknown := [name for name in given if name not in allowed]:
            parser.error(f"unknown {unknown[0]!r}; known: {', '.join(sorted(allowed))}")
    options = Options(
        arguments.model, arguments.device, arguments.corpus or ["default"], arguments.results, arguments.target_bpw,
        arguments.sequential_bytes, arguments.distill_steps,
    )  # fmt: skip
    counts = sorted({part.windows for part in PARTS.values()})
    losses = {count: PairedLosses(arguments.results, spread_windows(arguments.heldout, count)) for count in counts}
    if not arguments.table_only:
        for name in names:
            measure(options, name, losses[PARTS[name].windows], formats, lambda method: methods is None or method in methods)
    text = table(options, losses)
    if arguments.markdown is not None:
        write_between_markers(arguments.markdown, text, MARKERS)
    print(text)


if __name__ == "__main__":
    main()
