"""Bits per byte lost to 4 and 8 bits: marlin's encoders against MLX's in the same formats, on the same windows.

    python benchmarks/encoder_quality.py HELDOUT [--stats stats.safetensors] [--windows 24] [--layers all|mixed]

HELDOUT holds a folder a domain. `mixed` packs the global part in the format named and the local part in mxfp8;
`all` packs every linear layer alike. Weights are unpacked before they run, so that speed does not depend on the format
and the activations are float32 everywhere: what differs is the packed values alone. Standard errors are of the
paired differences to the 16-bit model, over windows.
"""

import argparse
from pathlib import Path

import mlx.core as mx
import numpy as np

from marlin_cli import load
from marlin_cli.engine.scoring import bits_of
from marlin_cli.models import linear_layers
from marlin_cli.ops import Linear
from marlin_cli.quantization.apply import copy_with, dequantize_network, quantize_network
from marlin_cli.quantization.encoders import decode, mlx_encode
from marlin_cli.quantization.formats import FORMATS
from marlin_cli.quantization.plan import QuantizationSettings, plan_layers
from marlin_cli.statistics import load_statistics

WINDOW_BYTES = 2048


def windows(folder: Path, count: int) -> dict[str, list[np.ndarray]]:
    """For each domain `count` windows, one from the beginning of each of as many files, evenly chosen."""
    chosen = {}
    for domain in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = [file for file in sorted(domain.rglob("*")) if file.is_file() and file.stat().st_size >= WINDOW_BYTES]
        step = max(1, len(files) // count)
        chosen[domain.name] = [
            np.frombuffer(file.read_bytes()[:WINDOW_BYTES], dtype=np.uint8) for file in files[::step][:count]
        ]
    return chosen


def packed_by_mlx(network, settings):
    """The network with the weights that MLX's own encoder leaves."""
    layers = linear_layers(network)
    plans = plan_layers({path: tuple(module.weight.shape) for path, module in layers.items()}, settings)
    swapped = []
    for plan in plans:
        if plan.format is not None:
            weight = layers[plan.path].weight
            plain = Linear(plan.columns, plan.rows, bias=False)
            plain.weight = decode(mlx_encode(weight, plan.format, plan.group_size))
            swapped.append((plan.path, plain))
    return copy_with(network, swapped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--model", default="megabyte-demo")
    parser.add_argument("--stats", type=Path)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--layers", choices=("mixed", "all"), default="mixed")
    parser.add_argument("--formats", default="nvfp4,mxfp4,int4,mxfp8")
    arguments = parser.parse_args()
    network = load(arguments.model, device="cpu").network
    statistics = load_statistics(arguments.stats) if arguments.stats else None
    chosen = windows(arguments.heldout, arguments.windows)

    def score(candidate) -> np.ndarray:
        return np.array([bits_of(candidate, window, WINDOW_BYTES).mean() for domain in chosen for window in chosen[domain]])

    base = score(network)
    print(f"{len(base)} windows of {WINDOW_BYTES} bytes; 16-bit: {base.mean():.5f} bits per byte", flush=True)
    for name in arguments.formats.split(","):
        local = name if arguments.layers == "all" else "mxfp8"
        settings = QuantizationSettings(name, local)
        candidates = {"MLX's encoder": packed_by_mlx(network, settings)}
        candidates["marlin, no statistics"] = dequantize_network(quantize_network(network, settings).network, mx.float32)
        if statistics is not None:
            packed = quantize_network(network, settings, statistics).network
            candidates["marlin, statistics"] = dequantize_network(packed, mx.float32)
        for who, candidate in candidates.items():
            lost = score(candidate) - base
            error = lost.std(ddof=1) / len(lost) ** 0.5
            width = FORMATS[name].bits
            print(f"{name} ({width} bits) + {local}: {who:22} {lost.mean():+.5f} ± {error:.5f}", flush=True)


if __name__ == "__main__":
    main()
