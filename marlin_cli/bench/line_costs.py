"""Costs of bytes as costs of lines, and the costliest so far. A line without an end is cut, so memory stays small."""

import heapq
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

# A line that is longer counts as several: binaries have few line feeds, or none.
MOST_LINE_BYTES = 4096

# Bytes of a line that are kept to show it.
SHOWN_BYTES = 160


@dataclass(frozen=True)
class Line:
    """A line, its line feed included, and what it cost."""

    number: int  # from 1
    offset: int  # bytes before it
    length: int = 0  # bytes
    bits: float = 0.0
    beginning: bytes = b""

    def with_more(self, data: bytes, bits: float) -> "Line":
        """The same with more bytes behind it."""
        shown = (self.beginning + data)[:SHOWN_BYTES]
        return replace(self, length=self.length + len(data), bits=self.bits + bits, beginning=shown)

    def as_mapping(self) -> dict[str, Any]:
        """For JSON, without what it says."""
        return {"line": self.number, "offset": self.offset, "bytes": self.length, "bits": round(self.bits, 3)}


class LineCosts:
    """Adds up what the bytes of a stream cost, by line.

    Args:
        top: how many of the costliest lines are kept.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self.bits = 0.0  # of all bytes so far
        self._open = Line(1, 0)
        self._heap: list[tuple[float, int, Line]] = []  # the cheapest first; of equal ones the later

    @property
    def lines(self) -> int:
        """Lines so far, the open one included if it has begun."""
        return self._open.number - (self._open.length == 0)

    @property
    def costliest(self) -> list[Line]:
        """The costliest lines that have ended, and the open one if it is among them; the costliest first."""
        lines = [line for _, _, line in self._heap] + ([self._open] if self._open.length else [])
        return sorted(lines, key=lambda line: (-line.bits, line.number))[: self._top]

    def push(self, data: bytes, bits: npt.NDArray[np.float32]) -> list[Line]:
        """The lines that end with these bytes."""
        ended, start = [], 0
        while start < len(data):
            end = data.find(b"\n", start) + 1 or len(data)
            end = min(end, start + MOST_LINE_BYTES - self._open.length)
            cost = float(bits[start:end].sum(dtype=np.float64))
            self.bits += cost
            self._open = self._open.with_more(data[start:end], cost)
            if data[end - 1 : end] == b"\n" or self._open.length == MOST_LINE_BYTES:
                ended.append(self._end())
            start = end
        return ended

    def finish(self) -> list[Line]:
        """The line that the stream ended in, if it has begun."""
        return [self._end()] if self._open.length else []

    def _end(self) -> Line:
        line = self._open
        self._open = Line(line.number + 1, line.offset + line.length)
        heapq.heappush(self._heap, (line.bits, -line.number, line))
        if len(self._heap) > self._top:
            heapq.heappop(self._heap)
        return line

    def memory(self) -> dict[str, Any]:
        """All that is remembered, as JSON has it."""
        lines = [self._open, *(line for _, _, line in sorted(self._heap))]
        return {"bits": self.bits, "lines": [[*_numbers(line), line.beginning.hex()] for line in lines]}

    def remember(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave.

        Raises:
            ValueError, TypeError, KeyError: it is not that.
        """
        open_, *ended = [
            Line(int(number), int(offset), int(count), float(bits), bytes.fromhex(shown))
            for number, offset, count, bits, shown in memory["lines"]
        ]
        self.bits, self._open = float(memory["bits"]), open_
        self._heap = [(line.bits, -line.number, line) for line in ended]
        heapq.heapify(self._heap)
        while len(self._heap) > self._top:
            heapq.heappop(self._heap)


def _numbers(line: Line) -> tuple[int, int, int, float]:
    return line.number, line.offset, line.length, line.bits
