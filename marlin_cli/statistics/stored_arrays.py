"""The arrays of a statistics file, read one at a time by plain reads: a file that changes meanwhile is an error, no crash."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from marlin_cli.errors import CheckpointError, StatisticsError
from marlin_cli.files import check_regular, kind_of_file
from marlin_cli.tensor_files import safetensors_header
from marlin_cli.text import quoted

# The header of a network of a thousand layers, with Hessians of a hundred domains, takes some ten million bytes.
MOST_HEADER_BYTES = 16 << 20

# Of one array: more than a model of today's sizes has in a hundred domains.
MOST_ARRAY_BYTES = 1 << 30

TYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "F64": np.dtype("<f8"), "F32": np.dtype("<f4")}


@dataclass(frozen=True)
class Stored:
    """Where an array lies in the file."""

    dtype: str  # safetensors' name of it
    shape: tuple[int, ...]
    start: int  # byte of the file


@dataclass(frozen=True)
class StoredArrays:
    """The arrays of one file by name; each is read when it is asked for."""

    path: Path
    places: Mapping[str, Stored]
    metadata: Mapping[str, str]
    version: tuple[int, int, int, int]  # of the file: another one is not read

    def read(self, name: str) -> npt.NDArray[Any]:
        """The array of that name.

        Raises:
            StatisticsError: there is none, it is too large, or the file cannot be read or has changed.
        """
        place = self.places.get(name)
        if place is None:
            raise StatisticsError(f"{self.path}: the array {quoted(name)} is missing; calibrate again")
        if place.dtype not in TYPES:
            raise StatisticsError(f"{self.path}: {quoted(name)} is {place.dtype}, expected F64, F32 or I64")
        dtype = TYPES[place.dtype]
        size = math.prod(place.shape) * dtype.itemsize
        if size > MOST_ARRAY_BYTES or max(place.shape, default=0) > MOST_ARRAY_BYTES // 8:
            raise StatisticsError(f"{self.path}: {quoted(name)} has the absurd shape {quoted(list(place.shape))}")
        try:
            with self.path.open("rb") as file:
                if _version_of(file) != self.version:
                    raise StatisticsError(f"{self.path}: changed while it was being read; begin again")
                file.seek(place.start)
                data = bytearray(size)
                read = file.readinto(data)
        except OSError as error:
            raise StatisticsError(f"{self.path}: cannot read: {error.strerror or error}") from None
        if read != size:
            raise StatisticsError(f"{self.path}: became shorter while it was being read; begin again")
        return np.frombuffer(memoryview(data), dtype).reshape(place.shape)


def open_arrays(path: Path) -> StoredArrays:
    """What a safetensors file holds; nothing but its header is read.

    Raises:
        StatisticsError: it is missing, no regular file, damaged, or its header is larger than any of its kind.
    """
    check_regular(path, StatisticsError)
    try:
        kind = kind_of_file(path)
        if kind not in (None, "safetensors"):
            raise StatisticsError(f"{path}: is {kind}, not statistics; those come from marlin calibrate -o FILE")
        with path.open("rb") as file:
            version = _version_of(file)
            length = int.from_bytes(file.read(8), "little")
            if version[2] > 8 and MOST_HEADER_BYTES < length <= version[2]:
                raise StatisticsError(f"{path}: its header takes {length:,} bytes, more than any of its kind")
            _, metadata = safetensors_header(path)  # the library checks every number of it
            header = json.loads(file.read(length))
    except OSError as error:
        raise StatisticsError(f"{path}: cannot read: {error.strerror or error}") from None
    except CheckpointError as error:
        raise StatisticsError(str(error)) from None
    except (ValueError, RecursionError):
        raise StatisticsError(f"{path}: changed while it was being read; begin again") from None
    places = {
        name: Stored(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }
    return StoredArrays(path, places, metadata, version)


def _version_of(file: BinaryIO) -> tuple[int, int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
