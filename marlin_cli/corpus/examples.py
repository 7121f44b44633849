"""Streams of inputs with their answers, for encoder-decoders: pairs of files, or the windows of a corpus corrupted."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from marlin_cli.corpus.pairs import Pair, locate_pairs, read_pairs
from marlin_cli.corpus.recipes import DOMAIN_NAME
from marlin_cli.corpus.spans import SpanCorruption, corrupt
from marlin_cli.corpus.stream import Corpus
from marlin_cli.errors import CorpusError

PAIRS_DOMAIN = "pairs"  # of a file that is given no name


@dataclass(frozen=True)
class Example:
    """An input and its answer; `size_bytes` bytes of the corpus went into them, `index` counts from 0."""

    domain: str
    source: bytes
    target: bytes
    index: int
    size_bytes: int


class PairCorpus:
    """The pairs of files, each once, in an order drawn by `seed`, until `max_bytes` of inputs and answers are reached.

    Pairs of which a side is longer than `sequence_bytes` are left out: half an input has another answer. They are held
    in memory. `state` after an example and `resume` of another object go on with the next one.
    """

    resumable = True

    def __init__(
        self, pairs: Sequence[tuple[str, Pair]], *, sequence_bytes: int, seed: int = 0, max_bytes: int | None = None
    ) -> None:
        """Takes (domain, pair) in any order; raises `CorpusError` for sizes below 1, or if no pair is short enough."""
        for name, value in (("sequence_bytes", sequence_bytes), ("max_bytes", max_bytes)):
            if value is not None and value < 1:
                raise CorpusError(f"{name} of pairs must be at least 1, found {value}")
        self.sequence_bytes, self.seed, self.max_bytes = sequence_bytes, seed, max_bytes
        fitting = [each for each in pairs if max(len(each[1].source), len(each[1].target)) <= sequence_bytes]
        self.left_out = len(pairs) - len(fitting)
        if not fitting:
            raise CorpusError(f"no pair has an input and an answer of {sequence_bytes} bytes at most; raise --seq-bytes")
        order = np.random.default_rng(seed).permutation(len(fitting))
        self._examples: list[Example] = []
        used = 0
        for index, place in enumerate(order):
            if max_bytes is not None and used >= max_bytes:
                break
            domain, pair = fitting[place]
            size = len(pair.source) + len(pair.target)
            self._examples.append(Example(domain, pair.source, pair.target, index, size))
            used += size
        self.total_bytes = used
        self._next = 0
        settings = json.dumps(["pairs", sequence_bytes, seed, max_bytes])
        self._fingerprint = _fingerprint(settings, self._examples)

    @property
    def domains(self) -> list[str]:
        """The domains, each once."""
        return list(dict.fromkeys(each.domain for each in self._examples))

    def __iter__(self) -> Iterator[Example]:
        while self._next < len(self._examples):
            self._next += 1
            yield self._examples[self._next - 1]

    def fingerprint(self) -> str:
        """SHA-256 over every pair and the settings."""
        return self._fingerprint

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON takes it."""
        return {"corpus": self.fingerprint(), "examples": self._next}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on after the example at which `state` was taken.

        Raises:
            CorpusError: not a state of these pairs with these settings.
        """
        done = state.get("examples") if isinstance(state, dict) else None
        if not isinstance(done, int) or not 0 <= done <= len(self._examples):
            raise CorpusError("the saved place in the pairs is damaged; start again")
        if state.get("corpus") != self.fingerprint():
            raise CorpusError("the saved place is of other pairs or other settings; name the same ones")
        self._next = done


class CorruptedCorpus:
    """The windows of a corpus, each with spans taken out by a draw of its own, so that any shard has the same ones."""

    def __init__(self, corpus: Corpus, settings: SpanCorruption | None = None) -> None:
        self._corpus, self._settings = corpus, settings or SpanCorruption()
        self.sequence_bytes, self.seed, self.max_bytes = corpus.sequence_bytes, corpus.seed, corpus.max_bytes

    @property
    def resumable(self) -> bool:
        return self._corpus.resumable

    @property
    def domains(self) -> list[str]:
        return self._corpus.domains

    @property
    def total_bytes(self) -> int | None:
        return self._corpus.total_bytes

    def __iter__(self) -> Iterator[Example]:
        for window in self._corpus:
            rng = np.random.default_rng([self.seed, window.index])
            source, target = corrupt(window.bytes.tobytes(), self._settings, rng)
            yield Example(window.domain, source, target, window.index, len(window.bytes))

    def fingerprint(self) -> str:
        """SHA-256 over the corpus and how it is corrupted."""
        facts = ["span corruption", asdict(self._settings), self._corpus.fingerprint()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def state(self) -> dict[str, Any]:
        """See `Corpus.state`."""
        return self._corpus.state()

    def resume(self, state: dict[str, Any]) -> None:
        """See `Corpus.resume`."""
        self._corpus.resume(state)


def open_pairs(names: Sequence[str], *, sequence_bytes: int, seed: int = 0, max_bytes: int | None = None) -> PairCorpus:
    """The pairs that `names` stand for: `[domain=]file`, or a shipped model that has pairs; the domain is `pairs`.

    Raises:
        CorpusError: see `read_pairs` and `PairCorpus`.
    """
    pairs = []
    for text in names:
        domain, rest = split_domain(text)
        pairs += [(domain or PAIRS_DOMAIN, pair) for pair in read_pairs(locate_pairs(rest))]
    return PairCorpus(pairs, sequence_bytes=sequence_bytes, seed=seed, max_bytes=max_bytes)


def split_domain(text: str) -> tuple[str | None, str]:
    """The name and the file of `[name=]file`; a file of that name wins."""
    named = None if os.path.exists(text) else re.fullmatch(rf"({DOMAIN_NAME})=(.+)", text, re.DOTALL)
    return (named[1], named[2]) if named else (None, text)


def _fingerprint(settings: str, examples: Sequence[Example]) -> str:
    digest = hashlib.sha256(settings.encode())
    for each in examples:
        sides = (each.domain.encode(), each.source, each.target)
        digest.update(b"".join(len(side).to_bytes(8, "little") + side for side in sides))
    return digest.hexdigest()
