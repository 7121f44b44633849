"""The values a packed weight can take once its scales are fixed, in numpy: what error feedback and distillation move on."""

import dataclasses
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.quantization.encoders import Packed, e2m1_codes, pack_codes

Floats = npt.NDArray[np.float32]

SMALLEST_SCALE_CODE = 1  # a scale of zero would lose its group


@dataclass(frozen=True)
class Grid:
    """Scales and biases [rows, columns / group_size] of a packed weight as float32: value = level * scale + bias."""

    scales: Floats
    biases: Floats | None
    packed: Packed

    def expanded(self) -> tuple[Floats, Floats | float]:
        """Scale and bias of every weight: [rows, columns]."""
        size = self.packed.group_size
        return np.repeat(self.scales, size, axis=1), 0.0 if self.biases is None else np.repeat(self.biases, size, axis=1)

    def round_levels(self, levels: Floats) -> Floats:
        """The nearest levels of the format."""
        mode, bits = self.packed.format.mode, self.packed.format.bits
        if mode == "affine":
            return np.clip(np.rint(levels), 0, (1 << bits) - 1)
        return round_e2m1(levels) if bits == 4 else _round_e4m3(levels)

    def scale_steps(self) -> Floats | None:
        """Every scale that the format can store, ascending; None where scales are floats."""
        if self.packed.biases is not None:
            return None
        return _scale_table(self.packed)

    def with_scales(self, scales: Floats, biases: Floats | None = None) -> "Grid":
        """The grid with other scales, and biases where there are some, [rows, columns / group_size], as stored."""
        if biases is not None:
            stored = self.packed.scales.dtype
            packed = dataclasses.replace(
                self.packed, scales=mx.array(scales).astype(stored), biases=mx.array(biases).astype(stored)
            )
        else:
            table = _scale_table(self.packed)
            nearest = np.searchsorted((table[1:] + table[:-1]) / 2, scales)
            packed = dataclasses.replace(self.packed, scales=mx.array((nearest + SMALLEST_SCALE_CODE).astype(np.uint8)))
        return grid_of(packed)

    def pack(self, levels: Floats) -> Packed:
        """The packed weight with these levels [rows, columns] under the grid's scales."""
        bits = self.packed.format.bits
        array = mx.array(levels)
        if self.packed.format.mode == "affine":
            codes = array.astype(mx.uint8)
        else:
            codes = e2m1_codes(array, mx.abs(array)) if bits == 4 else mx.to_fp8(array)
        return dataclasses.replace(self.packed, weight=pack_codes(codes, bits))


def grid_of(packed: Packed) -> Grid:
    """The grid of a packed weight's scales."""
    return Grid(scales_of(packed), None if packed.biases is None else np.array(packed.biases.astype(mx.float32)), packed)


def scales_of(packed: Packed) -> Floats:
    """Scales as float32, the tensor's power of two included: [rows, columns / group_size]. A zero becomes 1."""
    if packed.format.mode == "nvfp4":
        scales = np.array(mx.from_fp8(packed.scales, mx.float32)) * np.float32(packed.global_scale or 1.0)
    elif packed.biases is None:
        scales = np.ldexp(np.float32(1), np.array(packed.scales).astype(np.int32) - 127)
    else:
        scales = np.array(packed.scales.astype(mx.float32))
    return np.where(scales == 0, np.float32(1), scales).astype(np.float32)


def _scale_table(packed: Packed) -> Floats:
    """The positive finite scales of codes from `SMALLEST_SCALE_CODE` on, ascending."""
    if packed.format.mode == "nvfp4":
        codes = mx.arange(SMALLEST_SCALE_CODE, 127, dtype=mx.uint8)
        return np.array(mx.from_fp8(codes, mx.float32)) * np.float32(packed.global_scale or 1.0)
    return np.ldexp(np.float32(1), np.arange(SMALLEST_SCALE_CODE, 254) - 127).astype(np.float32)


def round_e2m1(levels: Floats) -> Floats:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
    magnitude = np.abs(levels)
    step = np.where(magnitude < 2, np.float32(0.5), np.where(magnitude < 4, np.float32(1), np.float32(2)))
    return np.copysign(np.minimum(np.rint(magnitude / step) * step, np.float32(6)), levels).astype(np.float32)


def _round_e4m3(levels: Floats) -> Floats:
    return np.array(mx.from_fp8(mx.to_fp8(mx.array(np.clip(levels, -448, 448).astype(np.float32))), mx.float32))
