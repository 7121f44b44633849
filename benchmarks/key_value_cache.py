"""The packed global cache of the demo MegaByte: bytes, decoding speed at a long context, and bits per byte, by bits.

    python benchmarks/key_value_cache.py [--context 32k] [--held-out FOLDER] [--max-bytes 262144]

Bytes are of the rows in use, against 16-bit keys and values (a CPU keeps float32; half of that is counted). Decoding: 64 bytes
after the context, rounds alternate, medians. Bits per byte: windows of 8,192 held-out bytes whose global keys and values went
through the cache; differences are paired by window. Needs the CPU kernels.
"""

import argparse
import statistics
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from measured import Row, add_rows_option, report

from marlin_cli import load
from marlin_cli.bench.throughput import sample_prompt
from marlin_cli.commands.options import parse_size
from marlin_cli.engine.decoding import CacheBits, Lockstep
from marlin_cli.engine.fused import fuse
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.ops.cpu import kernels

BITS = {"16": (16, 16), "8": (8, 8), "4": (4, 4), "keys 8, values 4": (8, 4), "keys 4, values 8": (4, 8)}
WINDOW_BYTES = 8192


def decode_seconds(state: Lockstep, count: int = 64) -> float:
    noise = Noise(0, 256)
    start = time.perf_counter()
    while count:
        count -= state.advance(Sampling(), noise, count).shape[1]
    return time.perf_counter() - start


def bits_of_windows(network, fused, windows: np.ndarray, bits: tuple[int, int]) -> np.ndarray:
    """Mean bits a byte of each window [n, length], its global rows read through a cache: [n]."""

    def run_stage(number: int, rows: mx.array) -> mx.array:
        if number:
            return fused.run_stage(number, rows)
        return fused.new_cache(0, rows.shape[0], [], CacheBits(*bits)).run(rows)

    out = []
    for window in windows:
        ids = mx.array(window[None].astype(np.int32))
        logits = network(ids, run_stage)
        chosen = mx.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
        out.append((mx.logsumexp(logits, axis=-1) - chosen).mean().item() / np.log(2))
    return np.array(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", default="32k")
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--max-bytes", type=int, default=1 << 18)
    parser.add_argument("--rounds", type=int, default=7)
    add_rows_option(parser)
    arguments = parser.parse_args()
    if kernels()[0] is None:
        raise SystemExit(f"no CPU kernels: {kernels()[1]}")
    model = load("megabyte-demo", device="cpu")
    context = min(parse_size(arguments.context, "--context"), model.config.max_bytes)
    room = 64 * (arguments.rounds + 1)
    states = {
        name: Lockstep(model.network, [sample_prompt(context - room, 0)], CacheBits(*bits)) for name, bits in BITS.items()
    }
    times: dict[str, list[float]] = {name: [] for name in BITS}
    for _ in range(arguments.rounds):
        for name, state in states.items():
            times[name].append(decode_seconds(state))
    plain = states["16"].cache_bytes["global"] / 2
    for name, state in states.items():
        share = 1.0 if name == "16" else state.cache_bytes["global"] / plain
        speed = 64 / statistics.median(times[name])
        ratio = statistics.median(slow / fast for slow, fast in zip(times["16"], times[name], strict=True))
        print(f"{context} bytes of context, {name} bits: {100 * share:.1f} % of 16-bit keys and values, {speed:.0f} bytes/s,"
              f" {ratio:.2f}x of 16 bits", flush=True)  # fmt: skip
        if name in ("4", "8"):
            report(
                Row(
                    f"demo MegaByte, {name}-bit global cache, {context:,} bytes of context",
                    f"{100 * share:.0f} % of the bytes, {speed:.0f} bytes/s",
                    f"its own 16-bit cache (kept in float32): {64 / statistics.median(times['16']):.0f} bytes/s",
                    f"{ratio:.2f}x",
                    "bits per byte: the script with --held-out",
                ),
                arguments.rows_file,
            )
    if arguments.held_out is None:
        return
    fused = fuse(model.network)
    windows = []
    for file in sorted(path for path in arguments.held_out.rglob("*") if path.is_file()):
        data = np.frombuffer(file.read_bytes(), dtype=np.uint8)
        windows += [data[start : start + WINDOW_BYTES] for start in range(0, len(data) - WINDOW_BYTES + 1, 4 * WINDOW_BYTES)]
    windows = np.stack(windows[:: max(1, len(windows) * WINDOW_BYTES // arguments.max_bytes)])
    base = bits_of_windows(model.network, fused, windows, BITS["16"])
    print(f"{windows.size:,} held-out bytes in {len(windows)} windows: {base.mean():.5f} bits per byte with 16 bits")
    for name, bits in list(BITS.items())[1:]:
        lost = bits_of_windows(model.network, fused, windows, bits) - base
        print(f"{name} bits: {lost.mean():+.5f} +- {lost.std(ddof=1) / len(lost) ** 0.5:.5f}", flush=True)


if __name__ == "__main__":
    main()
