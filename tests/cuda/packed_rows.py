"""Rows of keys and values packed as MLX packs them on an NVIDIA GPU, whose rules of rounding are others than on a CPU."""

import mlx.core as mx
import numpy as np

from marlin_cli.ops import reference
from marlin_cli.ops.reference import PACKED_MODES, Packed

# Magnitudes by code.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E4M3 = np.array(
    [code / 8 * 2.0**-6 if code < 8 else (1 + code % 8 / 8) * 2.0 ** (code // 8 - 7) for code in range(127)], np.float32
)


def pack_rows(rows: mx.array, bits: int) -> Packed:
    """What `reference.pack_rows` gives there: mxfp8 under the least power of two that clips none, nvfp4 under largest / 6."""
    if mx.cuda.is_available():
        return reference.pack_rows(rows, bits)
    group = PACKED_MODES[bits][1]
    values = np.array(rows.astype(mx.float32)).reshape(*rows.shape[:-1], -1, group)
    most = np.abs(values).max(-1, keepdims=True)
    if bits == 8:
        fraction, exponent = np.frexp(most / np.float32(448))
        scales = np.where(most == 0, 0, np.maximum(exponent - (fraction == 0.5), -127) + 127).astype(np.uint8)
        factor = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    else:
        scales = nearest(most / np.float32(6), E4M3)
        factor = E4M3[scales]
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = values * (np.float32(1) / factor)
    codes = nearest(np.abs(scaled), E4M3 if bits == 8 else E2M1)
    codes = codes | np.where(np.signbit(scaled) & ~np.isnan(scaled), np.uint8(1 << (bits - 1)), np.uint8(0))
    codes = codes.reshape(*rows.shape)
    if bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    words = np.ascontiguousarray(codes).view(np.uint32)
    return Packed(mx.array(words), mx.array(scales[..., 0]), bits)


def nearest(magnitudes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Codes of the nearest of ascending numbers, of two as near the even code; of what is no number the last one."""
    after = np.searchsorted(numbers, magnitudes).clip(1, len(numbers) - 1)
    low, high = numbers[after - 1].astype(np.float64), numbers[after].astype(np.float64)
    middle = (low + high) / 2
    up = (magnitudes > middle) | ((magnitudes == middle) & (after % 2 == 0)) | np.isnan(magnitudes)
    return np.where(np.isnan(magnitudes), len(numbers) - 1, after - 1 + up).astype(np.uint8)
