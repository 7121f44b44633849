"""Weights decoded once and kept beside the packed ones, for dense products of many rows, where a GPU has memory to spare.

Decoding a weight for each product costs as much as the product of 256 rows does. A copy in 16 bits lives as long as its packed
weight; where there is no room for one, the weight is decoded each time.
"""

import functools
import os
import weakref
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from marlin_cli.errors import UsageError
from marlin_cli.ops.cuda_driver import memory_bytes
from marlin_cli.text import quoted

DEFAULT_SHARE = 0.25  # of the device's memory
MOST_IN_USE = 0.5  # of it, copies among it: beyond that memory is somebody's who needs it more


class _Copy(NamedTuple):
    weight: "weakref.ref[mx.array]"
    decoded: mx.array


class Copies:
    """Decoded copies by weight and type.

    Args:
        most_bytes: of all copies.
        most_in_use: bytes of MLX's memory, copies among it, beyond which no more are kept.
    """

    def __init__(self, most_bytes: int, most_in_use: int) -> None:
        self._most_bytes, self._most_in_use = most_bytes, most_in_use
        self._kept: dict[tuple[int, str], _Copy] = {}
        self.bytes = 0

    def of(self, weight: mx.array, dtype: mx.Dtype, size: int, make: Callable[[], mx.array]) -> mx.array | None:
        """What `make` gave of `weight` in `dtype` once, `size` bytes; None where there is no room to keep them."""
        key = (id(weight), str(dtype))
        kept = self._kept.get(key)
        if kept is not None and kept.weight() is weight:
            return kept.decoded
        if self.bytes + size > self._most_bytes or mx.get_active_memory() + size > self._most_in_use:
            return None
        decoded = make()
        mx.eval(decoded)  # also where a graph is being traced: the copy is no part of it
        self._kept[key] = _Copy(weakref.ref(weight, lambda _: self._forget(key, size)), decoded)
        self.bytes += size
        return decoded

    def _forget(self, key: tuple[int, str], size: int) -> None:
        if self._kept.pop(key, None) is not None:
            self.bytes -= size


@functools.cache
def copies() -> Copies:
    """The copies of this process on the first device."""
    memory = memory_bytes()
    return Copies(int(share() * memory), int(MOST_IN_USE * memory))


def share() -> float:
    """MARLIN_DECODED: the share of the GPU's memory that decoded copies may take, 0.25 unless told.

    Raises:
        UsageError: no number from 0 to 1.
    """
    told = os.environ.get("MARLIN_DECODED", str(DEFAULT_SHARE))
    try:
        found = float(told)
    except ValueError:
        found = -1.0
    if not 0.0 <= found <= 1.0:
        raise UsageError(f"MARLIN_DECODED must be a share of the GPU's memory from 0 to 1, found {quoted(told)}")
    return found
