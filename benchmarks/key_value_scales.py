"""Bits per byte that 4-bit keys and values lose by how they are prepared: as they are, rotated, scaled, or both.

    python benchmarks/key_value_scales.py HELD_OUT [--windows 48] [--calibration-bytes 128k] [--largest 30] [--models demo]

Keys are divided by a scale a channel before they are packed and queries multiplied by it, or both are rotated by a Hadamard
matrix a head: inner products stay what they are. Values are prepared so too, and the output of the attention turned back.
Scales are the largest value of a channel, or its square root, in the statistics of `marlin calibrate` over the shipped
sample; balanced keys are those of `marlin quantize --balance-keys`, whose scales are folded into the projections.

The second model computes the same as the first, with one pair of key channels in eight, and one channel of values in eight,
up to `--largest` times as large, and queries and output projection made up for it.

Windows of 8,192 held-out bytes, spread evenly; the global stage's keys and values are packed in nvfp4 as its cache packs
them; differences from 16 bits are paired by window. KL divergence, in bits per byte, is from the prediction with 16 bits; in
brackets what it is more than with rotation alone, of keys or of values, paired too.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from marlin_cli import load
from marlin_cli.commands.options import parse_size
from marlin_cli.corpus import open_corpus
from marlin_cli.engine.cache import KeyValueCache
from marlin_cli.engine.fused import fuse
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.ops import attention
from marlin_cli.ops.reference import pack_rows, unpack_rows
from marlin_cli.quantization.balanced_keys import balancing_factors
from marlin_cli.statistics import Statistics
from marlin_cli.statistics.data import Moments
from marlin_cli.statistics.run import calibrate

WINDOW_BYTES = 8192
MODELS = ("demo", "demo with outliers")

# Scales [kv_heads, 1, head_dim] of keys or values, from what was measured.
Scales = Callable[[Moments], mx.array]
Way = tuple[Scales, bool]


class PreparedCache(KeyValueCache):
    """A layer's cache for one pass, of which keys or values are None (16 bits), or (their scales, are they rotated?)."""

    def __init__(self, keys: "tuple[mx.array, bool] | None", values: "tuple[mx.array, bool] | None") -> None:
        super().__init__()
        self._prepared = keys, values

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None) -> mx.array:
        for_keys, for_values = self._prepared
        group = queries.shape[1] // keys.shape[1]
        if for_keys is not None:
            scales, rotated = for_keys
            queries = turned(queries * mx.repeat(scales, group, axis=0), rotated)
            keys = packed_and_back(turned(keys / scales, rotated))
        if for_values is not None:
            values = packed_and_back(turned(values / for_values[0], for_values[1]))
        out = attention(queries, keys, values, scale, window=window)
        if for_values is not None:
            out = turned(out, for_values[1]) * mx.repeat(for_values[0], group, axis=0)
        return out


def turned(x: mx.array, rotated: bool) -> mx.array:
    """The orthonormal Hadamard matrix is its own inverse."""
    return mx.hadamard_transform(x) if rotated else x


def packed_and_back(rows: mx.array) -> mx.array:
    return unpack_rows(pack_rows(rows, 4), rows.dtype)


def none(moments: Moments) -> mx.array:
    return mx.ones((moments.count.shape[1], 1, moments.sum_squares.shape[-1]))


def largest(moments: Moments, power: float = 1.0) -> mx.array:
    return mx.array(np.maximum(moments.absolute_maximum.max(axis=0), 1e-6)[:, None] ** power)


def root_of_largest(moments: Moments) -> mx.array:
    return largest(moments, 0.5)


def balanced(moments: Moments) -> mx.array:
    return mx.array(balancing_factors(moments.absolute_maximum.max(axis=0), rotated=True)[:, None])


# What is done to (keys, values): None leaves them in 16 bits, else the scales that they are divided by, and: rotated?
WAYS: dict[str, tuple[Way | None, Way | None]] = {
    "16 bits": (None, None),
    "keys": ((none, False), None),
    "keys, rotation": ((none, True), None),
    "keys, scales": ((largest, False), None),
    "keys, square root of scales": ((root_of_largest, False), None),
    "keys, scales and rotation": ((largest, True), None),
    "keys, balanced": ((balanced, False), None),
    "keys, balanced and rotation": ((balanced, True), None),
    "values": (None, (none, False)),
    "values, rotation": (None, (none, True)),
    "values, scales": (None, (largest, False)),
}


