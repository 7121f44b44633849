"""Products with packed weights on an NVIDIA GPU against dense bfloat16 through torch and MLX, in one run.

    python benchmarks/cuda_products.py [--sizes 1024,2048,4096,8192] [--rows 1,2,4,8,16,32,64,256,2048] [--rounds 3]
        [--formats nvfp4,mxfp4,mxfp8,int4,int8] [--anew]

x is bfloat16; packed weights go the way that marlin chooses (`ops.packed_linear`). A call is a chain of products over so many
weights that none is in the cache when its turn comes again; rounds take the sides in turn. Microseconds of kernels a product,
by torch's profiler: medians. Then of the faster dense side what each format takes, with copies that are decoded already, as
after a first prompt; with --anew in brackets where each product decodes its weight anew (MARLIN_DECODED=0), where that is
another way. All kernels of ours are compiled first, at once.
"""

import argparse
import itertools
import os
import statistics
import time

os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "200")  # a chain is one graph

import mlx.core as mx
import numpy as np
import torch

from marlin_cli.ops import cuda
from marlin_cli.ops.cuda_compile import compiled
from marlin_cli.ops.cuda_decoded import Copies
from marlin_cli.ops.cuda_kept import Types, variant
from marlin_cli.ops.cuda_kernels import SOURCES
from marlin_cli.ops.device import choose_device
from marlin_cli.ops.dispatch import packed_linear

CACHE_BYTES = 120e6  # twice the second-level cache
MOST_WEIGHTS = 48  # of a chain
FORMATS = {
    "nvfp4": ("nvfp4", 4, 16), "mxfp4": ("mxfp4", 4, 32), "mxfp8": ("mxfp8", 8, 32), "int4": ("affine", 4, 64),
    "int8": ("affine", 8, 64),
}  # fmt: skip
ANEW = Copies(0, 0)


def kernel_seconds(call) -> float:
    """Seconds that the GPU spends in kernels during `call`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize(0)
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def chain(product, weights, x):
    for weight in weights:
        x = product(x, weight)
    return x


def measured(sides: dict, rounds: int) -> dict[str, float]:
    """Medians of microseconds a product of each side (call, products), in turn after a round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for call, _ in sides.values():
        call()
    for _ in range(rounds):
        for name, (call, count) in sides.items():
            found[name].append(1e6 * kernel_seconds(call) / count)
    return {name: statistics.median(times) for name, times in found.items()}


