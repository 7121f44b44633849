"""Bits per target byte that each method loses on the demo ByT5 in each format, in one Markdown table; what is measured is kept.

    python benchmarks/byt5_methods.py HELDOUT --results byt5.jsonl [--train CORPUS/train/multilingual] [--per-language 12]
        [--only alike,wo,encoder] [--formats nvfp4,mxfp4,int4,mxfp8] [--methods rtn,gptq] [--markdown README.md] [--table-only]

Segments and statistics are those of `byt5_quality`; errors are of paired segments. Sequential packing, gptq+hadamard, `auto`
and distillation take a MegaByte alone: they run its stages, or rotate its RMS norms, or score windows of one stream.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from byt5_quality import DEMO, held_out_pairs, statistics_of
from paired_losses import KeptLosses, Key
from published import markers_of, write_between_markers

from marlin_cli import ByT5Model
from marlin_cli.bench.pairs import bits_of_pairs
from marlin_cli.quantization.apply import dequantize_network, quantize_network
from marlin_cli.quantization.plan import QuantizationSettings
from marlin_cli.statistics import Statistics

MARKERS = markers_of("byt5_methods")
FORMATS = "nvfp4", "mxfp4", "int4", "mxfp8"
METHODS = "rtn", "gptq", "mse", "awq", "awq+gptq"
EIGHT_BITS = "mxfp8"
MARKS = "", "¹", "²", "³"


@dataclass(frozen=True)
class Part:
    """Rows of the table in which the same layers are in the named format, and the others in 8 bits."""

    title: str
    eight_bits: tuple[str, ...] = ()  # of encoder, decoder, cross and wo
    methods: tuple[str, ...] = METHODS


PARTS = {
    "alike": Part("all layers alike"),
    "encoder": Part("encoder as named, decoder and cross mxfp8", ("decoder", "cross"), ("rtn", "gptq")),
    "wo": Part("`wo` mxfp8, the rest as named", ("wo",), ("rtn", "gptq", "mse", "awq+gptq")),
}


class Packing:
    """The demo, its statistics when they are first asked for, and packed copies."""

    def __init__(self) -> None:
        self.model = ByT5Model.from_pretrained(DEMO, device="cpu")
        self._statistics: Statistics | None = None

    def unpacked(self, part: Part, name: str, method: str) -> ByT5Model:
        """A copy with its layers packed by the method, and unpacked again: the same numbers."""
        settings = QuantizationSettings(
            **{
                f"{layers}_format": EIGHT_BITS if layers in part.eight_bits else name
                for layers in ("encoder", "decoder", "cross")
            },
            wo_format=EIGHT_BITS if "wo" in part.eight_bits else name,
        )
        if method != "rtn" and self._statistics is None:
            self._statistics = statistics_of(self.model, "pairs")
        statistics = None if method == "rtn" else self._statistics
        made = quantize_network(self.model.network, settings, statistics, method=method)
        return ByT5Model(dequantize_network(made.network, self.model.device.dtype), self.model.device)


def table(losses: KeptLosses, setting: Key) -> str:
    """All rows there are of these segments, in Markdown; each loss with its share of MLX's own in the same format."""
    base = (*setting, "16-bit")
    among = dict.fromkeys(losses.machines[key] for key in losses.bits if key[: len(setting)] == setting)
    marks = dict(zip(among, MARKS, strict=False))
    lines = [f"| layers | method | {' | '.join(FORMATS)} |", "|---|---|" + "---|" * len(FORMATS)]
    for title, part in PARTS.items():
        for method in part.methods:
            cells = [
                losses.cell((*setting, title, name, method), base, (*setting, "alike", name, "rtn"), marks) for name in FORMATS
            ]
            if any(cells):
                label = "rtn (MLX's own)" if method == "rtn" else method
                lines.append(f"| {part.title} | {label} | {' | '.join(cells)} |")
    head = (
        f"`benchmarks/byt5_methods.py`, {DEMO}, {len(losses.sizes):,} held-out segments of {losses.sizes.sum():,.0f} bytes,"
        f" {losses.bits_per_byte(base):.5f} bits per target byte in 16 bits."
    )
    measured = "; ".join(f"{mark} {machine}".strip() for machine, mark in marks.items())
    return "\n".join([head, f"Measured on {measured}.", "", *lines]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--per-language", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=_names(PARTS), default=list(PARTS), help="parts of the table, with commas")
    parser.add_argument("--formats", type=_names(FORMATS), default=list(FORMATS))
    parser.add_argument("--methods", type=_names(METHODS), default=list(METHODS))
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--table-only", action="store_true", help="measure nothing")
    options = parser.parse_args()
    pairs = held_out_pairs(options.heldout, options.train, options.per_language, options.seed)
    sizes = np.array([float(len(pair.target)) for pair in pairs])
    losses = KeptLosses(options.results, sizes, lambda model: bits_of_pairs(model, pairs))
    setting = (DEMO, options.per_language, options.seed, len(pairs))
    if not options.table_only:
        packing, base = Packing(), (*setting, "16-bit")
        losses.measure(base, lambda: packing.model)
        wanted = [(title, name, method) for title in options.only for method in options.methods for name in options.formats]
        for title, name, method in wanted:
            part = PARTS[title]
            # All of an 8-bit row is in 8 bits already.
            if method in part.methods and not (name == EIGHT_BITS and part.eight_bits):
                key = (*setting, title, name, method)
                losses.measure(key, lambda part=part, name=name, method=method: packing.unpacked(part, name, method))
                loss, error = losses.difference(key, base)
                print(f"{title:8} {name:6} {method:8} {loss:+.5f} ± {error:.5f}", flush=True)
    text = table(losses, setting)
    if options.markdown is not None:
        write_between_markers(options.markdown, text, MARKERS)
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
