"""Streams of networks that take bytes one by one: each has a cache of its own, and a step is one pass over the rows of all.

A stream that has a draft of the bytes to come takes these behind the one that is due, in the same pass. What it would have
drawn is drawn at every place, with its own noise; its draft is right as far as that is the same, the rest is forgotten.
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from marlin_cli.engine.drafts import common_length
from marlin_cli.engine.sampling import draw
from marlin_cli.engine.speculation import Prices
from marlin_cli.engine.states import Beginning, KeptRows, Place, PromptKeeper, StreamState, Units, ids_of
from marlin_cli.engine.streams import Ask, Drawn, Floats, slices


class Text(Protocol):
    """What a network remembers of one text."""

    @property
    def nbytes(self) -> int:
        """Bytes in use."""

    @property
    def most_drafted(self) -> int | None:
        """How many of the rows to come next, behind one that stays, could be forgotten; None: any number."""

    def may_go_back(self) -> None:
        """Some of the rows to come next may be forgotten."""

    def forget(self, rows: int) -> None:
        """Forget the last rows, of those that came last."""

    def kept(self) -> KeptRows:
        """The rows so far, which stay as they are; asked for where prompts are kept."""

    def take_up(self, beginning: Beginning) -> None:
        """Go on from the beginning of a prompt, in place of nothing; as `kept`."""


class Read(NamedTuple):
    """What a pass gave of its rows.

    Attributes:
        logits: [rows, vocab] of what follows them.
        hidden: [rows, width], where the network guesses further ids from them.
    """

    logits: mx.array
    hidden: mx.array | None = None


class TextReader(Protocol):
    """How a network reads texts that stand at places of their own."""

    @property
    def no_drafts(self) -> str | None:
        """See `Streams`."""

    def led(self, ids: Sequence[int]) -> list[int]:
        """What is read of a text from its beginning: its ids, with whatever comes before them."""

    def new_text(self) -> Text:
        """What is remembered of no rows."""

    def read(self, ids: Sequence[Sequence[int]], texts: Sequence[Any], *, every: bool) -> Read:
        """Append ids to texts, one to each at least: what the last row of each gives, or every row."""

    def further(self, hidden: mx.array) -> mx.array | None:
        """Of hidden rows [rows, width] logits [rows, n, vocab] of the ids after the next one; None: it has no such heads."""

    def most_bytes(self, ids: int) -> int:
        """Bytes that a text of so many ids may take."""


class _Stream:
    """What is known of one stream.

    Attributes:
        unread: ids that its text has not seen.
        enters: is its prompt still being read?
        seen: those that it has seen, if they are kept; `marks` of them lead the text.
        logits: [rows, vocab] of the ids after those seen, and the row there of the next one.
        guess: ids after those unread, as the network's further heads have them.
    """

    def __init__(self, unread: list[int], text: Text, seen: list[int], marks: int) -> None:
        self.unread, self.text, self.seen, self.marks = unread, text, seen, marks
        self.enters = True
        self.known = len(seen) - marks  # ids of its prompt that need not be read
        self.logits: tuple[mx.array, int] | None = None
        self.guess: list[int] = []


class ByteStreams:
    """`Streams` of a network by its `TextReader`."""

    def __init__(self, reader: TextReader, keeper: PromptKeeper | None = None, *, leads_all: bool = True) -> None:
        self._reader, self._keeper, self._leads_all = reader, keeper, leads_all
        self._streams: dict[int, _Stream] = {}
        self._prices = Prices()

    @property
    def no_drafts(self) -> str | None:
        return self._reader.no_drafts

    @property
    def nbytes(self) -> int:
        return sum(stream.text.nbytes for stream in self._streams.values())

    def most_bytes(self, ids: int) -> int:
        return self._reader.most_bytes(ids)

    def bytes_together(self, most: Sequence[int]) -> int:
        return sum(most)

    def is_ready(self, ids: Sequence[int]) -> bool:
        return self._keeper is None or self._keeper.is_ready(ids)

    def begin(self, stream: int, ids: Sequence[int]) -> None:
        text = self._reader.new_text()
        beginning = None if self._keeper is None else self._keeper.restore(ids)
        known = 0 if beginning is None else min(beginning.units, len(ids) - 1)  # what predicts the next id is read
        if beginning is not None and known:
            text.take_up(replace(beginning, units=known, count=beginning.count - beginning.units + known, places=()))
            self._streams[stream] = _Stream(list(ids[known:]), text, list(ids[:known]), 0)
        else:
            led = self._reader.led(ids)
            self._streams[stream] = _Stream(led, text, [], len(led) - len(ids))

    def step(self, asks: Mapping[int, Ask], slice_rows: int) -> Mapping[int, Drawn]:
        began = time.process_time()
        entering = {number: len(stream.unread) for number, stream in self._streams.items() if stream.enters}
        drafted = self._drafts(asks)
        reads = {number: 1 for number, stream in self._streams.items() if not stream.enters}
        reads |= slices(entering, len(reads), slice_rows)
        ids = {number: [*self._streams[number].unread[:count], *drafted.get(number, ())] for number, count in reads.items()}
        read = self._reader.read(list(ids.values()), [self._streams[number].text for number in ids], every=bool(drafted))
        ends = itertools.accumulate(map(len, ids.values())) if drafted else range(1, 1 + len(ids))
        rows: dict[int, range] = {}  # that streams draw from, of those that do
        for (number, count), end in zip(reads.items(), ends, strict=True):
            stream = self._streams[number]
            if self._keeper is not None:
                stream.seen += stream.unread[:count]
            stream.unread = stream.unread[count:]
            if not stream.unread:
                rows[number] = range(end - 1 - len(drafted.get(number, ())), end)
        if not rows:
            mx.eval(read.logits)
            return {}
        found = self._drawn(asks, read.logits, rows, drafted)
        for number in entering.keys() & found.keys():
            self._keep(self._streams[number])
            self._streams[number].enters = False
        self._guess(asks, read, {number: rows[number][len(found[number].ids) - 1] for number in found})
        if not entering and any(asks[number].drafting is not None for number in found):
            self._learn(time.process_time() - began, len(found), sum(map(len, drafted.values())))
        return found

    def _drafts(self, asks: Mapping[int, Ask]) -> dict[int, list[int]]:
        """The ids that streams are drafted ahead, of those that are."""
        found = {}
        for number, stream in self._streams.items():
            drafting = asks[number].drafting
            if drafting is None or stream.enters:
                continue
            room = stream.text.most_drafted
            most = asks[number].most - 1
            ids = drafting.draft(1, 0, most if room is None else min(most, room), self._prices, stream.guess)
            if ids:
                found[number] = ids
                stream.text.may_go_back()
        return found

    def _drawn(
        self, asks: Mapping[int, Ask], logits: mx.array, rows: Mapping[int, range], drafted: Mapping[int, Sequence[int]]
    ) -> dict[int, Drawn]:
        """What streams draw from rows of logits, as far as their drafts are right; the rest of these is forgotten."""
        order = list(itertools.chain(*rows.values()))
        some = logits if order == list(range(len(logits))) else logits[mx.array(order)]
        settings = [asks[number].settings for number, own in rows.items() for _ in own]
        noises = [_taken(asks[number], len(own), logits.shape[1]) for number, own in rows.items()]
        values, costs = draw(some, [()], settings, mx.array(np.concatenate(noises)))
        values = [value if np.isfinite(cost) else -1 for value, cost in zip(values, costs, strict=True)]
        told = np.array(some) if any(asks[number].with_logits for number in rows) else None
        found, start = {}, 0
        for (number, own), noise in zip(rows.items(), noises, strict=True):
            stream, draft = self._streams[number], list(drafted.get(number, ()))
            drawn = values[start : start + len(own)]
            right = common_length(drawn, draft)
            if right < len(draft):
                stream.text.forget(len(draft) - right)
                _give_back(asks[number], noise[1 + right :])
            if self._keeper is not None:
                stream.seen += draft[:right]
            drawn = drawn[: 1 + right]
            stream.unread, stream.logits = [max(drawn[-1], 0)], (some, start + right)
            own_logits = told[start : start + 1 + right] if told is not None and asks[number].with_logits else None
            found[number] = Drawn(drawn, own_logits, stream.known)
            start += len(own)
        return found

    def _guess(self, asks: Mapping[int, Ask], read: Read, rows: Mapping[int, int]) -> None:
        """Note what the network itself guesses of the ids after those just drawn, from so many rows of a pass."""
        if read.hidden is None:
            return
        wanting = []
        for number in rows:
            drafting = asks[number].drafting
            if drafting is not None and drafting.wants_guess(self._prices):
                wanting.append(number)
            else:
                self._streams[number].guess = []
        logits = self._reader.further(read.hidden[mx.array([rows[number] for number in wanting])]) if wanting else None
        if logits is None:
            return
        _, count, vocab = logits.shape
        noises = [_taken(asks[number], count, vocab) for number in wanting]
        for number, noise in zip(wanting, noises, strict=True):
            _give_back(asks[number], noise)  # the head that counts draws with the same
        settings = [asks[number].settings for number in wanting for _ in range(count)]
        ids, _ = draw(logits.reshape(-1, vocab), [()], settings, mx.array(np.concatenate(noises)))
        for place, number in enumerate(wanting):
            self._streams[number].guess = ids[place * count : (place + 1) * count]

    def _learn(self, seconds: float, streams: int, drafted: int) -> None:
        """What a step has cost, for those that follow."""
        if drafted:
            self._prices.drafted(seconds, 0.0, streams, drafted)
        else:
            self._prices.plain(seconds, 0.0, streams)

    def end(self, stream: int) -> None:
        ended = self._streams.pop(stream, None)
        if ended is not None and not ended.enters and self._keeper is not None and self._keeper.keeps_outputs:
            self._keep(ended)

    def _keep(self, stream: _Stream) -> None:
        """Hand over what stands for all that a stream has seen."""
        ids = stream.seen[stream.marks :]
        # A mark that leads an empty prompt alone does not lead what follows it, when that is a prompt.
        alone = stream.marks and not self._leads_all
        if self._keeper is None or not ids or alone:
            return
        assert stream.logits is not None
        logits, row = stream.logits
        self._keeper.keep(StreamState(ids_of(ids), Units(), stream.text.kept(), (Place(len(ids), logits[row : row + 1]),)))


def _taken(ask: Ask, ids: int, vocab: int) -> Floats:
    """The noise that a stream draws its next ids with: [ids, vocab]."""
    return ask.noise.take(ids) if ask.settings.temperature else np.zeros((ids, vocab), dtype=np.float32)


def _give_back(ask: Ask, noise: Floats) -> None:
    """Of what was taken last, what was not used."""
    if ask.settings.temperature:
        ask.noise.give_back(noise)