def packed_weights(size: int, name: str) -> list[tuple[mx.array, ...]]:
    mode, bits, group = FORMATS[name]
    count = int(min(MOST_WEIGHTS, max(4, CACHE_BYTES // (size * size * bits / 8))))
    plain = (mx.random.normal((size, size)) * size**-0.5).astype(mx.bfloat16)
    packed = [mx.quantize(mx.roll(plain, i, 0), group_size=group, bits=bits, mode=mode) for i in range(count)]
    mx.eval(packed)
    return packed


def compile_all(formats: list[str], sizes: list[int], rows: list[int]) -> None:
    """The machine code of all products and of decoding, kept for this process and others."""
    texts = set()
    for name, size, count in itertools.product(formats, sizes, rows):
        mode, bits, group = FORMATS[name]
        scales = (mx.bfloat16 if mode == "affine" else mx.uint8, 2)
        packed, out = ((mx.uint32, 2), scales, scales), (mx.bfloat16,)
        how = cuda._gemm_launch(count, size, size, bits, group, mode == "affine", mx.bfloat16)
        template = tuple(how["template"])
        if not cuda._dense_is_faster(count, size, size):
            types = Types(((mx.bfloat16, 2), *packed), out)
            texts.add(variant(SOURCES["marlin_gemm_fp4"], template, types, how["threadgroup"][0]).text)
        texts.add(variant(SOURCES["unpack"], template[:4], Types(packed, out), 256).text)
    compiled(sorted(texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1024,2048,4096,8192")
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,256,2048")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--anew", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no other number of rows after so many")
    arguments = parser.parse_args()
    choose_device("cuda")
    formats, kept, begun = arguments.formats.split(","), cuda.copies, time.monotonic()
    print(
        f"mlx {mx.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name()}; us torch, us MLX; of the faster one:"
    )
    sizes, counts = ([int(each) for each in given.split(",")] for given in (arguments.sizes, arguments.rows))
    compile_all(formats, sizes, counts)
    print(f"compiled after {time.monotonic() - begun:.1f} s", flush=True)
    worst: list[tuple[float, str]] = []
    few: list[tuple[float, str]] = []  # rows of x, on large weights: the goal is half of dense time
    for size in sizes:
        count = max(4, min(MOST_WEIGHTS, int(CACHE_BYTES // (2 * size * size))))
        dense = [torch.randn(size, size, device="cuda:0", dtype=torch.bfloat16) * size**-0.5 for _ in range(count)]
        plain = [(mx.random.normal((size, size)) * size**-0.5).astype(mx.bfloat16) for _ in dense]
        mx.eval(plain)
        weights = {name: packed_weights(size, name) for name in formats}
        for rows in counts:
            if time.monotonic() - begun > arguments.seconds:
                break
            x = mx.random.normal((rows, size)).astype(mx.bfloat16)
            other = torch.randn(rows, size, device="cuda:0", dtype=torch.bfloat16)
            mx.eval(x)
            sides = {
                "torch": (lambda x=other, w=dense: chain(torch.nn.functional.linear, w, x), len(dense)),
                "MLX": (lambda x=x, w=plain: mx.eval(chain(lambda x, w: x @ w.T, w, x)), len(plain)),
            }
            for name in formats:
                mode, bits, group = FORMATS[name]

                def product(x, w, mode=mode, bits=bits, group=group):
                    return packed_linear(x, w[0], w[1], w[2] if len(w) > 2 else None, group_size=group, bits=bits, mode=mode)

                # Copies take as much memory as dense weights do, so there are as many: more would be further apart.
                own = weights[name][: len(dense)] if cuda._dense_is_faster(rows, size, size) else weights[name]

                def ours(x=x, w=own, product=product, which=kept):
                    cuda.copies = which
                    mx.eval(chain(product, w, x))

                sides[name] = (ours, len(own))
                if arguments.anew and cuda._dense_is_faster(rows, size, size):
                    sides[f"{name} anew"] = (lambda run=ours: run(which=lambda: ANEW), len(own))
                if rows in (2, 16, 64):
                    cuda.copies = kept
                    one = weights[name][0]
                    exact = mx.dequantize(*one, group_size=group, bits=bits, mode=mode).astype(mx.float32)
                    expected, found = np.array(x.astype(mx.float32) @ exact.T), np.array(product(x, one).astype(mx.float32))
                    error = np.abs(found - expected).max() / np.abs(expected).max()
                    if not error < 0.02:
                        print(f"  {name} {size} {rows} rows: WRONG by {error:.3f}")
            times = measured(sides, arguments.rounds)
            fastest = min(times["torch"], times["MLX"])
            cells = []
            for name in formats:
                anew = times.get(f"{name} anew")
                cells.append(f"{name} {times[name] / fastest:.2f}" + ("" if anew is None else f" ({anew / fastest:.2f})"))
                worst.append((times[name] / fastest, f"{name} {size} x {rows}"))
                few += worst[-1:] if rows <= 16 and size >= 4096 else []
            print(f"{size:5} M={rows:4}: {times['torch']:6.1f} {times['MLX']:6.1f}; " + ", ".join(cells), flush=True)
        del weights, plain, dense
    worst.sort(reverse=True)
    beyond = [each for each in worst if each[0] > 1.05]
    print(f"beyond 1.05: {len(beyond)} of {len(worst)}: " + ", ".join(f"{cell} {ratio:.2f}" for ratio, cell in beyond[:30]))
    for name in formats if few else []:
        ratio, cell = max(each for each in few if each[1].startswith(f"{name} "))
        print(f"least speed-up up to 16 rows, from 4096 on: {1 / ratio:.2f} ({cell})")
    print(f"{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
