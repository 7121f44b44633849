"""Files of `torch.save`, zipped or as before torch 1.6: where the tensors lie in them, and reading those asked for."""

import io
import math
import mmap
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from marlin_cli.checkpoints.pickle_reader import StorageReference, TensorReference, read_pickle
from marlin_cli.errors import CheckpointError
from marlin_cli.files import BEGINNING_BYTES, check_regular, kind_of_content
from marlin_cli.text import one_line, quoted

MAX_PICKLE_BYTES = 16 << 20  # names and shapes alone, some 250 bytes a tensor
MAX_DIRECTORY_BYTES = 4 << 20  # of a zip file: some 60 bytes a tensor
MAX_DIMENSIONS = 8
# Tensors may share storages, as tied weights do; many views of one storage would fill the memory.
MAX_EXPANSION = 4

# Torch's class of a storage -> NumPy type of its elements; NumPy has no bfloat16, which travels as 16 bits.
ELEMENTS: Mapping[str, np.dtype[Any]] = {
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

ZIP_MAGIC = b"PK\x03\x04"
# The whole number 0x1950a86a20f9469cfc6c as a pickle of its own.
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# version, then a table of the machine; the object and the list of storages follow.
LEGACY_VERSION = 1001
ZIP_LOCAL_HEADER_BYTES = 30


@dataclass(frozen=True)
class _Extent:
    """Where a storage's bytes lie in the file, and their CRC-32 where the format keeps one."""

    start: int
    size: int
    crc: int | None


class TorchFile:
    """A file of `torch.save`: `document` is its object with a `TensorReference` for each tensor.

    Raises:
        CheckpointError: not such a file, damaged, or its pickle asks for anything but what rebuilds tensors.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        check_regular(path, CheckpointError)
        try:
            with path.open("rb") as file:
                magic = file.read(len(LEGACY_MAGIC))
                self._size = file.seek(0, io.SEEK_END)
                if magic.startswith(ZIP_MAGIC):
                    self.document, self._extents = _open_zip(path, file, self._size)
                elif magic == LEGACY_MAGIC:
                    self.document, self._extents = _open_legacy(path, file, self._size)
                else:
                    file.seek(0)
                    found = kind_of_content(file.read(BEGINNING_BYTES))
                    found = f"starts with {magic[:4]!r}" if found is None else f"is {found}"
                    raise CheckpointError(f"{path}: {found}, expected what torch.save writes; save model.state_dict()")
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read: {error.strerror or error}") from None
        self._checked: set[str] = set()

    def arrays(self, references: Mapping[str, TensorReference]) -> dict[str, mx.array]:
        """The tensors as MLX arrays, in their own types; float64 becomes float32.

        Raises:
            CheckpointError: a tensor that reaches beyond its storage, or a storage that is missing or damaged.
        """
        for name, reference in references.items():
            self._check(name, reference)
        total = sum(math.prod(each.shape) * ELEMENTS[each.storage.kind].itemsize for each in references.values())
        if total > MAX_EXPANSION * self._size:
            raise CheckpointError(f"{self._path}: its tensors would take {total:,} bytes, the file has {self._size:,}")
        return {name: self._array(reference) for name, reference in references.items()}

    def _check(self, name: str, reference: TensorReference) -> None:
        storage, shape = reference.storage, reference.shape
        extent = self._extents.get(storage.key)
        if extent is None:
            raise CheckpointError(f"{self._path}: the bytes of {quoted(name)} (storage {quoted(storage.key)}) are missing")
        if extent.size != storage.elements * ELEMENTS[storage.kind].itemsize:
            raise CheckpointError(
                f"{self._path}: the storage of {quoted(name)} has {extent.size:,} bytes, not the {storage.elements:,}"
                f" elements of a {storage.kind}; fetch it again"
            )
        if len(shape) > MAX_DIMENSIONS:
            raise CheckpointError(f"{self._path}: {quoted(name)} has {len(shape)} dimensions, more than any weight")
        count = math.prod(shape)
        steps = zip(shape, reference.strides, strict=True)
        last = reference.offset + sum((size - 1) * stride for size, stride in steps) if count else 0
        # A stride of zero can make a huge tensor of a small storage; no state dict has one.
        if count > storage.elements or (count and last >= storage.elements):
            raise CheckpointError(f"{self._path}: {quoted(name)} of shape {list(shape)} reaches beyond its storage")
        if extent.crc is not None and storage.key not in self._checked:
            with memoryview(self._bytes) as view, view[extent.start : extent.start + extent.size] as data:
                if zlib.crc32(data) != extent.crc:
                    raise CheckpointError(f"{self._path}: the bytes of {quoted(name)} fail their checksum; fetch it again")
            self._checked.add(storage.key)

    def _array(self, reference: TensorReference) -> mx.array:
        storage = reference.storage
        dtype = ELEMENTS[storage.kind]
        if not math.prod(reference.shape):
            view = np.zeros(reference.shape, dtype)
        else:
            start = self._extents[storage.key].start + reference.offset * dtype.itemsize
            elements = np.frombuffer(self._bytes, dtype, count=storage.elements - reference.offset, offset=start)
            strides = tuple(stride * dtype.itemsize for stride in reference.strides)
            view = np.lib.stride_tricks.as_strided(elements, reference.shape, strides, writeable=False)
        if storage.kind == "DoubleStorage":
            view = view.astype(np.float32)
        array = mx.array(view)
        return array.view(mx.bfloat16) if storage.kind == "BFloat16Storage" else array


def _open_zip(path: Path, file: BinaryIO, size: int) -> tuple[Any, dict[str, _Extent]]:
    try:
        with zipfile.ZipFile(_Bounded(path, file)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: damaged zip file: {one_line(error)[:120]}; fetch it again") from None
    extents: dict[str, _Extent] = {}
    for entry in entries:
        # torch stores entries as they are; a packed one is a bomb, or of another tool.
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
            raise CheckpointError(
                f"{path}: the entry {quoted(entry.filename)} is compressed or encrypted, torch.save does neither"
            )
        if entry.filename in extents:
            raise CheckpointError(f"{path}: the entry {quoted(entry.filename)} stands there twice")
        extents[entry.filename] = _extent_of(path, file, size, entry)
    _check_apart(path, entries, extents)
    pickles = [name for name in extents if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(pickles) != 1:
        raise CheckpointError(f"{path}: a zip file with {len(pickles)} data.pkl, expected one; not of torch.save")
    root = pickles[0].removesuffix("data.pkl")
    order = extents.get(f"{root}byteorder")
    if order is not None and _bytes_at(path, file, order, "byteorder").strip() != b"little":
        raise CheckpointError(f"{path}: stored in another byte order than little-endian; save it on another machine")
    document = read_pickle(io.BytesIO(_bytes_at(path, file, extents[pickles[0]], "data.pkl")), str(path))
    prefix = f"{root}data/"
    return document, {name.removeprefix(prefix): extent for name, extent in extents.items() if name.startswith(prefix)}


class _Bounded:
    """A file for `zipfile`, which would read a directory of any size at once."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """As of a file.

        Raises:
            CheckpointError: more bytes than any directory has.
        """
        data = self._file.read(MAX_DIRECTORY_BYTES + 1 if size < 0 else min(size, MAX_DIRECTORY_BYTES + 1))
        if len(data) > MAX_DIRECTORY_BYTES:
            raise CheckpointError(
                f"{self._path}: its list of entries has more than {MAX_DIRECTORY_BYTES:,} bytes; not of torch.save"
            )
        return data


def _check_apart(path: Path, entries: list[zipfile.ZipInfo], extents: Mapping[str, _Extent]) -> None:
    """Entries that share bytes make a large document of a small file."""
    end, before = 0, ""
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset < end:
            raise CheckpointError(f"{path}: the entries {quoted(before)} and {quoted(entry.filename)} overlap; fetch it again")
        extent = extents[entry.filename]
        end, before = extent.start + extent.size, entry.filename


def _extent_of(path: Path, file: BinaryIO, size: int, entry: zipfile.ZipInfo) -> _Extent:
    """Where the data of a stored entry begin: behind its local header, whose two last fields have variable length."""
    damaged = CheckpointError(f"{path}: the entry {quoted(entry.filename)} lies outside the zip file; fetch it again")
    if not 0 <= entry.header_offset <= size - ZIP_LOCAL_HEADER_BYTES:
        raise damaged
    file.seek(entry.header_offset)
    header = file.read(ZIP_LOCAL_HEADER_BYTES)
    if not header.startswith(ZIP_MAGIC):
        raise damaged
    variable = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = entry.header_offset + ZIP_LOCAL_HEADER_BYTES + variable
    if start + entry.file_size > size:
        raise damaged
    return _Extent(start, entry.file_size, entry.CRC)


def _bytes_at(path: Path, file: BinaryIO, extent: _Extent, name: str) -> bytes:
    if extent.size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{path}: its {name} has {extent.size:,} bytes, more than a state dict's")
    file.seek(extent.start)
    data = file.read(extent.size)
    if zlib.crc32(data) != extent.crc:
        raise CheckpointError(f"{path}: its {name} fails its checksum; fetch the file again")
    return data


def _open_legacy(path: Path, file: BinaryIO, size: int) -> tuple[Any, dict[str, _Extent]]:
    """Five pickles (magic, version, machine, object, storage keys), then each storage with its number of elements."""
    file.seek(0)
    stream = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    _, version, machine, document, keys = (read_pickle(stream, str(path)) for _ in range(5))
    if version != LEGACY_VERSION or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise CheckpointError(f"{path}: a torch file of an unknown version or byte order; save it again with torch 1.6+")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(f"{path}: its list of storages is damaged; fetch it again")
    kinds = {reference.key: reference.kind for reference in _storages(document)}
    extents: dict[str, _Extent] = {}
    position = stream.tell()
    for key in keys:
        file.seek(position)
        elements = int.from_bytes(file.read(8), "little")
        if key not in kinds:
            raise CheckpointError(f"{path}: no tensor says what the storage {quoted(key)} holds")
        length = elements * ELEMENTS[kinds[key]].itemsize
        position += 8
        if position + length > size:
            raise CheckpointError(f"{path}: is cut short: the storage {quoted(key)} ends beyond it; fetch it again")
        extents[key] = _Extent(position, length, None)
        position += length
    return document, extents


def _storages(document: Any) -> list[StorageReference]:
    """Every storage that a document refers to; containers that it shares are walked once."""
    found, seen, waiting = [], set(), [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, TensorReference):
            found.append(value.storage)
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return found
