"""Streams of texts, for networks that read characters: the windows of a corpus, cut where characters begin and end."""

import codecs
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from marlin_cli.corpus.stream import Corpus
from marlin_cli.errors import CorpusError

GOES_ON = 3  # bytes of a character after its first, at most


@dataclass(frozen=True)
class Text:
    """UTF-8, at most `sequence_bytes` of it; `index` counts the windows of the corpus from 0."""

    domain: str
    data: bytes
    index: int


class TextCorpus:
    """The windows of a corpus that are UTF-8, but for the rest of a character at either end; others are counted.

    A corpus is bytes, some of which are no text (a domain `binary` is none): they are left out, not refused.
    """

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self.sequence_bytes, self.seed, self.max_bytes = corpus.sequence_bytes, corpus.seed, corpus.max_bytes
        self.left_out = 0  # windows that are no UTF-8, so far

    @property
    def resumable(self) -> bool:
        return self._corpus.resumable

    @property
    def domains(self) -> list[str]:
        return self._corpus.domains

    @property
    def total_bytes(self) -> int | None:
        return self._corpus.total_bytes

    def __iter__(self) -> Iterator[Text]:
        for window in self._corpus:
            data = whole_characters(window.bytes.tobytes())
            if data is None:
                self.left_out += 1
            elif data:
                yield Text(window.domain, data, window.index)

    def fingerprint(self) -> str:
        """SHA-256 over the corpus and that it is read as texts."""
        return hashlib.sha256(json.dumps(["texts", self._corpus.fingerprint()]).encode()).hexdigest()

    def state(self) -> dict[str, Any]:
        """See `Corpus.state`."""
        return {**self._corpus.state(), "left_out": self.left_out}

    def resume(self, state: dict[str, Any]) -> None:
        """See `Corpus.resume`."""
        count = state.get("left_out") if isinstance(state, dict) else None
        if type(count) is not int or count < 0:
            raise CorpusError("the saved place in the corpus is damaged; start again")
        self._corpus.resume(state)
        self.left_out = count


def whole_characters(window: bytes) -> bytes | None:
    """A window of a longer text without the parts of characters at its ends; None if the rest is no UTF-8."""
    first = sum(1 for _ in itertools.takewhile(_goes_on, window[:GOES_ON]))
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(window[first:])
    except UnicodeDecodeError:
        return None
    return window[first : len(window) - len(decoder.getstate()[0])]


def _goes_on(byte: int) -> bool:
    """Is this a byte of a character, but not its first?"""
    return byte & 0xC0 == 0x80
