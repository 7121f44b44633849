"""How many rows of prompts are read between two steps of the streams that run: by what steps and slices took lately."""

import statistics
from collections import deque

# A slice may take as long as so many steps of the streams that run, so their gap is one more. Short slices cost the prompt
# dear: each reads the keys and values of all that is before it anew.
STEPS_A_SLICE = 1.8

# Until both have been timed: rows for each stream that runs, and if few do.
ROWS_A_STREAM, LEAST_ROWS = 4, 16

# Fewer are never read: the prompt has to get on, too.
FEWEST_ROWS = 8

# Times that are remembered. Their median is taken: other programs make single ones long.
REMEMBERED = 5


class SlicePace:
    """See the top of this file.

    Args:
        most_rows: of a slice.
        is_timed: False takes the numbers from above, always: for ranks that have to read the same rows.
    """

    def __init__(self, most_rows: int, *, is_timed: bool = True) -> None:
        self._most, self._is_timed = most_rows, is_timed
        self._steps: dict[int, deque[float]] = {}  # seconds of steps without a slice, by how many streams ran
        self._rows: deque[float] = deque(maxlen=REMEMBERED)  # seconds of a row, of slices

    def rows(self, running: int) -> int:
        """Rows of the next slice, beside so many streams that wait for ids."""
        step = self._step(running)
        if step is None or not self._rows:
            rows = max(LEAST_ROWS, ROWS_A_STREAM * running)
        else:
            rows = max(FEWEST_ROWS, int(STEPS_A_SLICE * step / statistics.median(self._rows)))
        return min(self._most, rows)

    def took(self, seconds: float, running: int, rows: int) -> None:
        """A step of so many streams, with so many rows of prompts beside it, took so long."""
        if not self._is_timed or not running:
            return
        if rows == 0:
            self._steps.setdefault(running, deque(maxlen=REMEMBERED)).append(seconds)
            return
        step = self._step(running)
        if step is not None:
            self._rows.append(max(seconds - step, 0.1 * seconds) / rows)  # noise may make it shorter than a step alone

    def _step(self, running: int) -> float | None:
        """Seconds of a step of so many streams, or of the number nearest to it that was seen."""
        if not self._steps:
            return None
        return statistics.median(self._steps[min(self._steps, key=lambda seen: (abs(seen - running), seen))])
