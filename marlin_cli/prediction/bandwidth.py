"""How fast this machine copies memory and reads weights in products, measured on the device that models run on."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from marlin_cli.ops.cpu import thread_count
from marlin_cli.ops.layers import Linear
from marlin_cli.quantization.encoders import Packed, mlx_encode
from marlin_cli.quantization.formats import FORMATS
from marlin_cli.quantization.layers import packed_layer

CHAIN = 32  # products or copies in one evaluation of a GPU, which reads the matrix in less time than the host asks for it
SIDE = 8192  # of a float32 matrix: 256 MiB, more than the caches of a processor hold


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second: the best of the repeats, as what slows a machine down is others' work."""

    copy: float  # bytes read and bytes written
    matvec: float  # bytes of a float32 matrix, in the product that the models use
    packed: dict[str, float] = field(default_factory=dict)  # the same by format, scales among the bytes

    def of(self, format: str | None) -> float:
        """Bytes per second at which weights of a format, or dense ones (None), are read in a product."""
        return self.matvec if format is None else self.packed[format]


def measure_bandwidth(
    formats: Sequence[str] = (),
    side: int = SIDE,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    *,
    activation_bits: int = 16,
) -> Bandwidth:
    """Copy a matrix [side, side] of float32, and multiply it and packed ones of as many bytes in all with a vector.

    Args:
        formats: names of packed formats to measure too.
        activation_bits: of what packed weights multiply.

    On a GPU products of chains stand for packed weights too: there kernels that take a network whole read them, as fast as
    memory gives them, while MLX's products of one row each wait for the host.
    """
    layer = Linear(side, side, bias=False)
    mx.eval(layer.parameters())
    size = layer.weight.nbytes
    if mx.default_device() != mx.Device(mx.cpu):
        copies, products = _chains(layer)
        copy, matvec = (_best(run, repeats, clock) / CHAIN for run in (copies, products))
        return Bandwidth(2 * size / copy, size / matvec, dict.fromkeys(formats, size / matvec))
    copy = _best(_copy_of(layer.weight), repeats, clock)
    matvec = _best(lambda: _product([layer], side), repeats, clock)
    packed = {}
    for name in formats:
        # Several packed matrices in turn, together as large as the dense one: no cache keeps them.
        arrays = mlx_encode(layer.weight[: side // 4, : side // 4], FORMATS[name], FORMATS[name].group_sizes[0])
        one = packed_layer(arrays, None)
        bytes_of_one = sum(array.nbytes for array in one.parameters().values())
        layers = [one, *(packed_layer(again(arrays), None) for _ in range(max(1, size // 4 // bytes_of_one)))]
        mx.eval([each.parameters() for each in layers])
        for each in layers:
            each.activation_bits = activation_bits
        seconds = _best(functools.partial(_product, layers, side // 4), repeats, clock)
        packed[name] = len(layers) * bytes_of_one / seconds
    return Bandwidth(2 * size / copy, size / matvec, packed)


def again(packed: Packed) -> Packed:
    """The same packed weights elsewhere in memory."""
    biases = None if packed.biases is None else packed.biases + 0
    return dataclasses.replace(packed, weight=packed.weight + 0, scales=packed.scales + 0, biases=biases)


def _best(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Seconds of the fastest run, after one that does not count."""
    taken = []
    for _ in range(repeats + 1):
        start = clock()
        run()
        taken.append(clock() - start)
    return min(taken[1:])


def _product(layers: Sequence[Callable[[mx.array], mx.array]], width: int) -> None:
    """A vector through each layer, one after another."""
    x = mx.ones((1, width))
    for layer in layers:
        x = layer(x)
    mx.eval(x)


def _chains(layer: Linear) -> tuple[Callable[[], object], Callable[[], object]]:
    """Copies of a matrix, and products of a vector with it, in turn."""

    def copies() -> None:
        rows = layer.weight
        for _ in range(CHAIN):
            rows = rows + 1
        mx.eval(rows)

    return copies, lambda: _product([layer] * CHAIN, layer.weight.shape[1])


def _copy_of(source: mx.array) -> Callable[[], object]:
    """A copy of an array into memory that is there: MLX asks the system for new pages, which takes longer."""
    threads = thread_count()
    parts = np.array_split(np.array(source).reshape(-1), threads)
    targets = np.array_split(np.zeros(source.size, dtype=np.float32), threads)
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(np.copyto, targets, parts))
