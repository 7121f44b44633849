"""A decoder's steps for up to 16 answers as a CUDA kernel takes them: launches, the cache of its own rows, ids and costs."""

from ctypes import c_float, c_int32, c_uint32, c_uint64

import numpy as np

from marlin_cli.ops.cuda_arrays import StageArrays
from marlin_cli.ops.cuda_driver import Queue
from marlin_cli.ops.cuda_stages import MOST_VOCAB, MemoryPlaces, StageOnDevice

MOST_FED = 16  # ids that a launch takes through the layers, given and drawn
ROOM = 256  # rows of the cache at first; it doubles


class AnswersOnDevice(StageOnDevice):
    """A decoder over the memory of some inputs.

    Args:
        decoder: what `takes_stage` takes.
        streams: answers side by side, 1 to 16; those beyond the last input are filler.
        memory: what the decoder reads, and of how many inputs.
        known: addresses of the decoder's own arrays, if they have been asked for.
    """

    def __init__(
        self, decoder: StageArrays, streams: int, queue: Queue, memory: MemoryPlaces, known: list[int] | None = None
    ) -> None:
        super().__init__(decoder, streams, MOST_FED, queue, known)
        self._memory = memory
        self._given = queue.allocate(4 * streams * MOST_FED)
        self._last = queue.allocate(4 * streams)
        self._logits = queue.allocate(4 * streams * decoder.last.rows)
        self._barred = queue.allocate(MOST_VOCAB // 8)
        self._barred_ids: frozenset[int] = frozenset()
        self._row_bytes = streams * decoder.kv_heads * decoder.head_dim * decoder.table.dtype.size
        self._cache, self._room = queue.allocate(0), 0
        self._grow(ROOM)

    def feed(
        self, given: np.ndarray | None, seen: int, steps: int, noise: int, filters: tuple[float, float, float, int],
        barred: frozenset[int], *, keep_logits: bool = False,
    ) -> int:  # fmt: skip
        """Feed ids behind `seen` rows and draw the next ones; the mailbox has them by the number returned.

        Args:
            given: [streams, n] ids; None for those drawn last by the launch before.
            steps: ids to draw, of which all but the last are fed.
            noise: address of [steps, vocab] float32; 0 takes the likeliest.
            filters: temperature, top_p, min_p and top_k.
            barred: ids that are not drawn.
            keep_logits: for `logits`.
        """
        known = 1 if given is None else given.shape[1]
        assert self._launch is not None and self.mailbox is not None and known + steps - 1 <= MOST_FED
        while seen + known + steps - 1 > self._room:
            self._grow(2 * self._room)
        if given is not None:
            self._queue.write(self._given.address, np.ascontiguousarray(given, dtype=np.int32).tobytes())
        if barred != self._barred_ids:
            bits = np.zeros(MOST_VOCAB, np.uint8)
            bits[[id for id in barred if id < MOST_VOCAB]] = 1
            self._queue.write(self._barred.address, np.packbits(bits, bitorder="little").tobytes())
            self._barred_ids = barred
        number = self.mailbox.next()
        *floats, top_k = filters
        pointers = (
            self._places[-1], self._last.address if given is None else self._given.address, noise,
            self._barred.address if barred else 0, self._last.address, self._logits.address if keep_logits else 0,
        )  # fmt: skip
        self._launch(
            *map(c_uint64, pointers),
            *map(c_float, floats),
            *map(c_int32, (top_k, known, steps, seen, number)),
            c_uint32(self._next()),
        )
        return number

    def read(self, number: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids [streams, steps] drawn by a launch, waited for, and minus the logarithms of their probabilities.

        Raises:
            BackendError: see `Mailbox.read`.
        """
        assert self.mailbox is not None
        both = self.mailbox.read(number, 2 * self.streams, steps)
        return both[: self.streams], both[self.streams :].view(np.float32)

    def logits(self) -> np.ndarray:
        """What the ids of the last launch that kept them were drawn from: [streams, vocab] float32."""
        size = 4 * self.streams * self.stage.last.rows
        return np.frombuffer(self._queue.read(self._logits.address, size), np.float32).reshape(self.streams, -1)

    def _grow(self, rows: int) -> None:
        """Room for so many rows; they stand before each other, so that what is there goes on in front of more."""
        arrays, size = 2 * len(self.stage.layers), rows * self._row_bytes
        memory = self._queue.allocate(arrays * size)
        for i in range(arrays if self._room else 0):
            before = self._room * self._row_bytes
            self._queue.copy(memory.address + i * size, self._cache.address + i * before, before)
        self._queue.wait()  # before what it was copied from is given back
        self._cache, self._room = memory, rows
        self._record([memory.address + i * size for i in range(arrays)], rows, self._memory)
