"""Lines of JSON on stdout: what every line about a text begins with, places in it, and arrays of numbers."""

import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cli.api import decode
from marlin_cli.commands.texts import Text
from marlin_cli.engine.spans import Span


def write_line(document: Mapping[str, Any], **arrays: npt.NDArray[np.float32]) -> None:
    """Write a line of ASCII: an object, and in it float32 arrays [n] in the fewest digits that give the same numbers."""
    line = json.dumps(document, ensure_ascii=True, allow_nan=False)
    for name, array in arrays.items():
        line = f'{line[:-1]}, "{name}": [{", ".join(array.astype("U32").tolist())}]}}'
    sys.stdout.buffer.write(line.encode("ascii") + b"\n")


def name_of(index: int, text: Text) -> dict[str, Any]:
    """The number of a text, and the caller's name for it where it has one."""
    return {"index": index, **({} if text.prompt.name is None else {"id": text.prompt.name})}


def head_of(index: int, text: Text) -> dict[str, Any]:
    """As `name_of`, and how long the text is."""
    return {**name_of(index, text), "bytes": len(text.data), "characters": characters_in(text.data)}


def characters_in(data: bytes) -> int | None:
    """How many characters bytes have; None where they are no UTF-8."""
    try:
        return len(data.decode("utf-8"))
    except UnicodeDecodeError:
        return None


def span_as_mapping(span: Span, data: bytes, *, counted: bool = True) -> dict[str, Any]:
    """A span with its text. Where it cuts a character, or bytes are no UTF-8, U+FFFD stands in the text.

    Args:
        counted: do characters mean something, as the text is UTF-8?
    """
    places = span._asdict()
    if not counted:
        places |= {"first_character": None, "end_character": None}
    return {**places, "text": decode(data)}