def with_outliers(network: MegaByte, factor: float) -> None:
    """Make some global key and value channels larger, and what reads them smaller."""
    rng = np.random.default_rng(0)
    for layer in network["global"].layers:
        each = layer.attention
        keys = np.ones((each.kv_heads, 2, each.head_dim // 2), np.float32)
        values = np.ones((each.kv_heads, each.head_dim), np.float32)
        for head in range(each.kv_heads):
            for row in (keys[head].T, values[head]):
                chosen = rng.choice(len(row), len(row) // 8, replace=False)
                row[chosen] = factor ** rng.uniform(0.5, 1, len(chosen)).reshape(-1, *[1] * (row.ndim - 1))
        group = each.heads // each.kv_heads
        each.k_proj.weight = each.k_proj.weight * mx.array(keys.reshape(-1, 1))
        each.q_proj.weight = each.q_proj.weight / mx.array(np.repeat(keys, group, axis=0).reshape(-1, 1))
        each.v_proj.weight = each.v_proj.weight * mx.array(values.reshape(-1, 1))
        each.o_proj.weight = each.o_proj.weight / mx.array(np.repeat(values, group, axis=0).reshape(1, -1))
    mx.eval(network.parameters())


def calibrated(network: MegaByte, size: int) -> Statistics:
    corpus = open_corpus(["default"], sequence_bytes=WINDOW_BYTES, seed=0, max_bytes=size)
    with tempfile.TemporaryDirectory() as folder:
        return calibrate(network, corpus, Path(folder) / "statistics.safetensors", model="")


def compare(
    network: MegaByte, windows: np.ndarray, calibration_bytes: int, ways: Mapping[str, tuple[Way | None, Way | None]]
) -> None:
    totals = calibrated(network, calibration_bytes).totals
    fused = fuse(network)
    paths = [f"global.layers.{number}.attention" for number in range(len(network["global"].layers))]

    def prepared(way: Way | None, kind: Mapping[str, Moments], path: str) -> "tuple[mx.array, bool] | None":
        return None if way is None else (way[0](kind[path]), way[1])

    def log2_probabilities(ids: mx.array, name: str) -> mx.array:
        def run_stage(number: int, rows: mx.array) -> mx.array:
            if number:
                return network.stages[number].stack(rows) if fused is None else fused.run_stage(number, rows)
            keys, values = ways[name]
            caches = [PreparedCache(prepared(keys, totals.keys, path), prepared(values, totals.values, path)) for path in paths]
            return network["global"](rows, caches)

        logits = network(ids, run_stage)
        return (logits - mx.logsumexp(logits, axis=-1, keepdims=True)) / np.log(2)

    bits, divergences = [], []
    for window in windows:
        ids = mx.array(window[None].astype(np.int32))
        base = log2_probabilities(ids, "16 bits")
        own = [log2_probabilities(ids, name) for name in list(ways)[1:]]
        chosen = [-mx.take_along_axis(each, ids[..., None], axis=-1).mean().item() for each in (base, *own)]
        bits.append(chosen)
        divergences.append([(mx.power(2.0, base) * (base - each)).sum(axis=-1).mean().item() for each in own])
        if len(bits) % 8 == 0 or len(bits) == len(windows):
            show(list(ways)[1:], np.array(bits), np.array(divergences))


def show(names: list[str], bits: np.ndarray, divergences: np.ndarray) -> None:
    """Both [windows, ways], the first with 16 bits in front."""

    def error(samples: np.ndarray) -> float:
        return samples.std(ddof=1) / len(samples) ** 0.5

    print(f"  {len(bits)} windows, 16 bits: {bits[:, 0].mean():.5f} bits per byte", flush=True)
    for number, name in enumerate(names):
        lost, divergence = bits[:, number + 1] - bits[:, 0], divergences[:, number]
        more = divergence - divergences[:, names.index(f"{name.split(',')[0]}, rotation")]
        print(
            f"  {name:38} {lost.mean():+.5f} +- {error(lost):.5f}, KL {divergence.mean():.5f} +- {error(divergence):.5f}"
            f" ({more.mean():+.5f} +- {error(more):.5f})"
        )


def spread(folder: Path, count: int) -> np.ndarray:
    """Windows [count, WINDOW_BYTES] at even steps through the bytes of all files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    places = [(file, n * WINDOW_BYTES) for file in files for n in range(file.stat().st_size // WINDOW_BYTES)]
    taken = [places[index] for index in np.linspace(0, len(places) - 1, min(count, len(places))).astype(int)]
    return np.stack([np.frombuffer(file.read_bytes()[at : at + WINDOW_BYTES], dtype=np.uint8) for file, at in taken])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--calibration-bytes", default="128k")
    parser.add_argument("--largest", type=float, default=30.0)
    parser.add_argument("--of", nargs="+", choices=("keys", "values"), default=("keys", "values"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    given = parser.parse_args()
    ways = {name: way for name, way in WAYS.items() if name.startswith(("16", *given.of))}
    windows = spread(given.held_out, given.windows)
    for kind in given.models:
        model = load("megabyte-demo", device="cpu")
        if kind != "demo":
            with_outliers(model.network, given.largest)
        print(f"{kind}, {len(windows)} windows, {windows.size:,} bytes")
        compare(model.network, windows, parse_size(given.calibration_bytes, "--calibration-bytes"), ways)


if __name__ == "__main__":
    main()
