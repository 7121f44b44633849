"""Reads what `torch.save` writes without running it: a zip of a pickle and raw storages.

A pickle is a program. This reader's unpickler knows the few calls that rebuild tensors, each as a plain function
of its own, and refuses every other name before anything is called.
"""

import io
import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from marlin_cli.errors import CheckpointError
from marlin_cli.files import one_line

MAX_PICKLE_BYTES = 64 << 20  # a state dict's pickle holds names and shapes alone
MAX_DIMENSIONS = 8

# Storage class of torch -> numpy type of its elements; bfloat16 has none and travels as 16 bits.
STORAGES: dict[str, np.dtype[Any]] = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype("<u2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


@dataclass(frozen=True)
class _StorageType:
    name: str


@dataclass(frozen=True)
class _Storage:
    type_name: str
    elements: np.ndarray[Any, np.dtype[Any]]


class _Ignored:
    """Stands for a value that is no tensor and has no meaning here, such as a dtype."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def read_pickle(path: Path) -> Any:
    """The object in a file of `torch.save` (zip format, torch 1.6 and later): tensors as MLX arrays.

    float64 becomes float32. Containers, numbers and strings come as they are.

    Raises:
        CheckpointError: the file is not of that format, is damaged, or calls anything but what rebuilds tensors.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, expected a weights file")
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise CheckpointError(
                    f"{path}: not a file of torch.save in its zip format (torch 1.6 and later), nor safetensors"
                )
            size = file.seek(0, io.SEEK_END)
            with zipfile.ZipFile(file) as archive:
                return _Archive(path, archive, size).load()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror or error}") from None
    except (zipfile.BadZipFile, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: damaged zip file: {one_line(error)}; fetch it again") from None


class _Archive:
    """One zip file of torch.save."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, size: int) -> None:
        self._path = path
        self._archive = archive
        self._entries = {entry.filename: entry for entry in archive.infolist()}
        for entry in self._entries.values():
            # torch stores entries as they are; a packed or oversized one is a bomb, or from another tool.
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size or entry.flag_bits & 1:
                raise CheckpointError(f"{path}: the entry {entry.filename!r} is not stored as torch.save stores it")
        pickles = [name for name in self._entries if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickles) != 1:
            raise CheckpointError(f"{path}: holds {len(pickles)} data.pkl, expected one; not a file of torch.save")
        self._root = pickles[0].removesuffix("data.pkl")
        self._storages: dict[str, _Storage] = {}

    def load(self) -> Any:
        order = self._entries.get(self._root + "byteorder")
        if order is not None and self._archive.read(order).strip() != b"little":
            raise CheckpointError(f"{self._path}: stored in another byte order than little-endian")
        entry = self._entries[self._root + "data.pkl"]
        if entry.file_size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{self._path}: a pickle of {entry.file_size:,} bytes is no state dict")
        try:
            return _Unpickler(self._archive.read(entry), self._path, self._storage).load()
        except CheckpointError:
            raise
        except (MemoryError, RecursionError, pickle.UnpicklingError, Exception) as error:
            # A hostile or broken pickle fails in as many ways as there are opcodes; none of them is our bug.
            raise CheckpointError(
                f"{self._path}: damaged pickle: {type(error).__name__}: {one_line(error)[:120]}"
            ) from None

    def _storage(self, reference: Any) -> _Storage:
        kind, storage_type, key, *_ = reference
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise CheckpointError(f"{self._path}: refers to something other than a storage: {str(kind)[:40]!r}")
        if key not in self._storages:
            entry = self._entries.get(f"{self._root}data/{key}")
            if entry is None:
                raise CheckpointError(f"{self._path}: the storage {key!r} is missing")
            dtype = STORAGES[storage_type.name]
            data = self._archive.read(entry)
            if len(data) % dtype.itemsize:
                raise CheckpointError(f"{self._path}: the storage {key!r} is cut short")
            self._storages[key] = _Storage(storage_type.name, np.frombuffer(data, dtype=dtype))
        return self._storages[key]


class _Unpickler(pickle.Unpickler):
    """An unpickler that can name tensors, storages and ordered dicts, and nothing else."""

    def __init__(self, data: bytes, path: Path, storage: Callable[[Any], _Storage]) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._path = path
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): _first,
            ("torch._utils", "_rebuild_parameter_with_state"): _first,
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
        }
        if (module, name) in known:
            return known[module, name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _StorageType(name)
        if module == "torch" and name in ("float32", "float16", "bfloat16", "float64", "int64", "device"):
            return _Ignored
        raise CheckpointError(
            f"{self._path}: refused: its pickle calls {module}.{name}; marlin only rebuilds tensors"
            " (save model.state_dict() alone, or safetensors)"
        )

    def persistent_load(self, reference: Any) -> _Storage:
        return self._storage(reference)

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> mx.array:
        """A tensor as `torch._utils._rebuild_tensor_v2` has it: a strided view of a storage."""
        sizes, steps = tuple(shape), tuple(strides)
        numbers = (offset, *sizes, *steps)
        if not isinstance(storage, _Storage) or len(sizes) != len(steps) or len(sizes) > MAX_DIMENSIONS:
            raise CheckpointError(f"{self._path}: a tensor is not described as torch describes it")
        if any(not isinstance(number, int) or isinstance(number, bool) or number < 0 for number in numbers):
            raise CheckpointError(f"{self._path}: a tensor has a negative or non-integer shape, stride or offset")
        count = math.prod(sizes)
        last = offset + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True)) if count else 0
        available = storage.elements.size
        # Strides of zero could make a huge tensor of a small storage; no state dict has them.
        if count > available or (count and last >= available):
            raise CheckpointError(f"{self._path}: a tensor of shape {list(sizes)} reaches beyond its storage")
        item = storage.elements.itemsize
        view = np.lib.stride_tricks.as_strided(
            storage.elements[offset:], shape=sizes, strides=tuple(step * item for step in steps), writeable=False
        )
        if storage.type_name == "DoubleStorage":
            view = view.astype(np.float32)
        array = mx.array(np.ascontiguousarray(view).reshape(sizes))
        return array.view(mx.bfloat16) if storage.type_name == "BFloat16Storage" else array


def _first(value: Any, *_: Any) -> Any:
    """`torch._utils._rebuild_parameter(data, requires_grad, hooks)` is its data."""
    return value


assert sys.byteorder == "little", "storages are read in place"
