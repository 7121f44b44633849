"""What a scheduler drives: the streams that a network remembers, which come and go and take each step together."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from marlin_cli.engine.sampling import NOISE_STEPS, Noise, Sampling
from marlin_cli.engine.speculation import Drafting

Floats = npt.NDArray[np.float32]


class StreamNoise:
    """The noise of one stream by the number of its own id, however many are asked for at once: that of `Noise`, on the host."""

    def __init__(self, seed: int, vocab: int) -> None:
        self.seed = seed
        self.taken = 0  # ids so far
        self._noise = Noise(seed, vocab)
        self._left: Floats = np.zeros((0, vocab), dtype=np.float32)

    def take(self, ids: int) -> Floats:
        """The noise of the next ids: [ids, vocab]."""
        while len(self._left) < ids:
            self._left = np.concatenate([self._left, np.array(self._noise.take(NOISE_STEPS))])
        taken, self._left = self._left[:ids], self._left[ids:]
        self.taken += ids
        return taken

    def copy(self) -> "StreamNoise":
        """One that goes on from here by itself, with the same noise."""
        other = copy.copy(self)
        other._noise = copy.copy(self._noise)
        return other

    def give_back(self, noise: Floats) -> None:
        """Take back what was taken last and not used."""
        self._left = np.concatenate([noise, self._left])
        self.taken -= len(noise)


@dataclass(frozen=True)
class Ask:
    """What a stream wants of the next step."""

    most: int  # ids at most; a stream that is given as many is asked for no more
    settings: Sampling
    noise: StreamNoise  # what it draws takes its own
    with_logits: bool = False
    drafting: Drafting | None = None  # what drafts it ahead, of streams that verify drafts


class Drawn(NamedTuple):
    """What a step gave a stream."""

    ids: Sequence[int]  # one at least; -1 where the model gave no numbers
    logits: Floats | None = None  # [ids, vocab] that they were drawn from, if they were asked for
    known: int = 0  # ids of the prompt that a keeper knew, so that they were not read


class Streams(Protocol):
    """What a network remembers of many streams, each under a number of its own, and how it goes on with them."""

    @property
    def no_drafts(self) -> str | None:
        """Why these streams verify no drafts; None: they do."""

    @property
    def nbytes(self) -> int:
        """Bytes of the caches in use."""

    def most_bytes(self, ids: int) -> int:
        """Bytes that the caches of a stream of so many ids may take."""

    def bytes_together(self, most: Sequence[int]) -> int:
        """Bytes that the caches of streams may take beside each other, each of which may take `most` alone."""

    def is_ready(self, ids: Sequence[int]) -> bool:
        """Would `begin` of this prompt answer at once? If not, what it waits for is on its way from here on."""

    def begin(self, stream: int, ids: Sequence[int]) -> None:
        """Take a prompt in; what it takes to read it comes with the steps."""

    def step(self, asks: Mapping[int, Ask], slice_rows: int) -> Mapping[int, Drawn]:
        """Read a slice of the prompts that are not read yet, in their order, and draw ids for all streams whose prompts are.

        Args:
            asks: of every stream.
            slice_rows: rows of prompts at most, while there are streams that wait for their next ids; see `slices`.

        Returns:
            What each stream drew, of those that did.
        """

    def end(self, stream: int) -> None:
        """Forget a stream, wherever it stands."""


# Rows of prompts that are read at once while no stream waits for ids.
ROWS_READ_ALONE = 256


def slices(unread: Mapping[int, int], ready: int, slice_rows: int) -> dict[int, int]:
    """How many rows of each prompt are read next, in their order; prompts that get none are left out.

    Args:
        unread: rows by stream.
        ready: other streams, which wait for ids.
        slice_rows: rows at most where there are such.
    """
    room = slice_rows if ready else max(slice_rows, ROWS_READ_ALONE)
    found = {}
    for stream, rows in unread.items():
        if room == 0:
            break
        found[stream] = min(rows, room)
        room -= found[stream]
    return found
