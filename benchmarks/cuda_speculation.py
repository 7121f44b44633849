"""Drafts of patches on an NVIDIA GPU: greedy decoding with drafts over decoding without, on predictions that are edited.

    python benchmarks/cuda_speculation.py [--models demo,166M] [--bits 16,4] [--bytes 2048] [--rounds 3]

What random weights write after a prompt is written once; as a prediction it is given with 3 % of its lines changed, in lines as
long as those of a file of code. So costs are real, and hits those of an edited file. Three ways in turns: no drafts (`off`), a
stream that may be drafted and has none (`wide`: what its launches cost), and drafts (`auto`); with `ordinary`, `auto` where the
prediction is of another text. The medians of rounds count, the first one left out; bytes are compared with those of `wide`,
with which they must agree, and with those of `off`, from which rounding may part them.
"""

import argparse
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from measured import Row, add_rows_option, report

from marlin_cli.api import MegaByteModel
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.speculation import AUTO, OFF, Speculation
from marlin_cli.engine.stopping import Stopping
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops.device import choose_device
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import settings_from_bits

SHAPES: dict[str, dict[str, Any]] = {"166M": {}, "1.2B": {"global_layers": 24, "global_dim": 2048, "global_heads": 16}}
LINES = Path(os.__file__).parent / "argparse.py"


class Nothing:
    """A `DraftSource` that drafts nothing."""

    is_free = True

    def push(self, data: bytes) -> None:
        pass

    def draft(self, count: int) -> None:
        return None


def edited(data: bytes, rng: random.Random) -> bytes:
    """A text with 3 % of its lines changed, lines being as long as those of code."""
    lines, start = [], 0
    for line in LINES.read_bytes().splitlines(keepends=True):
        lines.append(data[start : start + len(line)])
        start += len(line)
    lines = [line for line in lines if line]
    for place in rng.sample(range(len(lines)), max(1, round(0.03 * len(lines)))):
        kind, line = rng.random(), lines[place]
        middle = len(line) // 2
        lines[place] = (
            line[:middle] + b"changed" + line[middle + 5 :] if kind < 0.6 else b"" if kind < 0.8 else b"a line" + line
        )
    return b"".join(lines)


def model_of(name: str, bits: int, bytes_wanted: int) -> MegaByteModel:
    if name == "demo":
        model = MegaByteModel.from_pretrained("megabyte-demo", device="cuda", dtype=mx.bfloat16)
    else:
        mx.random.seed(0)
        network = MegaByte(MegaByteConfig(**{**SHAPES[name], "max_bytes": max(8192, bytes_wanted + 1024)}))
        network.set_dtype(mx.bfloat16)
        mx.eval(network.parameters())
        model = MegaByteModel(network, choose_device("cuda"))
    if bits == 16:
        return model
    return MegaByteModel(quantize_network(model.network, settings_from_bits(4, 8, 16), method="rtn").network, model.device)


def run(
    model: MegaByteModel, prompt: bytes, count: int, speculation: Speculation, source: Any = None
) -> tuple[float, bytes, Any]:
    """Seconds from the first bytes on, the bytes, and what came of drafts."""
    model._draft_source = source
    start, first, data, told = 0.0, 0, b"", None
    for piece in model.pieces([prompt], Stopping(count), Sampling(), speculation=speculation):
        if not data:
            start, first = time.perf_counter(), len(piece.data)
        data, told = data + piece.data, piece.speculated or told
    took = time.perf_counter() - start
    return took / max(1, len(data) - first), data, told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo,166M")
    parser.add_argument("--bits", default="16,4")
    parser.add_argument("--bytes", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    add_rows_option(parser)
    arguments = parser.parse_args()
    rng = random.Random(0)
    prompt = bytes(rng.choices(range(97, 123), k=512))
    for name in arguments.models.split(","):
        for bits in map(int, arguments.bits.split(",")):
            model = model_of(name, bits, arguments.bytes)
            count = min(arguments.bytes, model.config.max_bytes - len(prompt))
            text = run(model, prompt, count, Speculation(1), lambda request, prompt: Nothing())[1]
            draft, other = edited(text, rng), rng.randbytes(len(text))
            ways: dict[str, tuple[Speculation, Any]] = {
                "off": (OFF, None),
                "wide": (Speculation(1), lambda request, prompt: Nothing()),
                "auto": (Speculation(AUTO.most, adapts=True, prediction=draft), None),
                "7": (Speculation(7, prediction=draft), None),
                "ordinary": (Speculation(AUTO.most, adapts=True, prediction=other), None),
            }
            times: dict[str, list[float]] = {way: [] for way in ways}
            written, told = {}, {}
            for _ in range(arguments.rounds + 1):
                for way, (speculation, source) in ways.items():
                    took, written[way], told[way] = run(model, prompt, count, speculation, source)
                    times[way].append(took)
            medians = {way: statistics.median(each[1:]) for way, each in times.items()}
            for way in ("wide", "auto", "7", "ordinary"):
                came = told[way]
                same = "bytes equal" if written[way] == written["wide"] else "OTHER BYTES than without drafts"
                beside = "as those of off" if written[way] == written["off"] else "parted from off by rounding"
                counts = f"{came.accepted_bytes / count:.0%} accepted, {came.passes / count:.4f} passes a byte"
                report(
                    Row(
                        f"drafts on a GPU, {name}, {bits} bits, {way}",
                        f"{1 / medians[way]:,.0f} bytes/s; {counts}",
                        f"off: {1 / medians['off']:,.0f} bytes/s",
                        f"{medians['off'] / medians[way]:.2f}x",
                        f"{same}, {beside}",
                    ),
                    arguments.rows_file,
                )


if __name__ == "__main__":
    main()
