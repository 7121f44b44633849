"""The ids of CANINE: the code points of decoded text, and a few of Unicode's private ones for marks of its own."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.errors import InputError
from marlin_cli.text import quoted

PAD, CLS, SEP = 0, 0xE000, 0xE001
CODE_POINTS = 0x110000  # ids that there are

Ids = npt.NDArray[np.int32]


class Characters(NamedTuple):
    """A text as CANINE reads it."""

    ids: Ids  # [characters]
    starts: npt.NDArray[np.int64]  # [characters + 1] the byte at which each begins, then the end


def characters_of(data: bytes, where: str = "the input") -> Characters:
    """The characters of UTF-8.

    Raises:
        InputError: the bytes are no UTF-8; `where` begins the line.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: is not UTF-8 ({error.reason} at byte {error.start:,}); CANINE reads characters, convert it first"
        ) from None
    ids = np.frombuffer(text.encode("utf-32-le"), dtype="<i4").astype(np.int32)
    begins = (np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80
    return Characters(ids, np.append(np.flatnonzero(begins), len(data)))


def checked_ids(ids: Sequence[int], where: str = "the input") -> Ids:
    """Ids given as numbers.

    Raises:
        InputError: one of them is no code point.
    """
    wrong = [value for value in ids if not hasattr(value, "__index__") or not 0 <= value < CODE_POINTS]
    if wrong:
        raise InputError(f"{where}: {quoted(wrong[0])} is no code point of Unicode; they are from 0 to {CODE_POINTS - 1:,}")
    return np.array(ids, dtype=np.int32)


def with_marks(first: Ids, second: Ids | None = None, second_type: int = 0) -> tuple[Ids, Ids]:
    """A text, or a pair of texts, with CANINE's marks around them: ids and types, both [positions].

    `second_type` is the type of the second text and its mark: 1 where transformers up to 4 prepared the pairs, 0 from 5 on.
    """
    ids = np.concatenate([[CLS], first, [SEP]])
    types = np.zeros(len(ids), dtype=np.int32)
    if second is not None:
        ids = np.concatenate([ids, second, [SEP]])
        types = np.concatenate([types, np.full(len(second) + 1, second_type)])
    return ids.astype(np.int32), types.astype(np.int32)


def padded_to(rows: Sequence[Ids], length: int, filler: int = PAD) -> mx.array:
    """Rows of at most `length` numbers as one array [n, length]."""
    filled = np.full((len(rows), length), filler, dtype=np.int32)
    for index, row in enumerate(rows):
        filled[index, : len(row)] = row
    return mx.array(filled)


def settled_length(positions: int, factor: int = 4) -> int:
    """Positions from which on padding changes the states of so many real ones no more, but for rounding."""
    return factor * ((positions + 1) // factor + 2)
