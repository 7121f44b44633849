"""Attention on an NVIDIA GPU: the kernels of marlin_cli.ops.cuda and the reference (MLX's own operations), in one run.

    python benchmarks/cuda_attention.py [--rounds 5]

Microseconds that the GPU spends in kernels for one call, by torch's profiler (which has to be there), medians of rounds that
take turns; outputs are compared. Decoding reads all keys and values at every step, so its bytes over its time are shown too.
"""

import argparse
import statistics

import mlx.core as mx
import numpy as np
import torch

from marlin_cli.ops import cuda, reference
from marlin_cli.ops.reference import Packed, pack_rows

CALLS = 10


def chain(attend, queries):
    """CALLS calls, each with the output of the one before as its queries: what does not depend on each other runs at once."""
    for _ in range(CALLS):
        queries = attend(queries)
    mx.eval(queries)


def kernel_microseconds(attend, queries) -> float:
    """What the GPU spends in kernels for one of CALLS calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        chain(attend, queries)
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / CALLS


def nbytes(pages) -> int:
    return sum(page.packed.nbytes + page.scales.nbytes if isinstance(page, Packed) else page.nbytes for page in pages)


def show(name: str, calls: dict, queries: mx.array, rounds: int, read: dict[str, int] | None = None) -> None:
    """Times of each of `calls`, and how far each output is from the first one's."""
    outputs = {side: np.array(call(queries).astype(mx.float32)) for side, call in calls.items()}
    times = {side: [] for side in calls}
    for call in calls.values():
        chain(call, queries)
    for _ in range(rounds):
        for side, call in calls.items():
            times[side].append(kernel_microseconds(call, queries))
    first = next(iter(outputs.values()))
    shown = []
    for side in calls:
        took = statistics.median(times[side])
        speed = "" if read is None else f", {read[side] / took / 1e3:.0f} GB/s"
        error = np.abs(outputs[side] - first).max() / np.abs(first).max()
        shown.append(f"{side} {took:.1f}{speed} (differs {error:.0e})")
    print(f"{name}: " + "; ".join(shown), flush=True)


def decoding(heads: int, kv_heads: int, total: int, page: int, rounds: int) -> None:
    """One row of queries over pages of packed and of 16-bit keys and values."""
    head_dim, dtype = 128, mx.bfloat16
    queries = mx.random.normal((1, heads, 1, head_dim)).astype(dtype)
    rows = [[mx.random.normal((1, kv_heads, page, head_dim)).astype(dtype) for _ in range(total // page)] for _ in range(2)]
    four, eight = ([[pack_rows(part, bits) for part in side] for side in rows] for bits in (4, 8))
    whole = [mx.concatenate(side, axis=2) for side in rows]
    mx.eval(queries, rows, four, eight, whole)
    scale = head_dim**-0.5
    calls = {
        "MLX 16 bit, one array": lambda q: reference.attention(q, *whole, scale),
        "ours 16 bit": lambda q: cuda.paged_attention(q, *rows, scale),
        "ours mxfp8": lambda q: cuda.paged_attention(q, *eight, scale),
        "ours nvfp4": lambda q: cuda.paged_attention(q, *four, scale),
        "reference nvfp4": lambda q: reference.paged_attention(q, *four, scale),
    }
    held = {16: nbytes(rows[0] + rows[1]), 8: nbytes(eight[0] + eight[1]), 4: nbytes(four[0] + four[1])}
    show(
        f"decoding, {heads} heads on {kv_heads}, {total} keys in pages of {page}",
        calls,
        queries,
        rounds,
        dict(zip(calls, (held[16], held[16], held[8], held[4], held[4]), strict=True)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.zeros(1, device="cuda")
    print(f"mlx {mx.__version__}, {mx.device_info().get('device_name', 'a GPU')}; microseconds of kernels a call, bfloat16")
    decoding(16, 16, 4096, 512, rounds)
    decoding(32, 8, 32768, 4096, rounds)

    def sides(name, queries, *arrays, **options):
        mx.eval(queries, arrays)
        calls = {"reference": reference.attention, "ours": cuda.attention}
        show(name, {side: lambda q, f=f: f(q, *arrays, 0.125, **options) for side, f in calls.items()}, queries, rounds)

    def random(*shape):
        return mx.random.normal(shape).astype(mx.bfloat16)

    bias = random(6, 257)
    sides("T5 decoding, 6 heads, 1024 keys, relative bias", *(random(1, 6, n, 64) for n in (1, 1024, 1024)), relative_bias=bias)
    sides("T5 encoding, 64 rows, relative bias", *(random(4, 6, 64, 64) for _ in range(3)), relative_bias=bias, causal=False)
    sides("512 patches of 8, 8 heads", *(random(512, 8, 8, 64) for _ in range(3)))
    lengths = mx.array([4096, 1000, 3000, 2000])
    cross = [random(4, 6, n, 64) for n in (4, 4096, 4096)]
    sides("cross attention, 4 rows on 4096, lengths", *cross, causal=False, lengths=lengths)


if __name__ == "__main__":
    main()
