"""Bits per byte that each method loses in each format, with standard errors of paired windows; resumable.

    python benchmarks/quantization_quality.py STATS --results results.jsonl [--heldout FOLDER] [--model megabyte-demo]
        [--formats nvfp4,mxfp4,int4,mxfp8] [--methods rtn,mse,awq,gptq,sequential] [--corpus CORPUS ..]
        [--distill-steps 0] [--layers all|mixed] [--outliers] [--gptq-seconds]

FOLDER (or MARLIN_HELDOUT) holds a folder a domain; windows are spread evenly over all its bytes, as many a domain. STATS is of
`marlin calibrate --hessian` on other bytes. `sequential` is gptq layer after layer. `--outliers` measures a model that
computes the same, whose channels are scaled between producer and consumer by up to 100; its statistics are those of
STATS with the same factors. A combination that RESULTS has is not run again.
"""

import argparse
import json
import os
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from marlin_cli import load
from marlin_cli.corpus import open_corpus
from marlin_cli.engine.scoring import bits_of
from marlin_cli.quantization.apply import dequantize_network, quantize_network
from marlin_cli.quantization.distill import DistillSettings, batches_of, distill
from marlin_cli.quantization.formats import FORMATS
from marlin_cli.quantization.methods.awq import fold, legal_folds
from marlin_cli.quantization.methods.gptq import gptq
from marlin_cli.quantization.plan import QuantizationSettings
from marlin_cli.quantization.sequential import quantize_sequentially
from marlin_cli.statistics import Statistics, load_statistics
from marlin_cli.statistics.data import Moments, Totals

WINDOW_BYTES = 2048
CALIBRATION_WINDOW_BYTES, WINDOWS_PER_STEP = 1024, 8


def windows(folder: Path, count: int) -> dict[str, list[np.ndarray]]:
    """For each domain `count` windows, spread evenly over the bytes of all its files."""
    chosen = {}
    for domain in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = [file for file in sorted(domain.rglob("*")) if file.is_file()]
        places = [(file, n * WINDOW_BYTES) for file in files for n in range(file.stat().st_size // WINDOW_BYTES)]
        taken = np.linspace(0, len(places) - 1, min(count, len(places))).astype(int)
        chosen[domain.name] = [
            np.frombuffer(file.read_bytes()[start : start + WINDOW_BYTES], dtype=np.uint8)
            for file, start in (places[index] for index in taken)
        ]
    return chosen


def calibration_batches(corpora: list[str], max_bytes: int) -> list[tuple[str, np.ndarray]]:
    """Windows of the corpora, as many of a domain together as a step takes."""
    found: dict[str, list[np.ndarray]] = {}
    for window in open_corpus(corpora, sequence_bytes=CALIBRATION_WINDOW_BYTES, seed=0, max_bytes=max_bytes):
        if len(window.bytes) == CALIBRATION_WINDOW_BYTES:
            found.setdefault(window.domain, []).append(window.bytes)
    return [
        (domain, np.stack(each[start : start + WINDOWS_PER_STEP]))
        for domain, each in sorted(found.items())
        for start in range(0, len(each), WINDOWS_PER_STEP)
    ]


def with_outliers(network, statistics: Statistics) -> tuple[object, Statistics]:
    """The same function with a few channels up to 100 times larger, and the statistics that it would have."""
    parameters = dict(tree_flatten(network.parameters()))
    rng = np.random.default_rng(1)
    inputs, hessians = dict(statistics.totals.inputs), dict(statistics.hessians)
    for found in legal_folds(parameters, gated=network.config.ffn == "swiglu"):
        columns = parameters[f"{found.consumers[0]}.weight"].shape[1]
        factors = (100 ** -(rng.random(columns) ** 6)).astype(np.float32)  # of the weights: inputs grow
        fold(parameters, found, factors)
        source = statistics.layers[found.consumers[0]]
        old = inputs[source]
        inputs[source] = Moments(old.count, old.sum_squares / factors**2, (old.absolute_maximum / factors).astype(np.float32))
        for domain in statistics.domains:
            hessians[source, domain] = hessians[source, domain] / np.outer(factors, factors)
    other = type(network)(network.config)
    other.load_weights(list(parameters.items()))
    totals = Totals(statistics.domains, inputs, statistics.totals.keys, statistics.totals.values)
    return other, Statistics(statistics.model, statistics.layers, statistics.runs, totals, hessians)


def gptq_seconds(side: int = 4096) -> float:
    """Wall time of gptq on one square nvfp4 layer."""
    rng = np.random.default_rng(0)
    weight = mx.array((rng.standard_normal((side, side)) * 0.02).astype(np.float32))
    x = rng.standard_normal((2 * side, side)).astype(np.float32)
    hessian = (x.T @ x / len(x)).astype(np.float64)
    start = time.perf_counter()
    gptq(weight, FORMATS["nvfp4"], 16, mx.array(np.diag(hessian).astype(np.float32)), hessian)
    return time.perf_counter() - start


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
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--gptq-seconds", action="store_true")
    arguments = parser.parse_args()
    if arguments.heldout is None:
        parser.error("--heldout is missing; name a folder that holds a folder a domain, or set MARLIN_HELDOUT")
    corpora = arguments.corpus or ["default"]
    if arguments.gptq_seconds:
        print(f"gptq, 4096 x 4096, nvfp4: {gptq_seconds():.1f} s", flush=True)
    network = load(arguments.model, device="cpu").network
    statistics = load_statistics(arguments.stats)
    original = network
    if arguments.outliers:
        network, statistics = with_outliers(network, statistics)
    chosen = windows(arguments.heldout, arguments.windows)
    names = [domain for domain in chosen for _ in chosen[domain]]

    def score(candidate) -> list[float]:
        return [float(bits_of(candidate, window, WINDOW_BYTES).mean()) for domain in chosen for window in chosen[domain]]

    lines = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    done = {tuple(row["key"]): row["bits"] for row in map(json.loads, lines)}

    def keep(key: tuple, make) -> None:
        if key not in done:
            start = time.perf_counter()
            done[key] = score(make())
            with arguments.results.open("a") as file:
                file.write(json.dumps({"key": key, "bits": done[key], "seconds": time.perf_counter() - start}) + "\n")
        lost = np.array(done[key]) - np.array(done[base])
        by_domain = ", ".join(f"{name} {lost[[other == name for other in names]].mean():+.5f}" for name in dict.fromkeys(names))
        error = lost.std(ddof=1) / len(lost) ** 0.5
        print(f"{' '.join(map(str, key)):44} {lost.mean():+.5f} ± {error:.5f}  ({by_domain})", flush=True)

    setting = (arguments.model, "outliers" if arguments.outliers else "plain", arguments.windows)
    base = (*setting[::2], "16-bit")
    keep(base, lambda: original)
    print(f"{len(names)} windows of {WINDOW_BYTES} bytes, {np.mean(done[base]):.5f} bits per byte in 16 bits", flush=True)
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
                    corpus = open_corpus(corpora, sequence_bytes=CALIBRATION_WINDOW_BYTES, seed=1, max_bytes=None)
                    batches = batches_of(corpus, CALIBRATION_WINDOW_BYTES, WINDOWS_PER_STEP)
                    found = distill(network, packed(), batches, DistillSettings(steps=arguments.distill_steps))
                    return dequantize_network(found, mx.float32)

                keep((*setting, name, local, method, f"distilled {arguments.distill_steps}"), tuned)


if __name__ == "__main__":
    main()
