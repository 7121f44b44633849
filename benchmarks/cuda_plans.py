"""Plans of `marlin_gemm_fp4` on an NVIDIA GPU: tiles, stages and warps of a block, by format, size and rows of x.

    python benchmarks/cuda_plans.py [--formats nvfp4,int4,mxfp8,int8] [--sizes 1024,2048,4096,8192] [--rows 1,16,32,64]
        [--seconds 60]

x is bfloat16, weights are square. Microseconds a product by torch's profiler, of a chain over weights that are not in the cache
when their turn comes: the plan in use, and the three fastest of all that fit (row tiles/x tiles/stages/warps, with `+` where
registers are bounded so that 512 threads run together), whose results are compared with those of the plan in use.
"""

import argparse
import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
from cuda_products import FORMATS, chain, kernel_seconds, packed_weights

from marlin_cli.ops import cuda
from marlin_cli.ops.cuda_compile import machine_code
from marlin_cli.ops.cuda_kept import Types, variant
from marlin_cli.ops.cuda_kernels import SOURCES
from marlin_cli.ops.device import choose_device

MOST_SHARED_BYTES = 48 << 10
SOURCE = SOURCES["marlin_gemm_fp4"]


def plans(rows: int) -> list[dict]:
    """All that are worth trying for so many rows of x."""
    x_tiles = (1,) if rows <= 8 else (2,) if rows <= 16 else (2, 4) if rows <= 32 else (4,)
    found = []
    for x, tiles, stages, warps, bounded in itertools.product(x_tiles, (1, 2), (1, 2, 3, 4), (8, 16), (True, False)):
        fits = 4 * warps * 8 * x * 16 * tiles <= MOST_SHARED_BYTES and tiles * x * stages <= 8 and (bounded or warps == 8)
        if fits:
            plan = {"ROW_TILES": tiles, "X_TILES": x, "STAGES": stages, "WARPS": warps}
            found.append({**plan, "TOGETHER": 512 * bounded, "X_SHARED": False})
    return found


def label_of(plan: dict) -> str:
    sizes = "/".join(str(plan[key]) for key in ("ROW_TILES", "X_TILES", "STAGES", "WARPS"))
    return f"{sizes}+" if plan["TOGETHER"] else sizes


def compile_all(formats: list[str], rows: list[int]) -> None:
    texts = set()
    for name in formats:
        mode, bits, group = FORMATS[name]
        scales = (mx.bfloat16 if mode == "affine" else mx.uint8, 2)
        types = Types(((mx.bfloat16, 2), (mx.uint32, 2), scales, scales), (mx.bfloat16,))
        begin = (("T", mx.bfloat16), ("BITS", bits), ("GROUP", group), ("AFFINE", mode == "affine"))
        for count in rows:
            for plan in plans(count):
                texts.add(variant(SOURCE, (*begin, *plan.items()), types, 32 * plan["WARPS"]).text)
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(machine_code, texts))
    print(f"{len(texts)} variants", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="nvfp4,int4,mxfp8,int8")
    parser.add_argument("--sizes", default="1024,2048,4096,8192")
    parser.add_argument("--rows", default="1,16,32,64")
    parser.add_argument("--seconds", type=float, default=60.0, help="begin nothing after so many")
    arguments = parser.parse_args()
    choose_device("cuda")
    formats, begun = arguments.formats.split(","), time.monotonic()
    sizes, counts = ([int(each) for each in given.split(",")] for given in (arguments.sizes, arguments.rows))
    compile_all(formats, counts)
    print(f"compiled after {time.monotonic() - begun:.1f} s", flush=True)
    own_plan = cuda._gemm_plan
    cuda._dense_is_faster = lambda *_: False
    for size, name in itertools.product(sizes, formats):
        mode, bits, group = FORMATS[name]
        weights = packed_weights(size, name)

        def product(x, w, mode=mode, bits=bits, group=group):
            zeros = w[2] if len(w) > 2 else None
            return cuda.packed_linear(x, w[0], w[1], zeros, group_size=group, bits=bits, mode=mode)

        for rows in counts:
            if time.monotonic() - begun > arguments.seconds:
                return
            x = mx.random.normal((rows, size)).astype(mx.bfloat16)

            def run(plan=None, x=x, weights=weights):
                cuda._gemm_plan = own_plan if plan is None else lambda *_: plan
                cuda._gemm_launch.cache_clear()
                mx.eval(product(x, weights[0]))
                result = np.array(product(x, weights[0]).astype(mx.float32))
                times = [1e6 * kernel_seconds(lambda: mx.eval(chain(product, weights, x))) / len(weights) for _ in range(2)]
                return min(times), result

            usual, expected = run()
            found = []
            for plan in plans(rows):
                took, result = run(plan)
                label = label_of(plan)
                same = np.abs(result - expected).max() <= 0.02 * np.abs(expected).max()
                found.append((took, label + ("" if same else " WRONG")))
            own = own_plan(rows, size, size, bits, mx.bfloat16)
            label = label_of(own)
            best = ", ".join(f"{label} {took:.1f}" for took, label in sorted(found)[:4])
            print(f"{size:5} M={rows:3} {name}: {label} {usual:.1f}; best {best}", flush=True)


if __name__ == "__main__":
    main()
