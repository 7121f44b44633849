"""What each method loses on the demo ByT5 in each format, in two Markdown tables: KL divergence, and bits per target byte.

    python benchmarks/byt5_methods.py HELDOUT --results byt5.jsonl [--train CORPUS/train/multilingual] [--per-language 12]
        [--only alike,wo,encoder,auto] [--formats nvfp4,mxfp4,int4,mxfp8] [--methods rtn,gptq] [--distill-steps 400]
        [--device cpu] [--markdown docs/results.md] [--table-only]

Segments are those of `byt5_quality`, and so are the pairs that methods measure and tune on; errors are over segments. The
divergence is that of the packed model's predictions from the 16-bit model's, at every byte of the wanted answer and at its end,
over the answer's bytes: it needs no luck with the bytes that came, so the same segments resolve it far better than the bits.
What is measured already is kept in RESULTS, and statistics and the formats that `auto` chose beside it.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import yaml
from byt5_quality import DEMO, held_out_pairs
from calibrated import statistics_of
from paired_losses import KeptLosses, Key
from published import markers_of, write_between_markers
from quantization_quality import DISTILL, LABELS, SEQUENTIAL

from marlin_cli import ByT5Model
from marlin_cli.commands.calibration_bytes import CalibrationBytes
from marlin_cli.corpus import Example, Pair, open_pairs
from marlin_cli.engine.answer_scoring import log2_predictions
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.byt5_ids import ids_of_bytes
from marlin_cli.quantization.apply import dequantize_network, quantize_network
from marlin_cli.quantization.automatic import choose, measure_choices, recipe_text, with_choices
from marlin_cli.quantization.distill import distill, settings_for
from marlin_cli.quantization.methods.mse import mse
from marlin_cli.quantization.pair_batches import pair_batches
from marlin_cli.quantization.plan import QuantizationSettings
from marlin_cli.quantization.sequential import quantize_sequentially
from marlin_cli.statistics import Statistics

MARKERS = markers_of("byt5_methods")
FORMATS = "nvfp4", "mxfp4", "int4", "mxfp8"
EIGHT_BITS = "mxfp8"
MARKS = "", "¹", "²", "³"
DISTILLED = tuple(f"{name}{DISTILL}" for name in ("rtn", "sequential", "hadamard"))
METHODS = "rtn", "mse", "awq", "gptq", "awq+gptq", "sequential", "hadamard", *DISTILLED
# More than the demo's pairs have; and bytes that a choice of formats is measured on.
CALIBRATION_BYTES, CHOICE_BYTES = 1 << 20, 8 << 10


@dataclass(frozen=True)
class Part:
    """Rows of the table in which the same layers are in the named format, and the others in 8 bits.

    Attributes:
        title: where {budget} stands for the bits a weight of `auto`.
        eight_bits: of encoder, decoder, cross and wo.
        is_chosen: `auto` chooses, from the named formats on.
    """

    title: str
    formats: tuple[str, ...] = FORMATS[:3]
    methods: tuple[str, ...] = ("rtn", "gptq")
    eight_bits: tuple[str, ...] = ()
    is_chosen: bool = False


PARTS = {
    "alike": Part("all layers alike", FORMATS, METHODS),
    "encoder": Part("encoder as named, decoder and cross mxfp8", eight_bits=("decoder", "cross")),
    "wo": Part("`wo` mxfp8, the rest as named", methods=("rtn", "mse", "gptq", "awq+gptq"), eight_bits=("wo",)),
    "auto": Part("auto, {budget:g} bits a weight", ("nvfp4",), ("rtn", "mse", "gptq"), is_chosen=True),
}


@dataclass(frozen=True)
class Options:
    """What the rows have in common."""

    results: Path
    budget: float
    distill_steps: int
    device: str = "cpu"


class Packing:
    """The demo, its statistics when they are first asked for, and packed copies."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.model = ByT5Model.from_pretrained(DEMO, device=options.device, dtype=mx.float32)
        self._statistics: Statistics | None = None

    def unpacked(self, part: Part, name: str, method: str) -> ByT5Model:
        """A copy with its layers packed by the method, and unpacked again: the same numbers."""
        original, settings = self.model.network, self.settings(part, name)
        plain = method.removesuffix(DISTILL)
        if plain in SEQUENTIAL:
            batches = CalibrationBytes("calibration", pairs=(DEMO,)).up_to(original, CALIBRATION_BYTES)
            network = quantize_sequentially(original, settings, batches, method=SEQUENTIAL[plain]).network
        else:
            statistics = None if plain == "rtn" else self.statistics()
            network = quantize_network(original, settings, statistics, method=plain).network
        assert isinstance(network, ByT5)
        if method.endswith(DISTILL):
            batches = CalibrationBytes("distill", pairs=(DEMO,)).endless(original)
            network = distill(original, network, batches, settings_for(original, self.options.distill_steps))
        return ByT5Model(dequantize_network(network, mx.float32), self.model.device)

    def settings(self, part: Part, name: str) -> QuantizationSettings:
        """Formats of the layers."""
        stacks = ("encoder", "decoder", "cross")
        settings = QuantizationSettings(
            **{f"{layers}_format": EIGHT_BITS if layers in part.eight_bits else name for layers in stacks},
            wo_format=EIGHT_BITS if "wo" in part.eight_bits else name,
        )
        if not part.is_chosen:
            return settings
        budget = self.options.budget
        file = self._beside(f"auto-{budget:g}.yaml")
        if not file.exists():
            network = self.model.network
            every = CalibrationBytes("calibration", pairs=(DEMO,)).up_to(network, CHOICE_BYTES)
            batches = [batch for _, batch in every]
            choices = measure_choices(
                network, batches, lambda weight, plan: mse(weight, plan.format, plan.group_size), log2_predictions
            )
            chosen = choose(choices, budget)
            mixed = with_choices(settings, chosen)
            file.write_text(recipe_text(mixed, choices, chosen, f"{budget:g} bits a weight: mse, {CHOICE_BYTES} bytes"))
        return QuantizationSettings(**yaml.safe_load(file.read_text(encoding="utf-8")))

    def statistics(self) -> Statistics:
        """Over the demo's pairs, with x^T x."""
        if self._statistics is None:
            corpus = open_pairs([DEMO], sequence_bytes=self.model.config.max_bytes)
            self._statistics = statistics_of(self.model.network, corpus, self._beside("safetensors"))
        return self._statistics

    def _beside(self, ending: str) -> Path:
        return self.options.results.with_name(f"{self.options.results.stem}.{ending}")


