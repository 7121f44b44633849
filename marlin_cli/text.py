"""Text that a person may see: foreign messages in one line, and values out of files as `repr` has them."""

import reprlib
from typing import Any

# Characters of a value that a message quotes.
MOST_QUOTED = 80


class _Quoting(reprlib.Repr):
    """`repr` of parts alone: neither deep, long nor huge values take time, and none is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, MOST_QUOTED, MOST_QUOTED
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 4

    def repr_str(self, value: str | bytes, level: int) -> str:
        """The beginning of a text, or of bytes."""
        return repr(value) if len(value) <= self.maxstring else repr(value[: self.maxstring - 3]) + "..."

    repr_bytes = repr_str

    def repr_int(self, value: int, level: int) -> str:
        """The digits; Python refuses to write more than some thousands of them."""
        bits = value.bit_length()
        return repr(value) if bits <= 256 else f"<a whole number of {bits:,} bits>"


_QUOTING = _Quoting()


def quoted(value: Any) -> str:
    """A value out of a file or an option, for a message: its `repr`, cut; control characters are escapes in it."""
    return _QUOTING.repr(value)


def printable(text: str) -> str:
    """`text` with escapes for what a terminal would take as a command or could not show; line feeds and tabs stay."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in text)


def one_line(error: object) -> str:
    """The message of a foreign exception as one line."""
    return " ".join(printable(str(error)).split())


def markdown(text: str) -> str:
    """`text` in one line that Markdown shows as it is: no link, code, emphasis, HTML or border of a table comes of it."""
    return "".join(f"\\{each}" if each in "\\`*[]<|" else each for each in one_line(text))


def with_article(name: str) -> str:
    """`name` after `a` or `an`."""
    return f"{'an' if name[:1] in 'AEIOaeio' else 'a'} {name}"


def beginning(text: str, most: int) -> str:
    """The first whole sentences of a line that have at most so many characters; of a longer sentence its first words."""
    if len(text) <= most:
        return text
    end = text.rfind(". ", 0, most)
    return text[: end + 1] if end > 0 else text[: most - 4].rpartition(" ")[0] + " ..."
