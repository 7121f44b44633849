"""What kind of byte each byte is: letter, digit, part of a UTF-8 character, high byte of something else. No decoding."""

from typing import Any

import numpy as np
import numpy.typing as npt

# In the order of the numbers that `classes_of` gives.
BYTE_CLASSES = (
    "ASCII letters",
    "digits",
    "white space",
    "other ASCII",  # punctuation
    "control bytes",  # 0x00 too
    "UTF-8 lead",
    "UTF-8 continuation",
    "high binary",  # 0x80 and above, in no well-formed UTF-8 character
)
_LEAD, _CONTINUATION = BYTE_CLASSES.index("UTF-8 lead"), BYTE_CLASSES.index("UTF-8 continuation")

# A byte's class depends on as many bytes before and after it: the longest character has four.
MARGIN_BYTES = 3

Bytes = npt.NDArray[np.uint8]


def _class_of_values() -> Bytes:
    table = np.full(256, BYTE_CLASSES.index("high binary"), dtype=np.uint8)
    table[:128] = BYTE_CLASSES.index("other ASCII")
    table[[*range(32), 127]] = BYTE_CLASSES.index("control bytes")
    for name, members in (
        ("ASCII letters", b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"),
        ("digits", b"0123456789"),
        ("white space", b" \t\n\r\v\f"),
    ):
        table[list(members)] = BYTE_CLASSES.index(name)
    return table


_CLASS_OF_VALUE = _class_of_values()


def classes_of(data: Bytes) -> Bytes:
    """Number in `BYTE_CLASSES` of each byte of `data` [..., length].

    Well-formed UTF-8 is that of RFC 3629, section 4: no overlong forms, no surrogates, nothing above U+10FFFF. A
    character that is cut at an end of `data` is high binary: give `MARGIN_BYTES` more on each side and cut them off.
    """
    classes = _CLASS_OF_VALUE[data]
    if not (data >= 0x80).any():
        return classes
    second, third, fourth = (_shifted(data, count) for count in (1, 2, 3))
    one, two, three = (_between(byte, 0x80, 0xBF) for byte in (second, third, fourth))
    lowest = np.select([data == 0xE0, data == 0xF0], [0xA0, 0x90], 0x80)
    highest = np.select([data == 0xED, data == 0xF4], [0x9F, 0x8F], 0xBF)
    one &= (second >= lowest) & (second <= highest)
    of_two = _between(data, 0xC2, 0xDF) & one
    of_three = _between(data, 0xE0, 0xEF) & one & two
    of_four = _between(data, 0xF0, 0xF4) & one & two & three
    for count, leads in ((1, of_two | of_three | of_four), (2, of_three | of_four), (3, of_four)):
        classes[..., count:][leads[..., :-count]] = _CONTINUATION
        if count == 1:
            classes[leads] = _LEAD
    return classes


def _shifted(data: Bytes, count: int) -> Bytes:
    """The byte `count` places after each; 0 beyond the end."""
    shifted = np.zeros_like(data)
    shifted[..., :-count] = data[..., count:]
    return shifted


def _between(data: Bytes, low: int, high: int) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = (data >= low) & (data <= high)
    return found
