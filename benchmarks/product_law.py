"""The law of packed products: at most 1.05 of the dense one's time, and 8-bit activations at most what float32 ones take.

    python benchmarks/product_law.py [--march native,x86-64-v3] [--rows 1,8] [--shapes KxN] [--formats nvfp4] [--peer|--exact]

Every format by every number of rows, shape, activation width and build that this processor runs. A cell's sides take turns on
the same x, and the shortest time of each counts. Prints a line a cell, then the worst of each build. `--peer` times
mx.quantized_matmul beside them (one thread, whatever it is given), `--exact` the same products with MARLIN_ROWS=exact, whose
price it prints. Each build is a process of its own, with kernels built for
that processor (MARLIN_MARCH) and kept in the cache.
"""

import argparse
import os
import subprocess
import sys
import time
from typing import NamedTuple

import mlx.core as mx

from marlin_cli.ops.cpu import kernels, thread_count
from marlin_cli.ops.tune import PACKING

ROWS = "1,2,3,4,8,16,32,64,256,1024"
SHAPES = "256x256,1024x1024,1472x3584,3584x1472,4096x4096"
MOST_DENSE, MOST_ROUNDED = 1.05, 1.0
SECONDS_A_TURN = 4e-3


class Cell(NamedTuple):
    """One product: its time over the dense one's, and that with 8-bit activations over its own (0 where there is none)."""

    name: str
    over_dense: float
    rounded_over_own: float

    @property
    def excess(self) -> float:
        """How far beyond the law, 1 being at its edge."""
        return max(self.over_dense / MOST_DENSE, self.rounded_over_own / MOST_ROUNDED)


def cells(module, formats, shapes, counts, rounds: int, peer: bool, exact: bool):
    for depth, columns in shapes:
        weight = mx.random.normal((columns, depth)) * depth**-0.5
        mx.eval(weight)
        for name in formats:
            settings = PACKING[name]
            packed = mx.quantize(weight, **settings)
            words, scales, biases = packed if len(packed) == 3 else (*packed, None)
            mx.eval(packed)
            kind = getattr(module.Kind, name)
            for rows in counts:
                x = mx.random.normal((rows, depth))
                mx.eval(x)

                def ours(bits, x=x, words=words, scales=scales, biases=biases, kind=kind, group_size=settings["group_size"]):
                    return module.marlin_gemm(x, words, scales, biases, kind, group_size, bits)

                sides = {
                    "dense": lambda x=x, weight=weight: module.linear(x, weight),
                    "16": lambda ours=ours: ours(16),
                    **({} if name == "mxfp8" else {"8": lambda ours=ours: ours(8)}),
                }
                if peer:
                    sides["mlx"] = lambda x=x, w=words, s=scales, b=biases, o=settings: mx.quantized_matmul(x, w, s, b, **o)
                if exact:
                    sides |= {f"exact {key}": side for key, side in sides.items() if key != "mlx"}
                took = turns(module, sides, rounds)
                way = [module.chosen_way(kind, columns, depth, settings["group_size"], rows, bits) for bits in (16, 8)]
                cell = Cell(f"{name} {depth}x{columns} M={rows}", took["16"] / took["dense"], took.get("8", 0.0) / took["16"])
                read = (words.nbytes + scales.nbytes + (0 if biases is None else biases.nbytes)) / took["16"]
                print(
                    f"{cell.name}: {1e6 * took['16']:.0f} us by {way[0]}, {cell.over_dense:.2f} of dense,"
                    f" {read / 1e9:.1f} GB/s;"
                    + (f" 8-bit activations {cell.rounded_over_own:.2f} of that, by {way[1]}" if "8" in took else "")
                    + (
                        " exact"
                        + "".join(
                            f" {key} {took[f'exact {key}'] / took[key]:.2f}," for key in ("16", "8", "dense") if key in took
                        )
                        if exact
                        else ""
                    )
                    + (f"; mx.quantized_matmul {took['mlx'] / took['16']:.1f}x slower" if peer else ""),
                    flush=True,
                )
                yield cell


def turns(module, sides, rounds: int) -> dict[str, float]:
    """Seconds of each side, the shortest of so many turns."""

    def seconds(key: str, count: int) -> float:
        side = sides[key]
        module.set_exact_rows(key.startswith("exact"))
        start = time.perf_counter()
        mx.eval([side() for _ in range(count)])
        return (time.perf_counter() - start) / count

    counts = {key: max(1, int(SECONDS_A_TURN / max(seconds(key, 1), 1e-7))) for key in sides}
    each = [{key: seconds(key, counts[key]) for key in sides} for _ in range(rounds)]
    module.set_exact_rows(False)
    return {key: min(turn[key] for turn in each) for key in sides}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--march")
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--shapes", default=SHAPES, help="depth x columns")
    parser.add_argument("--formats", default=",".join(PACKING))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--exact", action="store_true")
    arguments = parser.parse_args()
    if arguments.march:
        rest = [f"--{key}={value}" for key, value in vars(arguments).items() if key not in ("march", "peer", "exact")]
        rest += [f"--{key}" for key in ("peer", "exact") if getattr(arguments, key)]
        for march in arguments.march.split(","):
            subprocess.run([sys.executable, __file__, *rest], env={**os.environ, "MARLIN_MARCH": march}, check=True)
        return
    module, reason = kernels()
    if module is None:
        raise SystemExit(f"no CPU kernels: {reason}")
    mx.set_default_device(mx.cpu)
    print(f"{module.processor_class()}, {thread_count()} threads; {reason}; mlx {mx.__version__}", flush=True)
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
    rows = list(map(int, arguments.rows.split(",")))
    found = sorted(
        cells(module, arguments.formats.split(","), shapes, rows, arguments.rounds, arguments.peer, arguments.exact),
        key=lambda cell: -cell.excess,
    )
    beyond = [cell for cell in found if cell.excess > 1]
    print(f"{module.processor_class()}: {len(beyond)} of {len(found)} cells beyond the law; the worst:")
    for cell in found[:5]:
        print(f"  {cell.name}: {cell.over_dense:.2f} of dense, 8-bit activations {cell.rounded_over_own:.2f} of float32 ones")


if __name__ == "__main__":
    main()
