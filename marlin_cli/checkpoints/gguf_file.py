"""GGUF files: metadata and tensors by name, every count and offset checked against the file. Knows no network.

The `gguf` package reads such files too, but follows a damaged count for ever; of it only the numbers of packed types are
taken, for which it is the reference in Python. Layout: the GGUF specification of ggml, versions 2 and 3.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.errors import CheckpointError
from marlin_cli.files import check_regular
from marlin_cli.text import quoted

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# Numbers of metadata by the id of their type, as `struct` has them.
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9

# Types of tensors that need no decoding, by id: how numpy holds them, and what MLX makes of it.
PLAIN: Mapping[int, tuple[str, mx.Dtype]] = {
    0: ("<f4", mx.float32),
    1: ("<f2", mx.float16),
    30: ("<u2", mx.bfloat16),
}

MOST_DIMENSIONS = 4

# What a header may hold: a vocabulary of 256,000 words with scores, types and merges, and a few thousand tensors.
MOST_HEADER_BYTES = 64 << 20
MOST_KEYS, MOST_TENSORS, MOST_ITEMS = 1 << 12, 1 << 15, 1 << 20


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: its shape with the longest stride first, its type, and its offset in the file."""

    shape: tuple[int, ...]
    type: int
    offset: int

    @property
    def elements(self) -> int:
        """Numbers in it; a damaged one has more than any type of numpy holds."""
        return math.prod(self.shape)


