"""What one model did in one pass: sums over each window by group of bytes, small enough to keep, send and store."""

import dataclasses
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cli.quality.byte_classes import BYTE_CLASSES
from marlin_cli.quality.estimates import Floats

# Groups: all bytes, then each class of bytes, then each position in a patch.
ALL = 0
FIRST_CLASS = 1
FIRST_POSITION = FIRST_CLASS + len(BYTE_CLASSES)


@dataclass(frozen=True)
class PassSums:
    """Sums over the scored bytes of each of n windows, by group. Without a reference all but the first two are empty."""

    bytes: Floats  # [n, groups]
    bits: Floats  # [n, groups]: what the bytes cost the model
    reference_bits: Floats  # [n, groups]: .. and the reference
    agreements: Floats  # [n, groups]: bytes where both have the same likeliest id
    kl: Floats  # [n, groups]: divergences, in bits
    kl_of_bytes: npt.NDArray[np.float32]  # [bytes]: each divergence
    groups_of_bytes: npt.NDArray[np.uint16]  # [2, bytes]: the class and the position of each, as numbers of groups


@dataclass(frozen=True)
class Groups:
    """The groups that each scored byte of a pass belongs to: [n, length] each."""

    classes: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    patch_size: int

    def sums(self, values: npt.NDArray[Any]) -> Floats:
        """Sums of values [n, length] over each window: [n, groups]."""
        values = values.astype(np.float64)
        by_class = _sums(values, self.classes, len(BYTE_CLASSES))
        by_position = _sums(values, self.positions, self.patch_size)
        return np.concatenate([values.sum(axis=1, keepdims=True), by_class, by_position], axis=1)

    def of_bytes(self) -> npt.NDArray[np.uint16]:
        """`PassSums.groups_of_bytes`."""
        numbers = [FIRST_CLASS + self.classes.reshape(-1), FIRST_POSITION + self.positions.reshape(-1)]
        return np.stack(numbers).astype(np.uint16)


def to_bytes(results: Sequence[PassSums]) -> bytes:
    """The results of several models in one pass, as `from_bytes` takes them."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {
        f"{number}.{name.name}": getattr(result, name.name)
        for number, result in enumerate(results)
        for name in dataclasses.fields(PassSums)
    }
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def from_bytes(data: bytes) -> list[PassSums]:
    """The inverse of `to_bytes`.

    Raises:
        ValueError: the bytes are damaged.
    """
    names = [name.name for name in dataclasses.fields(PassSums)]
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(entry.file_size > len(data) for entry in archive.infolist()):
                raise ValueError("arrays larger than their file")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            count = len(arrays.files) // len(names)
            found = [PassSums(**{name: arrays[f"{number}.{name}"] for name in names}) for number in range(count)]
    # The readers of zip and npy let through whatever their parts raise.
    except Exception as error:
        raise ValueError(f"damaged sums of a pass: {error}") from None
    for sums in found:
        _check(sums)
    return found


def _check(sums: PassSums) -> None:
    """`ValueError` unless the arrays fit each other and hold numbers."""
    windows, groups = sums.bytes.shape if sums.bytes.ndim == 2 else (0, 0)
    beside = sums.kl.shape[0] > 0
    tables = (sums.bytes, sums.bits, *((sums.reference_bits, sums.agreements, sums.kl) if beside else ()))
    of_bytes = sums.kl_of_bytes
    fit = all(table.shape == (windows, groups) and table.dtype == np.float64 for table in tables)
    fit = fit and of_bytes.ndim == 1 and of_bytes.dtype == np.float32 and sums.groups_of_bytes.shape == (2, len(of_bytes))
    if not fit or not windows or not all(np.isfinite(array).all() for array in (*tables, of_bytes)):
        raise ValueError("damaged sums of a pass: arrays that do not fit, or numbers that are none")


def _sums(values: Floats, numbers: npt.NDArray[np.int64], count: int) -> Floats:
    rows = len(values)
    places = numbers + count * np.arange(rows)[:, None]
    sums: npt.NDArray[Any] = np.bincount(places.reshape(-1), values.reshape(-1), minlength=rows * count)
    return sums.reshape(rows, count)
