"""Classes of bytes, against Python's own reading of UTF-8."""

import numpy as np
import pytest

from marlin_cli.quality.byte_classes import BYTE_CLASSES, classes_of


def names(data: bytes) -> list[str]:
    return [BYTE_CLASSES[number] for number in classes_of(np.frombuffer(data, dtype=np.uint8))]


def by_decoding(data: bytes) -> list[str]:
    """High bytes alone: try at each place whether a character begins there."""
    kinds = ["high binary" if byte >= 0x80 else "" for byte in data]
    place = 0
    while place < len(data):
        for size in (2, 3, 4):
            try:
                text = data[place : place + size].decode()
            except UnicodeDecodeError:
                continue
            if len(text) == 1 and len(data[place : place + size]) == size:
                kinds[place : place + size] = ["UTF-8 lead"] + ["UTF-8 continuation"] * (size - 1)
                place += size - 1
                break
        place += 1
    return kinds


def test_each_kind():
    assert names(b"aZ") == ["ASCII letters"] * 2
    assert names(b"07") == ["digits"] * 2
    assert names(b" \t\n\r") == ["white space"] * 4
    assert names(b"!~_") == ["other ASCII"] * 3
    assert names(b"\0\x1b\x7f") == ["control bytes"] * 3
    assert names("\u00e9\u4e16\U0001f600".encode()) == [
        kind for count in (1, 2, 3) for kind in ("UTF-8 lead", *["UTF-8 continuation"] * count)
    ]
    assert names(b"\xff\xfe\x80") == ["high binary"] * 3
    assert names(b"") == []


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xc0\x80", id="overlong, 2"),
        pytest.param(b"\xe0\x9f\xbf", id="overlong, 3"),
        pytest.param(b"\xf0\x8f\xbf\xbf", id="overlong, 4"),
        pytest.param(b"\xed\xa0\x80", id="surrogate"),
        pytest.param(b"\xf4\x90\x80\x80", id="beyond U+10FFFF"),
        pytest.param(b"\xe4\xb8", id="cut short"),
    ],
)
def test_what_is_not_well_formed_is_binary(data):
    assert names(data) == ["high binary"] * len(data)


def test_random_bytes_are_read_as_python_reads_them():
    rng = np.random.default_rng(0)
    telling = np.array([0x41, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC1, 0xC2, 0xDF, 0xE0, 0xED, 0xEF, 0xF0, 0xF4, 0xF5])
    data = telling[rng.integers(0, len(telling), 20_000)].astype(np.uint8).tobytes()
    expected = by_decoding(data)
    assert {"UTF-8 lead", "UTF-8 continuation", "high binary"} <= set(expected)
    found = [name if byte >= 0x80 else "" for name, byte in zip(names(data), data, strict=True)]
    assert found == expected
