"""Tables of rows that stay in their file, of which those that are asked for are read: for tables that memory is short for."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from marlin_cli.checkpoints.stored_rows import Stored, StoredRows, open_rows
from marlin_cli.models import matrices_of, set_modules
from marlin_cli.ops import PackedTable, Table

# Tables that would take more than this share of the memory that is free are left in their file.
MOST_OF_FREE_MEMORY = 0.5


class DiskTable(nn.Module):
    """A `Table` or `PackedTable` whose rows are read when they are asked for, each once a call; it holds no array."""

    def __init__(self, table: Any, arrays: Mapping[str, StoredRows]) -> None:
        """A table whose arrays are not read, and where each of them lies."""
        super().__init__()
        self._packing = None if isinstance(table, Table) else (table.group_size, table.bits, table.mode)
        # As an object: what a module holds in tables and lists are its parameters.
        self._arrays = tuple(arrays.items())

    @property
    def file_bytes(self) -> int:
        """Bytes of its arrays, which lie in the file."""
        return sum(rows.nbytes for _, rows in self._arrays)

    @property
    def numbers(self) -> int:
        """Numbers in the table, packed ones counted one by one."""
        rows, columns = dict(self._arrays)["weight"].shape
        return rows * columns * (1 if self._packing is None else 32 // self._packing[1])

    def __call__(self, rows: mx.array) -> mx.array:
        """Rows [.., columns] of numbers [..], bit for bit those of the table in memory."""
        numbers, where = np.unique(np.array(rows), return_inverse=True)
        read = {name: each.read(numbers) for name, each in self._arrays}
        if self._packing is None:
            table: Table | PackedTable = Table(1, 1)
            table.weight = read["weight"]
        else:
            group_size, bits, mode = self._packing
            table = PackedTable(read, group_size=group_size, bits=bits, mode=mode)
        return table(mx.array(where.reshape(rows.shape).astype(np.int32)))


def leave_on_disk(network: Any, stored: Stored, paths: Iterable[str]) -> list[str]:
    """Let tables of a network, none of whose arrays has been read, stay in the files that they lie in.

    Returns:
        The paths of those that do: the ones whose arrays all lie in a file as the network has them.
    """
    swapped: list[tuple[str, nn.Module]] = []
    tables = matrices_of(network)
    for path in paths:
        table = tables[path]
        found = open_rows(stored, {f"{path}.{name}": table[name] for name in table})
        if len(found) == len(table):
            swapped.append((path, DiskTable(table, {name: found[f"{path}.{name}"] for name in table})))
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
