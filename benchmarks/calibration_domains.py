"""What calibrating on the wrong bytes costs: a model packed by statistics of one domain alone, and of the default mix.

    python benchmarks/calibration_domains.py --heldout FOLDER --results results.jsonl [--model megabyte-demo] [--windows 32]
        [--formats nvfp4,mxfp4,int4] [--method gptq] [--corpus CORPUS ..] [--calibration-bytes 524288]

Each set of statistics is of as many bytes, with x^T x, and kept beside RESULTS. FOLDER (or MARLIN_HELDOUT) holds a folder a
domain, of other bytes. Errors are of paired windows. The last lines say, for each domain, how the mix does against the best
single domain (the goal: at most 1 % more bits per byte), and what the worst single domain costs against its own.
"""

import argparse
import os
from pathlib import Path

import mlx.core as mx
from calibrated import corpus_of, statistics_of
from paired_losses import PairedLosses, spread_windows

from marlin_cli import load
from marlin_cli.quantization.apply import dequantize_network, quantize_network
from marlin_cli.quantization.plan import QuantizationSettings

MIX = "mix"
GOAL = 0.01


def verdict(losses: PairedLosses, name: str, method: str, domain: str) -> str:
    """The mix against the best single domain, and the worst single domain against the one that is tested."""
    singles = {single: losses.difference((name, method, single), ("16-bit",), domain)[0] for single in losses.windows}
    best, worst = min(singles, key=singles.__getitem__), max(singles, key=singles.__getitem__)
    base = losses.bits_per_byte((name, method, best), domain)
    more, error = losses.difference((name, method, MIX), (name, method, best), domain)
    text = (
        f"{name} {method}, {domain}: the mix costs {more / base:+.3%} ± {error / base:.3%} against the best single domain"
        f" ({best}); {'within' if more <= GOAL * base else 'MISSES'} {GOAL:.0%}"
    )
    if worst == domain:
        return f"{text}; no other domain does worse than its own"
    cost, error = losses.difference((name, method, worst), (name, method, domain), domain)
    return (
        f"{text}; {worst} alone {cost:+.5f} ± {error:.5f} bits per byte against {domain} alone"
        f" ({singles[worst] / singles[domain]:.2f} times its loss)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heldout", type=Path, default=os.environ.get("MARLIN_HELDOUT"))
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--model", default="megabyte-demo")
    parser.add_argument("--windows", type=int, default=32, help="of each domain")
    parser.add_argument("--formats", default="nvfp4,mxfp4,int4")
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--corpus", action="append", help="calibration bytes, as calibrate's --corpus; default: default")
    parser.add_argument("--calibration-bytes", type=int, default=512 << 10)
    arguments = parser.parse_args()
    if arguments.heldout is None:
        parser.error("--heldout is missing; name a folder that holds a folder a domain, or set MARLIN_HELDOUT")
    corpora, size, method = arguments.corpus or ["default"], arguments.calibration_bytes, arguments.method
    network = load(arguments.model, device="cpu").network
    losses = PairedLosses(arguments.results, spread_windows(arguments.heldout, arguments.windows))
    mixes = {MIX: corpus_of(corpora, size), **{domain: corpus_of(corpora, size, domain) for domain in losses.windows}}
    base = ("16-bit",)
    losses.measure(base, lambda: network)
    by_domain = ", ".join(f"{domain} {losses.bits_per_byte(base, domain):.5f}" for domain in losses.windows)
    print(f"16-bit: {by_domain} bits per byte; {len(losses.domains)} windows; calibrated on {size:,} bytes each", flush=True)
    statistics = {}
    for mix, corpus in mixes.items():
        file = arguments.results.with_name(f"{arguments.results.stem}.{mix}.safetensors")
        statistics[mix] = statistics_of(network, corpus, file)
    for name in arguments.formats.split(","):
        settings = QuantizationSettings(name, name)
        for mix, found in statistics.items():

            def packed(settings=settings, found=found):
                return dequantize_network(quantize_network(network, settings, found, method=method).network, mx.float32)

            losses.measure((name, method, mix), packed)
            print(losses.line((name, method, mix), base), flush=True)
        for domain in losses.windows:
            print(verdict(losses, name, method, domain), flush=True)


if __name__ == "__main__":
    main()
