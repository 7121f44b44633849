"""Products with packed weights on an NVIDIA GPU: marlin_gemm_fp4, MLX and torch (bfloat16 weights), in one run.

    python benchmarks/cuda_products.py [--sizes 4096,8192] [--rows 1,2,4,8,16,32,64,256,2048] [--rounds 7] [--mlx]

Each call is a chain of products, each the next one's x, over so many weights that none is in the cache when its turn comes
again. Rounds interleave the sides. Medians of what the GPU spends in kernels a product (by torch's profiler, where torch is
there), and of the time on the clock, which has MLX's own work on the host in it. The outputs of the chains are compared.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "200")  # a chain is one graph

import mlx.core as mx
import numpy as np

from marlin_cli.ops import cuda

try:
    import torch
except ImportError:
    torch = None

CACHE_BYTES = 200e6  # several times the largest second-level cache
FORMATS = {"nvfp4": (4, 16), "mxfp4": (4, 32), "mxfp8": (8, 32)}


def kernel_seconds(call) -> float | None:
    """Seconds that the GPU spends in kernels during `call`; None without torch's profiler."""
    if torch is None:
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def clock_seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(calls: dict, rounds: int) -> dict[str, tuple[float, float | None]]:
    """Medians of (clock, kernels) seconds of each call, run in turn after one round that does not count."""
    clock = {name: [] for name in calls}
    kernels = {name: [] for name in calls}
    for round in range(rounds + 1):
        for name, call in calls.items():
            took = clock_seconds(call)
            if round:
                clock[name].append(took)
    for _ in range(3):
        for name, call in calls.items():
            kernels[name].append(kernel_seconds(call))
    return {
        name: (statistics.median(clock[name]), None if kernels[name][0] is None else statistics.median(kernels[name]))
        for name in calls
    }


def chain(product, weights, x):
    for weight in weights:
        x = product(x, weight)
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="4096,8192")
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,256,2048")
    parser.add_argument("--formats", default="nvfp4,mxfp8")
    parser.add_argument("--types", default="bfloat16,float16,float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--mlx", action="store_true", help="MLX's products of 8 rows and more too, which it compiles for a minute"
    )
    arguments = parser.parse_args()
    print(f"mlx {mx.__version__}, {mx.device_info().get('device_name', 'a GPU')}; microseconds a product: kernels (clock)")
    for size in map(int, arguments.sizes.split(",")):
        for format in arguments.formats.split(","):
            bits, group = FORMATS[format]
            settings = {"group_size": group, "bits": bits, "mode": format}
            count = max(8, round(CACHE_BYTES / (size * size * bits / 8)))
            packed = [mx.quantize(mx.random.normal((size, size)) * size**-0.5, **settings) for _ in range(count)]
            mx.eval(packed)
            read = packed[0][0].nbytes + packed[0][1].nbytes
            dense = (
                [torch.randn(size, size, device="cuda", dtype=torch.bfloat16) * size**-0.5 for _ in range(8)] if torch else []
            )
            for dtype in (getattr(mx, name) for name in arguments.types.split(",")):
                for rows in map(int, arguments.rows.split(",")):
                    x = mx.random.normal((rows, size)).astype(dtype)
                    mx.eval(x)

                    def ours(x=x, packed=packed, settings=settings):
                        return chain(lambda x, w: cuda.packed_linear(x, *w, None, **settings), packed, x)

                    def theirs(x=x, packed=packed, settings=settings):
                        return chain(lambda x, w: mx.quantized_matmul(x, *w, transpose=True, **settings), packed, x)

                    def plain(x=x, packed=packed, settings=settings):
                        return chain(lambda x, w: x @ mx.dequantize(*w, **settings, dtype=x.dtype).T, packed, x)

                    # MLX's decoding and dense product stand for its own where that takes long to begin.
                    other_side = theirs if arguments.mlx or rows < cuda.FEW_ROWS else plain
                    calls = {"ours": lambda call=ours: mx.eval(call()), "mlx": lambda call=other_side: mx.eval(call())}
                    if torch and dtype == mx.bfloat16:
                        other = torch.randn(rows, size, device="cuda", dtype=torch.bfloat16)

                        def torchs(x=other, dense=dense):
                            chain(torch.nn.functional.linear, dense, x)
                            torch.cuda.synchronize()

                        calls["torch"] = torchs
                    medians = measure(calls, arguments.rounds)
                    one, other_one = (np.array(call()[0].astype(mx.float32)) for call in (ours, other_side))
                    error = np.abs(one - other_one).max() / np.abs(other_one).max()
                    products = {"ours": count, "mlx": count, "torch": len(dense)}
                    times = {
                        name: [None if t is None else 1e6 * t / products[name] for t in pair] for name, pair in medians.items()
                    }
                    shown = ", ".join(
                        f"{name} {'-' if kernels is None else f'{kernels:.1f}'} ({clock:.1f})"
                        for name, (clock, kernels) in times.items()
                    )
                    fast, slow = (times[name][1] or times[name][0] for name in ("ours", "mlx"))
                    print(
                        f"{format} {str(dtype).removeprefix('mlx.core.'):8} K=N={size} M={rows:2}: {shown};"
                        f" {slow / fast:.2f}x MLX, {read / fast / 1e3:.0f} GB/s, chain of {count} differs by {error:.0e}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
