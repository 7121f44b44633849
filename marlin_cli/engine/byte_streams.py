"""Streams of ByGPT5 on the CPU: each has a cache of its own, and a step is one call of the kernels over the rows of all."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.fused import rotates
from marlin_cli.engine.fused_bygpt5 import FusedByGPT5, FusedRows, fuse_bygpt5
from marlin_cli.engine.sampling import draw
from marlin_cli.engine.states import Place, PromptKeeper, StreamState, Units, ids_of
from marlin_cli.engine.streams import Ask, Drawn, slices
from marlin_cli.models.bygpt5 import ByGPT5


class _Stream:
    """What is known of one stream.

    Attributes:
        unread: ids that its cache has not seen.
        enters: is its prompt still being read?
        seen: those that it has seen, if they are kept; `marks` of them lead the text.
        logits: [streams, vocab] of the id after those seen, and its row there.
    """

    def __init__(self, unread: list[int], rows: FusedRows, seen: list[int], marks: int) -> None:
        self.unread, self.rows, self.seen, self.marks = unread, rows, seen, marks
        self.enters = True
        self.known = len(seen) - marks  # ids of its prompt that need not be read
        self.logits: tuple[mx.array, int] | None = None


class ByteStreams:
    """`Streams` of a ByGPT5 whose layers the kernels know. Made by `byte_streams`."""

    def __init__(self, network: ByGPT5, fused: FusedByGPT5, bits: CacheBits, keeper: PromptKeeper | None = None) -> None:
        self._network, self._fused, self._bits, self._keeper = network, fused, bits, keeper
        self._streams: dict[int, _Stream] = {}

    @property
    def no_drafts(self) -> str:
        return "a model that takes bytes one by one has no patches to draft"

    @property
    def nbytes(self) -> int:
        return sum(stream.rows.nbytes for stream in self._streams.values())

    def most_bytes(self, ids: int) -> int:
        return self._fused.cache_bytes(ids + 1, self._bits)  # a mark may lead them

    def bytes_together(self, most: Sequence[int]) -> int:
        return sum(most)

    def is_ready(self, ids: Sequence[int]) -> bool:
        return self._keeper is None or self._keeper.is_ready(ids)

    def begin(self, stream: int, ids: Sequence[int]) -> None:
        rows = self._fused.new_rows(1, self._bits)
        beginning = None if self._keeper is None else self._keeper.restore(ids)
        known = 0 if beginning is None else min(beginning.units, len(ids) - 1)  # what predicts the next id is read
        if beginning is not None and known:
            rows.take_up(replace(beginning, units=known, count=beginning.count - beginning.units + known, places=()))
            self._streams[stream] = _Stream(list(ids[known:]), rows, list(ids[:known]), 0)
        else:
            led: Any = self._network.led(mx.array([list(ids)], dtype=mx.int32).reshape(1, -1)).tolist()
            self._streams[stream] = _Stream(led[0], rows, [], len(led[0]) - len(ids))

    def step(self, asks: Mapping[int, Ask], slice_rows: int) -> Mapping[int, Drawn]:
        entering = {number: len(stream.unread) for number, stream in self._streams.items() if stream.enters}
        reads = {number: 1 for number, stream in self._streams.items() if not stream.enters}
        reads |= slices(entering, len(reads), slice_rows)
        ids = {number: self._streams[number].unread[:count] for number, count in reads.items()}
        logits = self._fused.read_together(list(ids.values()), [self._streams[number].rows for number in ids])
        done = []
        for row, (number, count) in enumerate(reads.items()):
            stream = self._streams[number]
            if self._keeper is not None:
                stream.seen += stream.unread[:count]
            stream.unread = stream.unread[count:]
            if not stream.unread:
                stream.logits = logits, row
                done.append((row, number))
        for _, number in done:
            if self._streams[number].enters:
                self._keep(self._streams[number])
        if not done:
            return {}
        if len(done) < len(reads):
            logits = logits[mx.array([row for row, _ in done])]
        own = [asks[number] for _, number in done]
        noise = None
        if any(ask.settings.temperature for ask in own):
            blank = np.zeros((1, logits.shape[1]), dtype=np.float32)
            noise = mx.array(np.concatenate([ask.noise.take(1) if ask.settings.temperature else blank for ask in own]))
        drawn, costs = draw(logits, [()], [ask.settings for ask in own], noise)
        told = np.array(logits) if any(ask.with_logits for ask in own) else None
        found = {}
        for row, ((_, number), ask) in enumerate(zip(done, own, strict=True)):
            stream, value = self._streams[number], drawn[row] if np.isfinite(costs[row]) else -1
            stream.enters, stream.unread = False, [max(value, 0)]
            own_logits = told[row : row + 1] if told is not None and ask.with_logits else None
            found[number] = Drawn([value], own_logits, stream.known)
        return found

    def end(self, stream: int) -> None:
        ended = self._streams.pop(stream, None)
        if ended is not None and not ended.enters and self._keeper is not None and self._keeper.keeps_outputs:
            self._keep(ended)

    def _keep(self, stream: _Stream) -> None:
        """Hand over what stands for all that a stream has seen."""
        ids = stream.seen[stream.marks :]
        # A mark that leads an empty prompt alone does not lead what follows it, when that is a prompt.
        alone = stream.marks and not self._network.config.starts_all
        if self._keeper is None or not ids or alone:
            return
        assert stream.logits is not None
        logits, row = stream.logits
        self._keeper.keep(StreamState(ids_of(ids), Units(), stream.rows.kept(), (Place(len(ids), logits[row : row + 1]),)))


def byte_streams(network: Any, bits: CacheBits, keeper: PromptKeeper | None = None) -> ByteStreams | None:
    """The streams of a network, or None where it is another, or no kernels run that know its layers and such a cache."""
    fused = fuse_bygpt5(network)
    return None if fused is None or not rotates(network.config.head_dim, bits) else ByteStreams(network, fused, bits, keeper)
