"""The sizes that the pages of a Parquet column claim, read before any page is: a few bytes may stand for gigabytes.

The headers of pages are Thrift's compact protocol; the layout of both is in the specification of Parquet
(parquet.thrift, PageHeader). Nothing else of a page is read here.
"""

from pathlib import Path
from typing import IO, Any

from marlin_cli.errors import CorpusError

# The largest page, unpacked. Writers make pages of 1 MiB; some of up to 100 MB.
MOST_PAGE_BYTES = 128 << 20

# A header has some dozens of bytes, and the least and greatest value.
_HEADER_BYTES = 1 << 10
_MOST_HEADER_BYTES = 4 << 20

_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(13)


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
    """Numbers and structures of a structure, by field, and where it ends; `IndexError` where the bytes do not suffice."""
    fields: dict[int, Any] = {}
    number = 0
    if depth > 8:
        return {}, at
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
    if kind == _BINARY:
        length, at = _unsigned(data, at)
        at += length
    else:  # a byte; headers have no others
        at += 8 if kind == _DOUBLE else 1
    data[at - 1]  # noqa: B018 (is it there?)
    return None, at


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
