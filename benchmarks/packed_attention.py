"""A decoding step of attention on 4-bit keys and values, beside mlx-lm's quantised cache: the same keys, the same bits.

    python benchmarks/packed_attention.py [--keys 32768] [--heads 16] [--head-dim 64] [--rounds 5]

One layer, one stream, one query a step: its key and value are packed and appended, then all are attended to. marlin's nvfp4
and mlx-lm's affine 4 bits in groups of 64 both take 4.5 bits a number. mlx-lm runs in bfloat16, in which its models fill the
cache, and in float32, where its scales take 5 bits; marlin's CPU kernels compute in float32. Errors are root mean squares
relative to float64 attention on the keys and values as they were before packing; a few channels of the keys are large, as
those of real models are. Rounds alternate; medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np
from measured import Row, add_rows_option, report
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from marlin_cli.engine.cache import PackedKeyValueCache
from marlin_cli.ops.cpu import kernels, thread_count

STEPS = 4


def marlin_steps(bits: int) -> Callable[..., mx.array]:
    cache = PackedKeyValueCache(bits, bits)
    return lambda queries, keys, values: cache.attend(queries, keys, values, queries.shape[-1] ** -0.5, None)


def mlx_lm_steps(cache: KVCache | QuantizedKVCache) -> Callable[..., mx.array]:
    def step(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        held = cache.update_and_fetch(keys, values)
        return scaled_dot_product_attention(queries, *held, cache=cache, scale=queries.shape[-1] ** -0.5, mask=None)

    return step


def exact(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Attention of the last query [heads, 1, head_dim] on all keys [heads, rows, head_dim] in float64."""
    scores = queries @ keys.swapaxes(1, 2) * queries.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("keys", 32768), ("heads", 16), ("head-dim", 64), ("rounds", 5)):
        parser.add_argument(f"--{option}", type=int, default=default)
    add_rows_option(parser)
    given = parser.parse_args()
    if kernels()[0] is None:
        raise SystemExit(f"no CPU kernels: {kernels()[1]}")
    mx.set_default_device(mx.cpu)
    rng = np.random.default_rng(0)
    total = given.keys + (given.rounds + 1) * STEPS
    shape = (1, given.heads, total, given.head_dim)
    queries, keys, values = (rng.standard_normal(shape, dtype=np.float32) for _ in range(3))
    keys[..., :: given.head_dim // 4] *= 4
    caches = {
        "marlin nvfp4": (marlin_steps(4), mx.float32),
        "marlin, no packing": (marlin_steps(16), mx.float32),
        "mlx-lm affine 4 bits, bfloat16": (mlx_lm_steps(QuantizedKVCache(64, 4)), mx.bfloat16),
        "mlx-lm affine 4 bits, float32": (mlx_lm_steps(QuantizedKVCache(64, 4)), mx.float32),
        "mlx-lm, no packing, float32": (mlx_lm_steps(KVCache()), mx.float32),
    }

    def rows(start: int, stop: int, dtype: mx.Dtype) -> list[mx.array]:
        made = [mx.array(each[:, :, start:stop]).astype(dtype) for each in (queries, keys, values)]
        mx.eval(made)
        return made

    for name, (step, dtype) in caches.items():
        some, *held = rows(0, given.keys, dtype)
        start = time.perf_counter()
        mx.eval(step(some[:, :, -1:], *held))
        print(f"{name}: {given.keys:,} rows appended and attended to once in {time.perf_counter() - start:.1f} s", flush=True)
    times: dict[str, list[float]] = {name: [] for name in caches}
    for number in range(given.rounds + 1):
        for name, (step, dtype) in caches.items():
            first = given.keys + number * STEPS
            inputs = [rows(first + i, first + i + 1, dtype) for i in range(STEPS)]
            start = time.perf_counter()
            for each in inputs:
                out = step(*each)
                mx.eval(out)
            times[name].append((time.perf_counter() - start) / STEPS)
            if number == given.rounds:
                wanted = exact(*(each[0].astype(np.float64) for each in (queries[:, :, -1:], keys, values)))
                difference = np.array(out.astype(mx.float32))[0] - wanted
                error = np.sqrt((difference**2).mean() / (wanted**2).mean())
                print(f"{name}: {1e3 * statistics.median(times[name][1:]):.2f} ms, error {error:.1%}", flush=True)
                times[name].append(error)
    found = {name: (statistics.median(row[1:-1]), row[-1]) for name, row in times.items()}
    ours, our_error = found["marlin nvfp4"]
    for name in ("mlx-lm affine 4 bits, bfloat16", "mlx-lm affine 4 bits, float32"):
        theirs, error = found[name]
        report(
            Row(
                f"a step of attention on {given.keys:,} packed keys, {given.heads} heads of {given.head_dim},"
                f" {thread_count()} threads",
                f"nvfp4 {1e3 * ours:.2f} ms",
                f"{name}: {1e3 * theirs:.1f} ms",
                f"{theirs / ours:.1f}x",
                f"errors against unpacked keys, some channels large: {our_error:.0%} and {error:.0%}",
            ),
            given.rows_file,
        )


if __name__ == "__main__":
    main()
