"""Tables of rows that stay in their file, of which those that are asked for are read: for tables that memory is short for."""

import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from marlin_cli.checkpoints.native import weight_files
from marlin_cli.errors import CheckpointError
from marlin_cli.models import matrices_of, set_modules
from marlin_cli.ops import PackedTable, Table
from marlin_cli.tensor_files import tensor_places

# Tables that would take more than this share of the memory that is free are left in their file.
MOST_OF_FREE_MEMORY = 0.5

WORDS: dict[int, np.dtype[Any]] = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}


class DiskTable(nn.Module):
    """A `Table` or `PackedTable` whose rows are read when they are asked for, each once a call; it holds no array."""

    def __init__(self, table: Any, places: dict[str, tuple[Path, int]]) -> None:
        """A table whose arrays are not read, and (file, byte at which it begins) of each of them."""
        super().__init__()
        self._packing = None if isinstance(table, Table) else (table.group_size, table.bits, table.mode)
        files = {path: _File(path) for path, _ in places.values()}
        # As an object: what a module holds in tables and lists are its parameters.
        self._arrays = tuple(
            _Rows(name, files[path], start, table[name].shape[1], table[name].dtype) for name, (path, start) in places.items()
        )

    def __call__(self, rows: mx.array) -> mx.array:
        """Rows [.., columns] of numbers [..], bit for bit those of the table in memory."""
        numbers, where = np.unique(np.array(rows), return_inverse=True)
        read = {each.name: each.read(numbers) for each in self._arrays}
        if self._packing is None:
            table: Table | PackedTable = Table(1, 1)
            table.weight = read["weight"]
        else:
            group_size, bits, mode = self._packing
            table = PackedTable(read, group_size=group_size, bits=bits, mode=mode)
        return table(mx.array(where.reshape(rows.shape).astype(np.int32)))


class _File:
    """An open file, closed when nothing reads it any more."""

    def __init__(self, path: Path) -> None:
        try:
            self.path, self.descriptor = path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read: {error.strerror or error}") from None
        weakref.finalize(self, os.close, self.descriptor)


class _Rows:
    """The rows of one array in a file."""

    def __init__(self, name: str, file: _File, start: int, columns: int, dtype: mx.Dtype) -> None:
        self.name, self._file, self._start = name, file, start
        self._columns, self._dtype = columns, dtype

    def read(self, numbers: npt.NDArray[np.int64]) -> mx.array:
        """Rows [numbers, columns], in order.

        Raises:
            CheckpointError: the file cannot be read, or became shorter.
        """
        size = self._columns * self._dtype.size
        try:
            data = b"".join(os.pread(self._file.descriptor, size, self._start + number * size) for number in numbers.tolist())
        except OSError as error:
            raise CheckpointError(f"{self._file.path}: cannot read: {error.strerror or error}") from None
        if len(data) != size * len(numbers):
            raise CheckpointError(f"{self._file.path}: became shorter while it was read; fetch it again")
        words = mx.array(np.frombuffer(data, WORDS[self._dtype.size]).reshape(len(numbers), self._columns))
        return words if words.dtype == self._dtype else words.view(self._dtype)


def leave_on_disk(network: Any, folder: Path, paths: Iterable[str]) -> list[str]:
    """Let tables of a network, none of whose arrays has been read, stay in the model folder that it is of.

    Returns:
        The paths of those that do: the ones whose arrays all lie in the folder's files as the network has them.
    """
    places = {}
    for file in weight_files(folder) if folder.is_dir() else [folder]:
        places.update({name: (file, start) for name, start in tensor_places(file).items()})
    swapped: list[tuple[str, nn.Module]] = []
    tables = matrices_of(network)
    for path in paths:
        table = tables[path]
        names = [name for name in table if f"{path}.{name}" in places]
        if sorted(names) == sorted(table) and all(table[name].ndim == 2 for name in names):
            swapped.append((path, DiskTable(table, {name: places[f"{path}.{name}"] for name in names})))
    set_modules(network, swapped)
    return [path for path, _ in swapped]


def is_short_of(network: Any, paths: Iterable[str]) -> bool:
    """Would these tables of a network take more of the memory that is free than they should?"""
    tables = matrices_of(network)
    needed = sum(array.nbytes for path in paths for array in tables[path].values())
    return bool(needed > MOST_OF_FREE_MEMORY * free_memory_bytes())


def free_memory_bytes() -> int:
    """Memory that a program can still have; where the system does not say, half of all."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