class Scoring:
    """Bits of held-out answers, and how far a model's predictions lie from those of the original."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        # The longest first, so that little of a pass is filler.
        self.order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index].source) - len(pairs[index].target))
        self.pairs = [pairs[index] for index in self.order]
        self._expected: list[np.ndarray] = []

    def of_original(self, model: ByT5Model) -> None:
        """Take the predictions that others are held against."""
        self._expected = self._predictions(model)

    def score(self, model: ByT5Model) -> dict[str, np.ndarray]:
        """`bits` and `divergence` in bits of each pair, its answer's end included: [pairs], in the order that they came in."""
        found = self._predictions(model)
        bits, divergences = np.empty(len(self.pairs)), np.empty(len(self.pairs))
        for place, pair, expected, predicted in zip(self.order, self.pairs, self._expected, found, strict=True):
            wanted = [*ids_of_bytes(pair.target), model.config.end_id]
            bits[place] = -predicted[np.arange(len(wanted)), wanted].sum(dtype=np.float64)
            divergences[place] = (np.exp2(expected) * (expected - predicted)).sum(dtype=np.float64)
        return {"bits": bits, "divergence": divergences}

    def _predictions(self, model: ByT5Model) -> list[np.ndarray]:
        """Base-2 logarithms of the probabilities [predictions, vocab] for each pair."""
        examples = [Example("", pair.source, pair.target, 0, 0) for pair in self.pairs]
        found: list[np.ndarray] = []
        for batch in pair_batches(examples, model.config):
            predicted = np.array(log2_predictions(model.network, batch).astype(mx.float32))
            found += np.split(predicted, np.cumsum(batch.rows)[:-1])
        return found


def key_of(options: Options, setting: Key, title: str, name: str, method: str) -> Key:
    """A row's key in the results."""
    kind = f"{title} {options.budget:g}" if PARTS[title].is_chosen else title
    if method.endswith(DISTILL):
        method += f" {options.distill_steps}"
    return *setting, kind, name, method


