"""When a stream ends: after so many bytes, or at a stop sequence, which is held back while it may still turn out to be one."""

from dataclasses import dataclass

from marlin_cli.errors import UsageError
from marlin_cli.text import quoted


@dataclass(frozen=True)
class Stopping:
    """When a stream ends.

    Raises:
        UsageError: max_bytes below 0, or an empty stop sequence.
    """

    max_bytes: int = 256  # bytes to generate
    stop: tuple[bytes, ...] = ()  # byte sequences that end a stream; they are not part of the output

    def __post_init__(self) -> None:
        if self.max_bytes < 0:
            raise UsageError(f"max_bytes must be 0 or more, found {self.max_bytes}")
        check_stops(self.stop)


def check_stops(sequences: tuple[bytes, ...]) -> None:
    """Raise `UsageError` for a stop sequence that is empty or no bytes; a single one has become its letters or numbers."""
    for sequence in sequences:
        if not isinstance(sequence, bytes):
            found = f"{type(sequence).__name__} {quoted(sequence)}"
            raise UsageError(f"stop sequences are a list of bytes, found {found} in it; write [b'..'], and .encode() for a str")
        if not sequence:
            raise UsageError("a stop sequence is empty; give at least one byte")


class StopMatcher:
    """Holds bytes back while they may still turn out to be the beginning of a stop sequence."""

    def __init__(self, sequences: tuple[bytes, ...]) -> None:
        self._sequences = sequences
        self._held = b""

    def push(self, byte: int) -> tuple[bytes, bool]:
        """The bytes that are free to go after `byte`, and whether a stop sequence is complete."""
        held = self._held + bytes([byte])
        for sequence in self._sequences:
            if held.endswith(sequence):
                self._held = b""
                return held[: -len(sequence)], True
        kept = max((_overlap(held, sequence) for sequence in self._sequences), default=0)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept], False

    def flush(self) -> bytes:
        """The bytes still held, when the stream ends without the sequence."""
        held, self._held = self._held, b""
        return held


def _overlap(data: bytes, sequence: bytes) -> int:
    """Length of the longest end of `data` that begins `sequence`."""
    longest = min(len(data), len(sequence) - 1)
    return next((n for n in range(longest, 0, -1) if data.endswith(sequence[:n])), 0)
