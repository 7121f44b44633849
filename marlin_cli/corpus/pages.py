"""What a Parquet file claims of itself, read before Arrow reads it: is it encrypted, and how large are its pages?

A few bytes may stand for a page of gigabytes, and Arrow ends the process over a column that is encrypted beneath a plain
footer. Footers and headers of pages are Thrift's compact protocol; what their fields are is in the specification of
Parquet (parquet.thrift, FileMetaData and PageHeader). No values are read here.
"""

from pathlib import Path
from typing import IO, Any

from marlin_cli.errors import CorpusError

# The largest page, unpacked. Writers make pages of 1 MiB; some of up to 100 MB.
MOST_PAGE_BYTES = 128 << 20

# A header has some dozens of bytes, and the least and greatest value.
_HEADER_BYTES = 1 << 10
_MOST_HEADER_BYTES = 4 << 20

# Fields of FileMetaData, of its RowGroup, and of that one's ColumnChunk.
_ROW_GROUPS, _ALGORITHM, _COLUMNS, _CRYPTO = 4, 8, 1, 8

_DEEPEST = 16

_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(13)


def is_encrypted(footer: bytes, path: Path) -> bool:
    """Does a plain footer say that it is signed, or that a column is encrypted?

    Raises:
        CorpusError: it is no footer.
    """
    try:
        fields, _ = _struct(footer, 0, 0)
    except IndexError:
        raise CorpusError(f"{path}: damaged parquet file: its schema cannot be read") from None
    groups = fields.get(_ROW_GROUPS)
    columns = groups.get(_COLUMNS) if isinstance(groups, dict) else None
    return _ALGORITHM in fields or (isinstance(columns, dict) and _CRYPTO in columns)


def largest_page(file: IO[bytes], chunk: Any, path: Path) -> int:
    """The bytes of the largest page of a column chunk (Arrow's metadata of it), unpacked, as its headers claim.

    Raises:
        CorpusError: a page of more than 128 MiB, or headers that cannot be.
    """
    start = chunk.data_page_offset
    if chunk.dictionary_page_offset is not None and 0 < chunk.dictionary_page_offset < start:
        start = chunk.dictionary_page_offset
    end = start + chunk.total_compressed_size
    largest = values = pages = 0
    while start < end and values < chunk.num_values:
        pages += 1
        if pages > chunk.num_values + 2:  # of these one may be a dictionary's
            raise CorpusError(f"{path}: damaged parquet file: pages without values")
        unpacked, packed, header, count = _page(file, start, path)
        largest = max(largest, unpacked, packed)
        if largest > MOST_PAGE_BYTES:
            raise CorpusError(
                f"{path}: has a page of {largest:,} bytes, more than {MOST_PAGE_BYTES:,}; write it anew with smaller pages"
            )
        values += count
        start += header + packed
    return largest


def _page(file: IO[bytes], start: int, path: Path) -> tuple[int, int, int, int]:
    """Bytes unpacked and packed, bytes of the header, and values of a data page."""
    size = _HEADER_BYTES
    while True:
        file.seek(start)
        data = file.read(size)
        try:
            fields, end = _struct(data, 0, 0)
            break
        except IndexError:
            if len(data) < size or size >= _MOST_HEADER_BYTES:
                raise CorpusError(f"{path}: damaged parquet file: a page without a header") from None
            size *= 16
    data_page = fields.get(5) or fields.get(8) or {}
    numbers = fields.get(2), fields.get(3), data_page.get(1, 0) if isinstance(data_page, dict) else None
    unpacked, packed, count = (each if isinstance(each, int) else -1 for each in numbers)
    if min(unpacked, packed, count) < 0:
        raise CorpusError(f"{path}: damaged parquet file: a page with a header that is none")
    return unpacked, packed, end, count


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """Numbers and structures of a structure, by field, and where it ends; `IndexError` where the bytes do not suffice.

    A list of structures is given as one structure, with the fields that any of them has.
    """
    fields: dict[int, Any] = {}
    number = 0
    if depth > _DEEPEST:
        raise IndexError
    while (head := data[at]) & 0x0F != _STOP:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _number(data, at)
        fields[number], at = _value(data, at, head & 0x0F, depth)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, at
    if kind in (_I16, _I32, _I64):
        return _number(data, at)
    if kind == _STRUCT:
        return _struct(data, at, depth + 1)
    if kind in (_LIST, _SET):
        return _list(data, at, depth)
    if kind == _BINARY:
        length, at = _unsigned(data, at)
        at += length
    elif kind not in (_BYTE, _DOUBLE):  # there are no maps
        raise IndexError
    else:
        at += 8 if kind == _DOUBLE else 1
    data[at - 1]  # noqa: B018 (is it there?)
    return None, at


def _list(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    size, kind = data[at] >> 4, data[at] & 0x0F
    at += 1
    if size == 15:
        size, at = _unsigned(data, at)
    merged: dict[int, Any] = {}
    for _ in range(size):
        if kind in (_TRUE, _FALSE):
            kind = _BYTE
        value, at = _value(data, at, kind, depth)
        if isinstance(value, dict):
            _merge(merged, value)
    return merged, at


def _merge(into: dict[int, Any], other: dict[int, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _number(data: bytes, at: int) -> tuple[int, int]:
    value, at = _unsigned(data, at)
    return (value >> 1) ^ -(value & 1), at


def _unsigned(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80 or shift > 63:
            return value, at
