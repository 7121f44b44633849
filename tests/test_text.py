"""Values out of files, in messages and on a terminal."""

import pytest

from marlin_cli.text import markdown, one_line, printable, quoted, with_article

ITSELF: list = []
ITSELF.append(ITSELF)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("name", "'name'"),
        ("\x1b]0;title\x07", r"'\x1b]0;title\x07'"),
        ("\ud800\u202e\u2028", r"'\ud800\u202e\u2028'"),
        ("x" * 100_000, f"'{'x' * 77}'..."),
        (b"\xff" * 100_000, "b'" + r"\xff" * 77 + "'..."),
        (1 << 33_219, "<a whole number of 33,220 bits>"),
        (-5, "-5"),
        (True, "True"),
        (float("nan"), "nan"),
        (["a"] * 1000, "['a', 'a', 'a', 'a', ...]"),
        ({str(n): n for n in range(9)}, "{'0': 0, '1': 1, '2': 2, '3': 3, ...}"),
        (ITSELF, "[[[[...]]]]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_quoted(value, shown):
    assert quoted(value) == shown


def test_a_value_nested_deeper_than_python_goes_is_quoted():
    value: list = []
    for _ in range(100_000):
        value = [value]
    assert quoted(value) == "[[[[...]]]]"


def test_printable_leaves_what_a_terminal_shows():
    for text in ("plain", "two\nlines\tand a tab", "příliš žluťoučký 🐟 ไทย"):
        assert printable(text) == text
    assert printable("\x1b[31mred\x9b0m\x00\r\x7f\u202e\ud800") == r"\x1b[31mred\x9b0m\x00\r\x7f\u202e\ud800"


def test_one_line_is_one():
    assert one_line(ValueError("two\n  lines \x1b[1m")) == r"two lines \x1b[1m"


def test_articles():
    assert [with_article(name) for name in ("MegaByte", "EvaByte")] == ["a MegaByte", "an EvaByte"]


def test_text_in_markdown_is_text():
    assert markdown("[a](b) `c` <d>|*e*\\\n\x1b[0m") == r"\[a\](b) \`c\` \<d>\|\*e\*\\ \\x1b\[0m"
