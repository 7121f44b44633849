"""Text of bytes: no character is broken, at most three bytes are held back, and all is as if decoded at once."""

import random

import pytest

from marlin_cli.serving.characters import Characters

ILL_FORMED = [b"\xff\xfe\x80", b"a\xc3", b"\xf0\x9f\x90", b"\xed\xa0\x80", b"\xc3\xc3\xa9", bytes(range(256))]
TEXTS = [b"plain\x00\x1b", "žluťoučký 中文 🐎".encode(), *ILL_FORMED]


@pytest.mark.parametrize("data", [*TEXTS, b"".join(TEXTS)])
def test_bytes_one_by_one_are_the_text_of_all_of_them(data):
    characters = Characters()
    text = "".join(characters.push(bytes([byte])) for byte in data)
    held = characters.push(b"", final=True)
    assert text + held == data.decode("utf-8", "replace") and characters.count == len(text + held)
    assert len(held) <= 3


def test_a_character_waits_for_its_last_byte_and_no_longer():
    characters = Characters()
    assert [characters.push(bytes([byte])) for byte in "a🐎b".encode()] == ["a", "", "", "", "🐎", "b"]


def test_any_cut_of_any_bytes_is_the_same_text():
    draw = random.Random(1)
    for _ in range(200):
        data = bytes(draw.choice(b"a\x80\xbf\xc3\xa9\xe4\xb8\xad\xf0\x9f\x90\x8e\xff") for _ in range(12))
        characters, text, first = Characters(), "", 0
        while first < len(data):
            end = first + draw.randint(1, 4)
            text, first = text + characters.push(data[first:end]), end
        assert text + characters.push(b"", final=True) == data.decode("utf-8", "replace")
