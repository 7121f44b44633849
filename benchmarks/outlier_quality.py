"""Bits per byte that each method loses on a model with channels up to 100 times larger than others; resumable.

    python benchmarks/outlier_quality.py --heldout FOLDER --results results.jsonl [--model megabyte-demo] [--windows 32]
        [--formats nvfp4,mxfp4,int4] [--methods rtn,mse,awq,gptq,awq+gptq,sequential,hadamard] [--corpus CORPUS ..]

The model computes what the original does (`outlier_model`), so it loses nothing in 16 bits. Statistics are measured on it,
and kept beside RESULTS. FOLDER (or MARLIN_HELDOUT) holds a folder a domain. `sequential` is gptq layer after layer on half a
mebibyte, `hadamard` gptq+hadamard so, and `awq+sequential` rescales by the statistics first. Errors are of paired windows.
"""

import argparse
import os
from pathlib import Path

import mlx.core as mx
from calibrated import calibration_batches, corpus_of, statistics_of
from outlier_model import with_outliers
from paired_losses import PairedLosses, spread_windows

from marlin_cli import load
from marlin_cli.quantization.apply import dequantize_network, plan_network, quantize_network
from marlin_cli.quantization.plan import QuantizationSettings
from marlin_cli.quantization.scaled import rescaled
from marlin_cli.quantization.sequential import quantize_sequentially

# Methods that pack layer after layer, by the name of the method that packs each.
SEQUENTIAL = {"sequential": "gptq", "hadamard": "gptq+hadamard", "awq+sequential": "gptq"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heldout", type=Path, default=os.environ.get("MARLIN_HELDOUT"))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--model", default="megabyte-demo")
    parser.add_argument("--windows", type=int, default=32, help="of each domain")
    parser.add_argument("--formats", default="nvfp4,mxfp4,int4")
    parser.add_argument("--methods", default="rtn,mse,awq,gptq,awq+gptq,sequential,hadamard,awq+sequential")
    parser.add_argument("--corpus", action="append", help="calibration bytes, as calibrate's --corpus; default: default")
    parser.add_argument("--calibration-bytes", type=int, default=512 << 10)
    parser.add_argument("--plain", action="store_true", help="measure the original, for what outliers add")
    arguments = parser.parse_args()
    if arguments.heldout is None:
        parser.error("--heldout is missing; name a folder that holds a folder a domain, or set MARLIN_HELDOUT")
    corpora = arguments.corpus or ["default"]
    original = load(arguments.model, device="cpu").network
    network = original if arguments.plain else with_outliers(original)
    kind = "plain" if arguments.plain else "outliers"
    file = arguments.results.with_name(f"{arguments.results.stem}.{kind}.safetensors")
    statistics = statistics_of(network, corpus_of(corpora, arguments.calibration_bytes), file)
    losses = PairedLosses(arguments.results, spread_windows(arguments.heldout, arguments.windows))
    base = ("16-bit",)
    print(
        f"16-bit: {losses.measure(base, lambda: original).mean():.5f} bits per byte, {len(losses.domains)} windows", flush=True
    )
    losses.measure((kind, "16-bit"), lambda: network)
    print(losses.line((kind, "16-bit"), base), flush=True)
    for name in arguments.formats.split(","):
        settings = QuantizationSettings(name, name)
        for method in arguments.methods.split(","):

            def packed(settings=settings, method=method):
                if method in SEQUENTIAL:
                    ready = network
                    if method.startswith("awq"):
                        ready, _ = rescaled(network, plan_network(network, settings), statistics)
                    batches = calibration_batches(corpora, arguments.calibration_bytes)
                    result = quantize_sequentially(ready, settings, batches, method=SEQUENTIAL[method])
                else:
                    result = quantize_network(network, settings, None if method == "rtn" else statistics, method=method)
                return dequantize_network(result.network, mx.float32)

            losses.measure((kind, name, method), packed)
            print(losses.line((kind, name, method), base), flush=True)


if __name__ == "__main__":
    main()
