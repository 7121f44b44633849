"""How fast this machine copies and reads memory, measured on the device that models run on."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from marlin_cli.ops.layers import Linear

SIDE = 8192  # of a float32 matrix: 256 MiB, more than the caches of a processor hold


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second, medians."""

    copy: float  # bytes read and bytes written
    matvec: float  # bytes of the matrix, in the product that the models use


def measure_bandwidth(side: int = SIDE, repeats: int = 5, clock: Callable[[], float] = time.perf_counter) -> Bandwidth:
    """Copy a matrix [side, side] and multiply it with a vector, in turn, after a round that does not count."""
    layer = Linear(side, side, bias=False)
    vector = mx.ones((1, side))
    mx.eval(layer.parameters(), vector)
    copies, products = [], []
    for _ in range(repeats + 1):
        start = clock()
        mx.eval(layer.weight + 0)
        middle = clock()
        mx.eval(layer(vector))
        copies.append(middle - start)
        products.append(clock() - middle)
    size = layer.weight.nbytes
    return Bandwidth(2 * size / statistics.median(copies[1:]), size / statistics.median(products[1:]))
