"""Bits per byte that 4-bit keys and values lose by how they are prepared: as they are, rotated, scaled, or both.

    python benchmarks/key_value_scales.py HELD_OUT [--windows 48] [--calibration-bytes 128k] [--largest 30]

Keys are divided by a scale a channel before they are packed and queries multiplied by it, or both are rotated by a Hadamard
matrix a head: inner products stay what they are. Values are prepared so too, and the output of the attention turned back.
Scales are powers of the largest value of a channel, or its root mean square, in the statistics of `marlin calibrate` over
the shipped sample. `one a pair` is what can be folded into the projections: a power of two that both channels share which
the position rotates together. The second model computes the same as the first, with one pair of key channels in eight,
and one channel of values in eight, up to `--largest` times as large, and queries and output projection made up for it.

Windows of 8,192 held-out bytes, spread evenly; the global stage's keys and values are packed in nvfp4 as its cache packs
them; differences from 16 bits are paired by window.
"""

import argparse
import tempfile
from collections.abc import Callable
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
from marlin_cli.statistics import Statistics
from marlin_cli.statistics.data import Moments
from marlin_cli.statistics.run import calibrate

WINDOW_BYTES = 8192

# Scales [kv_heads, 1, head_dim] of keys or values, from what was measured.
Scales = Callable[[Moments], mx.array]


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


def root_mean_square(moments: Moments) -> mx.array:
    mean = moments.sum_squares.sum(axis=0) / moments.count.sum(axis=0)[:, None]
    return mx.array(np.sqrt(np.maximum(mean, 1e-12))[:, None].astype(np.float32))


def one_a_pair(moments: Moments) -> mx.array:
    halves = np.array(largest(moments)).reshape(moments.count.shape[1], 1, 2, -1).max(axis=2, keepdims=True)
    powers = 2.0 ** np.round(np.log2(halves))
    return mx.array(
        np.broadcast_to(powers, (*powers.shape[:2], 2, powers.shape[3])).reshape(len(powers), 1, -1).astype(np.float32)
    )


def half_power(moments: Moments) -> mx.array:
    return largest(moments, 0.5)


KEYS: dict[str, tuple[Scales, bool]] = {
    "plain": (none, False),
    "rotation": (none, True),
    "scales: largest": (largest, False),
    "scales: largest ** 0.5": (half_power, False),
    "scales: root mean square": (root_mean_square, False),
    "scales: one a pair": (one_a_pair, False),
    "scales: largest, and rotation": (largest, True),
    "scales: one a pair, and rotation": (one_a_pair, True),
}
VALUES = {name: KEYS[name] for name in ("plain", "rotation", "scales: largest", "scales: largest, and rotation")}


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


def measured(network: MegaByte, size: int) -> Statistics:
    corpus = open_corpus(["default"], sequence_bytes=WINDOW_BYTES, seed=0, max_bytes=size)
    with tempfile.TemporaryDirectory() as folder:
        return calibrate(network, corpus, Path(folder) / "statistics.safetensors", model="")


def bits_per_byte(network, fused, windows: np.ndarray, caches: Callable[[], list[KeyValueCache]]) -> np.ndarray:
    """Of each window [n, length]: [n]."""

    def run_stage(number: int, rows: mx.array) -> mx.array:
        return fused.run_stage(number, rows) if number else network["global"](rows, caches())

    out = []
    for window in windows:
        ids = mx.array(window[None].astype(np.int32))
        logits = network(ids, run_stage)
        chosen = mx.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
        out.append((mx.logsumexp(logits, axis=-1) - chosen).mean().item() / np.log(2))
    return np.array(out)


def compare(network: MegaByte, windows: np.ndarray, calibration_bytes: int) -> None:
    statistics = measured(network, calibration_bytes)
    fused = fuse(network)
    count = len(network["global"].layers)

    def caches(keys: "tuple[Scales, bool] | None", values: "tuple[Scales, bool] | None") -> list[KeyValueCache]:
        def one(kind: str, number: int, way: "tuple[Scales, bool] | None") -> "tuple[mx.array, bool] | None":
            moments = getattr(statistics.totals, kind)[f"global.layers.{number}.attention"]
            return None if way is None else (way[0](moments), way[1])

        return [PreparedCache(one("keys", number, keys), one("values", number, values)) for number in range(count)]

    base = bits_per_byte(network, fused, windows, lambda: caches(None, None))
    print(f"  16 bits: {base.mean():.5f} bits per byte", flush=True)
    ways = [(f"keys, {name}", way, None) for name, way in KEYS.items()]
    ways += [(f"values, {name}", None, way) for name, way in VALUES.items()]
    for name, keys, values in ways:
        prepared = caches(keys, values)
        lost = bits_per_byte(network, fused, windows, lambda prepared=prepared: prepared) - base
        print(f"  {name:40} {lost.mean():+.5f} +- {lost.std(ddof=1) / len(lost) ** 0.5:.5f}", flush=True)


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
    given = parser.parse_args()
    windows = spread(given.held_out, given.windows)
    for kind in ("demo", "demo with outliers"):
        model = load("megabyte-demo", device="cpu")
        if kind != "demo":
            with_outliers(model.network, given.largest)
        print(f"{kind}, {len(windows)} windows, {windows.size:,} bytes")
        compare(model.network, windows, parse_size(given.calibration_bytes, "--calibration-bytes"))


if __name__ == "__main__":
    main()
