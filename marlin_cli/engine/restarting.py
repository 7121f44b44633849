"""Streams of any network that go on when its context is full: the last half of the context is read again, as a prompt."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from marlin_cli.engine.streams import Ask, Drawn, Streams


class RestartingStreams:
    """`Streams` whose ids have no end.

    Args:
        streams: that end with the context.
        context: ids that one of them may have.
    """

    def __init__(self, streams: Streams, context: int) -> None:
        self._streams, self._context = streams, context
        self._seen: dict[int, list[int]] = {}  # the ids of each stream since it was begun last
        self._made: dict[int, Callable[[Sequence[int]], Sequence[int]]] = {}  # of what its network's ids are: bytes, or numbers

    @property
    def no_drafts(self) -> str | None:
        return self._streams.no_drafts

    @property
    def nbytes(self) -> int:
        return self._streams.nbytes

    def most_bytes(self, ids: int) -> int:
        return self._streams.most_bytes(min(ids, self._context))

    def bytes_together(self, most: Sequence[int]) -> int:
        return self._streams.bytes_together(most)

    def is_ready(self, ids: Sequence[int]) -> bool:
        return self._streams.is_ready(self._beginning(ids))

    def begin(self, stream: int, ids: Sequence[int]) -> None:
        self._made[stream] = bytes if isinstance(ids, bytes) else list
        self._begin(stream, self._beginning(ids))

    def step(self, asks: Mapping[int, Ask], slice_rows: int) -> Mapping[int, Drawn]:
        room = {stream: self._context - len(self._seen[stream]) for stream in asks}
        inner = {stream: replace(ask, most=min(ask.most, room[stream])) for stream, ask in asks.items()}
        found = self._streams.step(inner, slice_rows)
        for stream, drawn in found.items():
            seen = self._seen[stream]
            seen += [max(value, 0) for value in drawn.ids[: inner[stream].most]]
            if len(seen) >= self._context and len(drawn.ids) < asks[stream].most:
                self._streams.end(stream)
                self._begin(stream, seen[len(seen) - (self._context + 1) // 2 :])
        return found

    def end(self, stream: int) -> None:
        self._seen.pop(stream, None)
        self._made.pop(stream, None)
        self._streams.end(stream)

    def _beginning(self, ids: Sequence[int]) -> Sequence[int]:
        """What is read of a prompt: a context that is full has no room for a first id."""
        return ids if len(ids) < self._context else ids[len(ids) - (self._context + 1) // 2 :]

    def _begin(self, stream: int, ids: Sequence[int]) -> None:
        self._seen[stream] = list(ids)
        self._streams.begin(stream, self._made[stream](ids))
