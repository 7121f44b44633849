"""Networks of random weights that write given texts: the noise of a draw decides for the next byte, whatever the logits are.

All that a network costs, it costs; what it writes is what a model would write that edits, corrects or copies. No public weights
of a MegaByte do any of these: how often drafts are right is a property of the texts here, how fast that is one of the engine.
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from marlin_cli.engine import answer_scheduler, stream_scheduler
from marlin_cli.engine.streams import Floats

# More than logits of random weights differ by.
DECIDES = 1e6


class ScriptedNoise:
    """A `StreamNoise` of which the ids of a text are drawn, one after the other, and zeros after them."""

    def __init__(self, ids: Sequence[int], vocab: int) -> None:
        self._ids, self._vocab, self.taken = list(ids), vocab, 0

    def take(self, ids: int) -> Floats:
        noise = np.zeros((ids, self._vocab), dtype=np.float32)
        own = [*self._ids[self.taken : self.taken + ids], *[0] * ids][:ids]
        noise[np.arange(ids), own] = DECIDES
        self.taken += ids
        return noise

    def give_back(self, noise: Floats) -> None:
        self.taken -= len(noise)


@contextlib.contextmanager
def writing(texts: Sequence[Sequence[int]]) -> Iterator[None]:
    """Streams draw the text that their seed is the number of, if their temperature is not 0."""

    def scripted(seed: int, vocab: int) -> ScriptedNoise:
        return ScriptedNoise(texts[seed], vocab)

    before = stream_scheduler.StreamNoise, answer_scheduler.StreamNoise
    stream_scheduler.StreamNoise = answer_scheduler.StreamNoise = scripted  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        stream_scheduler.StreamNoise, answer_scheduler.StreamNoise = before  # type: ignore[misc]
