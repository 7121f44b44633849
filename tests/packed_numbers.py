"""Random bytes of the packed formats, and exactly the numbers that they stand for, by the formats' definitions."""

from typing import Any, NamedTuple

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
CODES = np.arange(256)
SIGNS = np.where(CODES & 0x80, -1.0, 1.0)
E4M3 = SIGNS * np.where(CODES & 0x78, (8 + CODES % 8) * 2.0 ** ((CODES >> 3) % 16 - 10.0), CODES % 8 * 2.0**-9)
E4M3[CODES & 0x7F == 0x7F] = np.nan
E8M0 = 2.0 ** (CODES - 127.0)
FORMATS = {"nvfp4": (4, 16), "mxfp4": (4, 32), "mxfp8": (8, 32)}  # bits, group


class Packed(NamedTuple):
    """Packed weights of `format`, and their float64 `numbers` [..., rows, columns]."""

    words: np.ndarray[Any, np.dtype[np.uint8]]  # [..., rows, columns * bits / 8]
    scales: np.ndarray[Any, np.dtype[np.uint8]]  # [..., rows, columns / group]
    numbers: np.ndarray[Any, np.dtype[np.float64]]


def packed_numbers(format_name: str, *shape: int, scales: tuple[int, int], seed: int = 0) -> Packed:
    """Weights of every code but NaN; scale codes from scales[0] up to below scales[1]."""
    bits, group = FORMATS[format_name]
    random = np.random.default_rng(seed)
    words = random.integers(0, 256, (*shape[:-1], shape[-1] * bits // 8), dtype=np.uint8)
    if bits == 8:
        words[words & 0x7F == 0x7F] = 1
        numbers = E4M3[words]
    else:
        numbers = E2M1[np.stack([words & 15, words >> 4], axis=-1)].reshape(shape)
    codes = random.integers(*scales, (*shape[:-1], shape[-1] // group), dtype=np.uint8)
    factors = (E4M3 if group == 16 else E8M0)[codes]
    return Packed(words, codes, numbers * np.repeat(factors, group, axis=-1))