def label_of(options: Options, method: str) -> str:
    """A method in the table."""
    plain = method.removesuffix(DISTILL)
    label = LABELS.get(plain, plain)
    return label if plain == method else f"{label}, {options.distill_steps} steps of distillation"


def tables(options: Options, losses: KeptLosses, setting: Key) -> str:
    """All rows there are of these segments, in Markdown; each with its share of MLX's own in the same format."""
    base = (*setting, "16-bit")
    among = dict.fromkeys(losses.machines[key] for key in losses.bits if key[: len(setting)] == setting)
    marks = dict(zip(among, MARKS, strict=False))
    header = [f"| layers | method | {' | '.join(FORMATS)} |", "|---|---|" + "---|" * len(FORMATS)]
    divergences, bits = list(header), list(header)
    for title, part in PARTS.items():
        for method in part.methods:
            keys = {name: key_of(options, setting, title, name, method) for name in FORMATS}
            own = {name: key_of(options, setting, "alike", name, "rtn") for name in FORMATS}
            if not any(key in losses.bits for key in keys.values()):
                continue
            first = f"| {part.title.format(budget=options.budget)} | {label_of(options, method)}"
            cells = [losses.divergence_cell(keys[name], own[name], marks) for name in FORMATS]
            divergences.append(f"{first} | {' | '.join(cells)} |")
            cells = [losses.cell(keys[name], base, own[name], marks) for name in FORMATS]
            bits.append(f"{first} | {' | '.join(cells)} |")
    head = (
        f"`benchmarks/byt5_methods.py`, {DEMO}, {len(losses.sizes):,} held-out segments of {losses.sizes.sum():,.0f} bytes,"
        f" {losses.bits_per_byte(base):.5f} bits per target byte in 16 bits."
    )
    measured = "; ".join(f"{mark} {machine}".strip() for machine, mark in marks.items())
    both = ["KL divergence from 16 bits:", "", *divergences, "", "Bits more than in 16 bits:", "", *bits]
    return "\n".join([head, f"Measured on {measured}. Per target byte.", "", *both]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--per-language", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="auto, metal, cuda or cpu; the numbers are float32's on each")
    parser.add_argument("--only", type=_names(PARTS), default=list(PARTS), help="parts of the table, with commas")
    parser.add_argument("--formats", type=_names(FORMATS), default=list(FORMATS))
    parser.add_argument("--methods", type=_names(METHODS), default=list(METHODS))
    parser.add_argument("--target-bpw", type=float, default=5.0, help="bits a weight of `auto`")
    parser.add_argument("--distill-steps", type=int, default=400)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--table-only", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    options = Options(arguments.results, arguments.target_bpw, arguments.distill_steps, arguments.device)
    pairs = held_out_pairs(arguments.heldout, arguments.train, arguments.per_language, arguments.seed)
    scoring = Scoring(pairs)
    losses = KeptLosses(options.results, np.array([float(len(pair.target)) for pair in pairs]), scoring.score)
    setting = (DEMO, arguments.per_language, arguments.seed, len(pairs))
    if not arguments.table_only:
        packing, base = Packing(options), (*setting, "16-bit")
        scoring.of_original(packing.model)
        losses.measure(base, lambda: packing.model)
        wanted = [
            (title, name, method)
            for title in arguments.only
            for method in PARTS[title].methods
            for name in PARTS[title].formats
            if method in arguments.methods and name in arguments.formats
        ]
        for title, name, method in wanted:
            key = key_of(options, setting, title, name, method)
            losses.measure(key, lambda t=title, n=name, m=method: packing.unpacked(PARTS[t], n, m))
            (value, doubt), (loss, error) = losses.divergence(key), losses.difference(key, base)
            print(f"{title:8} {name:6} {method:18} KL {value:.6f} ± {doubt:.6f}  bits {loss:+.6f} ± {error:.6f}", flush=True)
    text = tables(options, losses, setting)
    if arguments.markdown is not None:
        write_between_markers(arguments.markdown, text, MARKERS)
    print(text)


def _names(known: Sequence[str] | dict[str, Part]):
    """A type of option: names with commas, of those that are known."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}; known: {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    main()
