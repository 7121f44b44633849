"""Characters of CANINE: code points, where each begins, marks and padding."""

import numpy as np
import pytest

from marlin_cli.errors import InputError
from marlin_cli.models.canine_ids import CLS, PAD, SEP, characters_of, checked_ids, padded_to, with_marks


@pytest.mark.parametrize("text", ["", "a", "né\x00 東𝔘\n", "e\u0301", "\U0010ffff"])
def test_characters_and_where_they_begin(text):
    found = characters_of(text.encode())
    assert found.ids.tolist() == [ord(each) for each in text]
    assert found.starts.tolist() == [len(text[:index].encode()) for index in range(len(text) + 1)]


@pytest.mark.parametrize(("data", "place"), [(b"ab\xff", 2), (b"\x80", 0), (b"a\xed\xa0\x80", 1), (b"abc\xe2\x82", 3)])
def test_what_is_no_text_is_named(data, place):
    with pytest.raises(InputError, match=rf"^notes.txt: is not UTF-8 .* at byte {place}\)"):
        characters_of(data, "notes.txt")


@pytest.mark.parametrize("wrong", [-1, 0x110000, 1 << 70])
def test_numbers_that_are_no_code_points(wrong):
    with pytest.raises(InputError, match="no code point"):
        checked_ids([65, wrong])
    assert checked_ids([0, 0x10FFFF]).dtype == np.int32
    for wrong in ([65, 66.5], "ab", [None]):
        with pytest.raises(InputError, match="is no code point"):
            checked_ids(wrong)


def test_marks_around_a_text_and_a_pair():
    first, second = (characters_of(text).ids for text in (b"ab", b"c"))
    ids, types = with_marks(first)
    assert (ids.tolist(), types.tolist()) == ([CLS, 97, 98, SEP], [0] * 4)
    ids, types = with_marks(first, second, 1)
    assert (ids.tolist(), types.tolist()) == ([CLS, 97, 98, SEP, 99, SEP], [0, 0, 0, 0, 1, 1])
    assert with_marks(first, second)[1].tolist() == [0] * 6


def test_padding():
    assert padded_to([np.array([1, 2]), np.array([3])], 3).tolist() == [[1, 2, PAD], [3, PAD, PAD]]
    assert padded_to([np.array([1])], 2, -1).tolist() == [[1, -1]]
