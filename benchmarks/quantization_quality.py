"""Bits per byte that each method loses in each format, with standard errors of paired windows; resumable.

    python benchmarks/quantization_quality.py STATS --results results.jsonl [--heldout FOLDER] [--model megabyte-demo]
        [--formats nvfp4,mxfp4,int4,mxfp8] [--methods rtn,mse,awq,gptq,sequential] [--corpus CORPUS ..]
        [--distill-steps 0] [--layers all|mixed]

FOLDER (or MARLIN_HELDOUT) holds a folder a domain; windows are spread evenly over all its bytes, as many a domain. STATS is of
`marlin calibrate --hessian` on other bytes. `sequential` is gptq layer after layer. A combination that RESULTS has is not run
again. `outlier_quality.py` measures the same on a model with channels up to 100 times larger than others.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from calibrated import calibration_batches
from paired_losses import WINDOW_BYTES, PairedLosses, spread_windows

from marlin_cli import load
from marlin_cli.corpus import open_corpus
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.quantization import windows
from marlin_cli.quantization.apply import dequantize_network, quantize_network
from marlin_cli.quantization.distill import DistillSettings, distill
from marlin_cli.quantization.plan import QuantizationSettings
from marlin_cli.quantization.sequential import quantize_sequentially
from marlin_cli.statistics import load_statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stats", type=Path)
    parser.add_argument("--heldout", type=Path, default=os.environ.get("MARLIN_HELDOUT"))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--model", default="megabyte-demo")
    parser.add_argument("--windows", type=int, default=32, help="of each domain")
    parser.add_argument("--layers", choices=("mixed", "all"), default="all")
    parser.add_argument("--formats", default="nvfp4,mxfp4,int4,mxfp8")
    parser.add_argument("--methods", default="rtn,mse,awq,gptq,sequential")
    parser.add_argument("--distill-steps", type=int, default=0)
    parser.add_argument("--corpus", action="append", help="bytes for sequential and distillation, as calibrate's --corpus")
    parser.add_argument("--sequential-bytes", type=int, default=512 << 10)
    arguments = parser.parse_args()
    if arguments.heldout is None:
        parser.error("--heldout is missing; name a folder that holds a folder a domain, or set MARLIN_HELDOUT")
    corpora = arguments.corpus or ["default"]
    network = load(arguments.model, device="cpu").network
    statistics = load_statistics(arguments.stats)
    losses = PairedLosses(arguments.results, spread_windows(arguments.heldout, arguments.windows))
    setting = (arguments.model, "plain", arguments.windows)
    base = (*setting[::2], "16-bit")
    bits = losses.measure(base, lambda: network)
    print(f"{len(bits)} windows of {WINDOW_BYTES} bytes, {bits.mean():.5f} bits per byte in 16 bits", flush=True)

    def keep(key: tuple[object, ...], make: Callable[[], MegaByte]) -> None:
        losses.measure(key, make)
        print(losses.line(key, base), flush=True)

    for name in arguments.formats.split(","):
        local = name if arguments.layers == "all" else "mxfp8"
        settings = QuantizationSettings(name, local)
        for method in arguments.methods.split(","):

            def packed(settings=settings, method=method):
                if method == "sequential":
                    batches = calibration_batches(corpora, arguments.sequential_bytes)
                    return quantize_sequentially(network, settings, batches).network
                return quantize_network(network, settings, None if method == "rtn" else statistics, method=method).network

            keep((*setting, name, local, method), lambda packed=packed: dequantize_network(packed(), mx.float32))
            if arguments.distill_steps:

                def tuned(packed=packed):
                    corpus = open_corpus(corpora, sequence_bytes=windows.WINDOW_BYTES, seed=1, max_bytes=None)
                    batches = windows.batches_of(corpus, windows.WINDOW_BYTES)
                    found = distill(network, packed(), batches, DistillSettings(steps=arguments.distill_steps))
                    return dequantize_network(found, mx.float32)

                keep((*setting, name, local, method, f"distilled {arguments.distill_steps}"), tuned)


if __name__ == "__main__":
    main()
