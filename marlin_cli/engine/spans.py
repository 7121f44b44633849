"""Places in a text that a model found: half-open, in bytes and in characters, with a label and a score."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

# Labels that say nothing, unless the caller names others.
OUTSIDE = ("O",)


class Span(NamedTuple):
    """`data[first_byte:end_byte]` has the label; characters are counted likewise."""

    label: str
    score: float
    first_byte: int
    end_byte: int
    first_character: int
    end_character: int


class Place(NamedTuple):
    """What a position of an encoder stands for: `data[first_byte:end_byte]`, or a mark, which is nothing of the text."""

    mark: str | None
    first_byte: int = 0
    end_byte: int = 0
    first_character: int = 0
    end_character: int = 0


class Run(NamedTuple):
    """Positions first to end - 1, one after the other, with one label."""

    label: str
    score: float
    first: int
    end: int


def span_at(label: str, score: float, first: int, end: int, starts: npt.NDArray[Any]) -> Span:
    """The span of characters first to end - 1; `starts` holds the byte at which each character of the text begins."""
    return Span(label, score, int(starts[first]), int(starts[end]), first, end)


def labelled_runs(labels: Sequence[str], scores: Floats, outside: Sequence[str], merge: bool) -> list[Run]:
    """Runs of positions, by the labels' probabilities [positions, labels].

    Args:
        outside: labels that say nothing.
        merge: neighbours of one label are one run with the mean of their scores; `B-` begins another, `I-` goes on.
    """
    best = scores.argmax(axis=-1) if len(scores) else np.zeros(0, dtype=np.int64)
    names = [labels[index] for index in best]
    kinds = [name[2:] if name[:2] in ("B-", "I-") else name for name in names]
    runs = []
    first = 0
    for end in range(1, len(names) + 1):
        goes_on = merge and end < len(names) and kinds[end] == kinds[first] and not names[end].startswith("B-")
        if goes_on:
            continue
        if names[first] not in outside:
            score = float(scores[np.arange(first, end), best[first:end]].mean())
            runs.append(Run(kinds[first] if merge else names[first], score, first, end))
        first = end
    return runs


def softmax(x: Floats) -> Floats:
    """Probabilities of the last axis; nothing of nothing."""
    grown = np.exp(x - x.max(axis=-1, keepdims=True)) if x.size else x
    return grown / grown.sum(axis=-1, keepdims=True) if x.size else x


def sigmoid(x: Floats) -> Floats:
    """Each score's own probability."""
    with np.errstate(over="ignore"):  # of a probability that is 0
        return np.asarray(1 / (1 + np.exp(-x)), dtype=np.float32)
