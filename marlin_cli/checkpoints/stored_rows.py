"""Arrays that stay in their safetensors file, of which the rows that are asked for are read: for tables larger than memory."""

import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.errors import CheckpointError
from marlin_cli.tensor_files import safetensors_header, tensor_places

WORDS: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}

# Types of which rows are read, by their names in safetensors.
TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "U8": mx.uint8}

# Weight -> the file and the name of the tensor that it is there, whole and unchanged.
Stored = Mapping[str, tuple[Path, str]]


class _File:
    """An open file, closed when nothing reads it any more."""

    def __init__(self, path: Path) -> None:
        try:
            self.path, self.descriptor = path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read: {error.strerror or error}") from None
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, size: int, start: int) -> bytes:
        """So many bytes from a place on.

        Raises:
            CheckpointError: the file cannot be read, or became shorter.
        """
        try:
            data = os.pread(self.descriptor, size, start)
            while 0 < len(data) < size and (more := os.pread(self.descriptor, size - len(data), start + len(data))):
                data += more
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot read: {error.strerror or error}") from None
        if len(data) != size:
            raise CheckpointError(f"{self.path}: became shorter while it was read; fetch it again")
        return data


class StoredRows:
    """The rows of one array [rows, columns] in a file."""

    def __init__(self, file: _File, start: int, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self._file, self._start = file, start

    def read(self, numbers: npt.NDArray[np.int64]) -> mx.array:
        """Rows [numbers, columns], in order.

        Raises:
            CheckpointError: the file cannot be read, or became shorter.
        """
        size = self._row_bytes
        return self._rows(b"".join(self._file.read(size, self._start + number * size) for number in numbers.tolist()))

    def blocks(self, nbytes: int) -> Iterator[mx.array]:
        """All rows in order, about so many bytes of them at a time.

        Raises:
            CheckpointError: as `read`.
        """
        size, total = self._row_bytes, self.shape[0]
        step = max(1, nbytes // size)
        for first in range(0, total, step):
            yield self._rows(self._file.read(size * min(step, total - first), self._start + first * size))

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.shape[0] * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return self.shape[1] * self.dtype.size

    def _rows(self, data: bytes) -> mx.array:
        words = mx.array(np.frombuffer(data, WORDS[self.dtype.size]).reshape(-1, self.shape[1]))
        return words if words.dtype == self.dtype else words.view(self.dtype)


def open_rows(stored: Stored, arrays: Mapping[str, mx.array]) -> dict[str, StoredRows]:
    """Those of some weights, none of which needs to be read, that lie in a file as rows, in the types that they have there.

    Raises:
        CheckpointError: a file cannot be read.
    """
    wanted = [name for name, array in arrays.items() if name in stored and array.ndim == 2]
    paths = dict.fromkeys(stored[name][0] for name in wanted)
    files = {path: (_File(path), safetensors_header(path)[0], tensor_places(path)) for path in paths}
    found = {}
    for name in wanted:
        path, tensor = stored[name]
        file, header, places = files[path]
        entry = header.get(tensor)
        if entry is not None and entry["dtype"] in TYPES and tuple(entry["shape"]) == arrays[name].shape:
            found[name] = StoredRows(file, places[tensor], arrays[name].shape, TYPES[entry["dtype"]])
    return found
