"""Noise of many steps on an NVIDIA GPU before it is asked for, as getting it there waits for MLX."""

import mlx.core as mx
import numpy as np

from marlin_cli.engine.sampling import Noise
from marlin_cli.ops.cuda_driver import Memory, Queue

NOISE_STEPS = 64, 512  # drawn at once, at first and then


class NoiseAhead:
    """Noise on the device, for many steps at once; each step's is what `Noise` gives it."""

    def __init__(self, queue: Queue, vocab: int) -> None:
        self._queue, self._vocab = queue, vocab
        self._memory: Memory | None = None
        self._taken: mx.array | None = None  # [steps, vocab]
        self._used = 0

    def take(self, noise: Noise, steps: int) -> int:
        """The address of the noise of the next steps."""
        if self._taken is None or self._used + steps > self._taken.shape[0]:
            first = self._taken is None
            self.close(noise)
            count = max(steps, NOISE_STEPS[0] if first else NOISE_STEPS[1])
            self._taken = noise.take(count)
            mx.eval(self._taken)
            if self._memory is None or self._memory.size < self._taken.nbytes:
                self._memory = self._queue.allocate(max(self._taken.nbytes, 4 * NOISE_STEPS[1] * self._vocab))
            self._queue.write(self._memory.address, bytes_of(self._taken))
        assert self._memory is not None
        self._used += steps
        return self._memory.address + 4 * self._vocab * (self._used - steps)

    def give_back(self, steps: int) -> None:
        """The last steps were not used."""
        self._used -= steps

    def close(self, noise: Noise) -> None:
        """Give back to `noise` what was not used."""
        if self._taken is not None:
            noise.give_back(self._taken[self._used :])
        self._taken, self._used = None, 0


def bytes_of(array: mx.array) -> bytes:
    """The bits of an array in rows."""
    words = {2: mx.uint16, 4: mx.uint32}[array.dtype.size]
    return np.array(mx.contiguous(array).view(words)).tobytes()
