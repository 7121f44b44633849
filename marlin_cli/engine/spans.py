"""Places in a text that a model found: half-open, in bytes and in characters, with a label and a score."""

from typing import Any, NamedTuple

import numpy.typing as npt


class Span(NamedTuple):
    """`data[first_byte:end_byte]` has the label; characters are counted likewise."""

    label: str
    score: float
    first_byte: int
    end_byte: int
    first_character: int
    end_character: int


def span_at(label: str, score: float, first: int, end: int, starts: npt.NDArray[Any]) -> Span:
    """The span of characters first to end - 1; `starts` holds the byte at which each character of the text begins."""
    return Span(label, score, int(starts[first]), int(starts[end]), first, end)