class GGUFFile:
    """A GGUF file, mapped into memory.

    Attributes:
        metadata: key -> number, bool, `str`, or a list of such; lists of strings hold `bytes`.
        shapes: name of a tensor -> its shape, rows first.

    Raises:
        CheckpointError: no such file, not GGUF, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_regular(path, CheckpointError)
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise self._damaged("it is empty") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read: {error.strerror or error}") from None
        self._at = 0
        if self._take(4) != MAGIC:
            raise CheckpointError(f"{path}: is no GGUF file (it does not begin with GGUF)")
        version = self._number("<I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "big"), "little")
            found = f"big-endian GGUF of version {swapped}" if swapped in VERSIONS else f"GGUF of version {version}"
            raise CheckpointError(f"{path}: {found}; marlin reads little-endian versions 2 and 3")
        tensors, keys = self._number("<Q"), self._number("<Q")
        for what, count, most in (("keys", keys, MOST_KEYS), ("tensors", tensors, MOST_TENSORS)):
            if count > most:
                raise self._damaged(f"it claims {count:,} {what}, more than the {most:,} of any model")
        self.metadata: dict[str, Any] = {}
        self._items = 0  # of lists of metadata, all together
        for _ in range(keys):
            key = self._text()
            if key in self.metadata:
                raise self._damaged(f"the key {quoted(key)} stands twice")
            self.metadata[key] = self._value(self._number("<I"))
        self._places = self._read_places(tensors)
        self._check_apart()
        self.shapes = {name: place.shape for name, place in self._places.items()}

    def array(self, name: str) -> mx.array:
        """The tensor `name`: of its own type where MLX has it, else unpacked to float32.

        Raises:
            CheckpointError: it ends beyond the file, or its type is unknown.
        """
        place = self._places[name]
        count = place.elements
        if place.type in PLAIN:
            stored, dtype = PLAIN[place.type]
            array = mx.array(self._numbers(name, place.offset, count, stored).reshape(place.shape))
            return array.view(dtype) if dtype == mx.bfloat16 else array
        return mx.array(self._unpacked(name, place, count))

    def _unpacked(self, name: str, place: _Place, count: int) -> npt.NDArray[np.float32]:
        try:
            from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
            from gguf.quants import dequantize
        except ImportError:
            raise CheckpointError(
                f"{self.path}: {quoted(name)} is packed; to read it, install the extra: pip install 'marlin-cli[gguf]'"
            ) from None
        try:
            kind = GGMLQuantizationType(place.type)
        except ValueError:
            raise CheckpointError(
                f"{self.path}: {quoted(name)} is of the type {place.type}, which the gguf package here does not know"
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        columns = place.shape[-1]
        if columns % block:
            raise self._damaged(f"{quoted(name)} has {columns} columns, no multiple of the {block} of {kind.name}")
        packed = self._numbers(name, place.offset, count // block * block_bytes, "<u1")
        try:
            rows: npt.NDArray[np.float32] = dequantize(packed.reshape(-1, columns // block * block_bytes), kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path}: {quoted(name)} is {kind.name}, which cannot be unpacked; use another type"
            ) from None
        return rows.reshape(place.shape).astype(np.float32, copy=False)

    def _read_places(self, count: int) -> dict[str, _Place]:
        places = {}
        for _ in range(count):
            name = self._text()
            dimensions = self._number("<I")
            if not 0 < dimensions <= MOST_DIMENSIONS:
                raise self._damaged(f"{quoted(name)} has {dimensions} dimensions")
            shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
            if 0 in shape:
                raise self._damaged(f"{quoted(name)} is empty")
            if name in places:
                raise self._damaged(f"the tensor {quoted(name)} stands twice")
            places[name] = _Place(shape, self._number("<I"), self._number("<Q"))
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment is {quoted(alignment)}, not a power of two")
        start = -(-self._at // alignment) * alignment
        for name, place in places.items():
            if place.offset % alignment:
                raise self._damaged(f"{quoted(name)} begins at {place.offset:,}, no multiple of its alignment, {alignment:,}")
        return {name: _Place(place.shape, place.type, start + place.offset) for name, place in places.items()}

    def _check_apart(self) -> None:
        """Tensors that share bytes make large arrays of a small file."""
        end, before = 0, ""
        for name, place in sorted(self._places.items(), key=lambda item: item[1].offset):
            if place.offset < end:
                raise self._damaged(f"the tensors {quoted(before)} and {quoted(name)} overlap")
            # At least: packed types take no less than a byte for each of 8 weights.
            least = place.elements * (np.dtype(PLAIN[place.type][0]).itemsize if place.type in PLAIN else 1 / 8)
            end, before = place.offset + int(least), name

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._text()
        if kind != ARRAY:
            raise self._damaged(f"its metadata has the unknown type {kind}")
        inner, count = self._number("<I"), self._number("<Q")
        self._items += count
        if self._items > MOST_ITEMS:
            raise self._damaged(f"its metadata claim lists of {self._items:,} items, more than the {MOST_ITEMS:,} of any model")
        if inner == STRING:
            return [self._string() for _ in range(count)]
        if inner == ARRAY:
            raise CheckpointError(f"{self.path}: its metadata has lists of lists, which no known writer makes")
        if inner not in SCALARS:
            raise self._damaged(f"its metadata has lists of the unknown type {inner}")
        size = struct.calcsize(SCALARS[inner])
        return [value for (value,) in struct.iter_unpack(SCALARS[inner], self._take(count * size))]

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _string(self) -> bytes:
        return self._take(self._number("<Q"))

    def _text(self) -> str:
        try:
            return self._string().decode("utf-8")
        except UnicodeDecodeError:
            raise self._damaged("a name in it is not UTF-8") from None

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise self._damaged(f"it ends after {len(self._data):,} bytes, in the middle of its header")
        if self._at + size > MOST_HEADER_BYTES:
            raise self._damaged(f"its header has more than {MOST_HEADER_BYTES:,} bytes")
        self._at += size
        return self._data[self._at - size : self._at]

    def _numbers(self, name: str, offset: int, count: int, stored: str) -> npt.NDArray[Any]:
        needed = offset + count * np.dtype(stored).itemsize
        if needed > len(self._data):
            raise self._damaged(f"{quoted(name)} ends at byte {needed:,}, the file at {len(self._data):,}")
        return np.frombuffer(self._data, stored, count, offset)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: damaged GGUF file: {what}; fetch it again")
