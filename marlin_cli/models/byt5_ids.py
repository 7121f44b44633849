"""The ids of ByT5: three special ones, every byte, then sentinels. Bytes go through unchanged, whatever they are."""

import re
from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np

FIRST_BYTE = 3  # pad, end and unknown come before
FIRST_SPECIAL = FIRST_BYTE + 256

_SENTINEL = re.compile(rb"<extra_id_(\d{1,4})>")


def ids_of_bytes(data: bytes) -> list[int]:
    """An id for each byte."""
    return [byte + FIRST_BYTE for byte in data]


def bytes_of_ids(ids: Iterable[int]) -> bytes:
    """The bytes that ids stand for; ids that stand for none are left out."""
    return bytes(value - FIRST_BYTE for value in ids if FIRST_BYTE <= value < FIRST_SPECIAL)


def ids_with_sentinels(data: bytes, vocab_size: int) -> list[int]:
    """Ids of bytes in which `<extra_id_N>` stands for the N-th id after the bytes, where the vocabulary has it."""
    ids: list[int] = []
    end = 0
    for match in _SENTINEL.finditer(data):
        special = FIRST_SPECIAL + int(match[1])
        if special < vocab_size:
            ids += [*ids_of_bytes(data[end : match.start()]), special]
            end = match.end()
    return ids + ids_of_bytes(data[end:])


def bytes_with_sentinels(ids: Sequence[int]) -> bytes:
    """The bytes that ids stand for, and `<extra_id_N>` for the ids after them; the first three ids are left out."""
    return b"".join(
        bytes([value - FIRST_BYTE]) if value < FIRST_SPECIAL else b"<extra_id_%d>" % (value - FIRST_SPECIAL)
        for value in ids
        if value >= FIRST_BYTE
    )


def padded(sources: Sequence[Sequence[int]], pad_id: int) -> tuple[mx.array, mx.array | None]:
    """Ids of unequal lengths as one array [n, longest] and their lengths [n]; None where all are equal."""
    lengths = [len(source) for source in sources]
    ids = np.full((len(sources), max(lengths)), pad_id, dtype=np.int32)
    for row, source in enumerate(sources):
        ids[row, : len(source)] = source
    return mx.array(ids), mx.array(lengths) if len(set(lengths)) > 1 else None
