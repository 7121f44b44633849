"""Measures which way of multiplying packed weights is the fastest on this machine, and keeps the table beside the kernels.

    python -m marlin_cli.ops.tune [--print]

Ways take turns on the same product, and the shortest time of each counts, so that other work on the machine disturbs little.
"""

import argparse
import json
import os
import tempfile
import time
from typing import Any

import mlx.core as mx

from marlin_cli import console
from marlin_cli.ops.cpu import kernels
from marlin_cli.ops.ways import SIZES, keys, line_of, measured_file

PACKING: dict[str, dict[str, Any]] = {
    "nvfp4": {"mode": "nvfp4", "group_size": 16, "bits": 4},
    "mxfp4": {"mode": "mxfp4", "group_size": 32, "bits": 4},
    "mxfp8": {"mode": "mxfp8", "group_size": 32, "bits": 8},
    "int4": {"mode": "affine", "group_size": 64, "bits": 4},
    "int8": {"mode": "affine", "group_size": 64, "bits": 8},
}
ROWS = (1, 2, 3, 4, 6, 8, 16, 32, 64, 128)
SHAPES = {"small": (768, 768), "large": (1536, 3584)}  # columns and depth of the weight
ROUNDS = 5
HOPELESS = 2.0  # a way so many times slower than the best is not tried with more rows, unless it is
FOR_MANY_ROWS = ("panels", "tiles", "whole_columns")
NO_FASTER = 0.97  # another way has to win by so much
SECONDS_A_TURN = 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print", action="store_true", help="print the table, as kernels/ways.json has it, and keep nothing")
    arguments = parser.parse_args()
    mx.set_default_device(mx.cpu)
    module, reason = kernels()
    if module is None:
        raise SystemExit(f"no CPU kernels: {reason}")
    table = {key: line_of(fastest_ways(module, *settings)) for key, settings in keys().items()}
    text = json.dumps({module.processor_class(): table} if arguments.print else table, indent=1)
    if arguments.print:
        print(text)
        return
    file = measured_file(module)
    handle, name = tempfile.mkstemp(dir=file.parent)  # of mode 0600
    with open(handle, "w", encoding="utf-8") as out:
        out.write(text)
    os.replace(name, file)
    console.note(f"{file} says which way of multiplying is the fastest here; delete it to have the shipped choices again")


def fastest_ways(module: Any, name: str, activation_bits: int, size: str) -> dict[int, str]:
    """The fastest way at each of `ROWS`."""
    columns, depth = SHAPES[size]
    packed = mx.quantize(mx.random.normal((columns, depth)), **PACKING[name])
    weight, scales, biases = packed if len(packed) == 3 else (*packed, None)
    kind, group_size = getattr(module.Kind, name), PACKING[name]["group_size"]
    mx.eval(packed)

    def seconds(x: mx.array, way: str, count: int) -> float:
        module.set_ways(kind, activation_bits, SIZES.index(size) == 1, [(0, way)])
        start = time.perf_counter()
        mx.eval([module.marlin_gemm(x, weight, scales, biases, kind, group_size, activation_bits) for _ in range(count)])
        return (time.perf_counter() - start) / count

    best: dict[int, str] = {}
    ways, before = module.way_names(kind, activation_bits), None
    for rows in ROWS:
        x = mx.random.normal((rows, depth))
        mx.eval(x)
        counts = {way: max(1, int(SECONDS_A_TURN / seconds(x, way, 1))) for way in ways}
        turns = [{way: seconds(x, way, counts[way]) for way in ways} for _ in range(ROUNDS)]
        took = {way: min(turn[way] for turn in turns) for way in ways}
        fastest = min(ways, key=took.__getitem__)
        if before in took and took[fastest] > NO_FASTER * took[before]:
            fastest = before
        ways = [way for way in ways if took[way] < HOPELESS * took[fastest] or way in FOR_MANY_ROWS]
        best[rows] = before = fastest
    return best


if __name__ == "__main__":
    main()
