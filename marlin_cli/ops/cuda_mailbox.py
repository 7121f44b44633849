"""Where a kernel leaves ids for the host, and tells what went wrong: an array of MLX takes half a millisecond to come there."""

import time

import numpy as np

from marlin_cli.errors import BackendError
from marlin_cli.ops.cuda_driver import pinned

SLOTS, WORDS = 4, 2048  # of launches that are not read yet, and of each: its number and ids; as local_patch_decode.cu has them
MOST_IDS = WORDS - 1
GAVE_UP, NOT_FINITE = -1, -2  # in place of an id
NUMBERS = 1 << 20  # launches are counted from 1, and begin again
PATIENCE_SECONDS = 60.0  # for all that the GPU has been given before
GAVE_UP_MESSAGE = "the GPU gave up a patch: its blocks did not all run at once; use MARLIN_KERNELS=reference"


class Alarm:
    """By which launches that leave no ids tell of a wait that they gave up: two words of 64 bits, see grid.cuh."""

    def __init__(self) -> None:
        self._words, self.address = pinned(4)

    def check(self) -> None:
        """See that no launch that has ended gave up.

        Raises:
            BackendError: one did.
        """
        if self._words[2]:
            raise BackendError(GAVE_UP_MESSAGE)


class Mailbox:
    """Ids of launches in turn; at most `SLOTS` are under way."""

    def __init__(self) -> None:
        self._memory, self.address = pinned(SLOTS * WORDS)
        self._number = 0

    def next(self) -> int:
        """The number of the launch that comes next."""
        self._number = self._number % NUMBERS + 1
        return self._number

    def read(self, number: int, streams: int, steps: int) -> np.ndarray:
        """The ids [streams, steps] of a launch, waited for; NOT_FINITE where logits were no numbers.

        Raises:
            BackendError: the launch did not end, or its blocks did not all run at once and gave up waiting for each other.
        """
        slot = self._memory[number % SLOTS * WORDS :][:WORDS]
        give_up = time.monotonic() + PATIENCE_SECONDS
        while slot[0] != number:
            if time.monotonic() > give_up:
                raise BackendError("the GPU did not end a patch within a minute; use MARLIN_KERNELS=reference")
        ids = slot[1 : 1 + streams * steps].reshape(streams, steps).copy()
        if (ids == GAVE_UP).any():
            raise BackendError(GAVE_UP_MESSAGE)
        return ids
