"""What comes through a pipe, as it comes: lines, blocks, and as many of anything as are there.

Pipes are read unbuffered and by a thread of their own: one that waits in a buffer's lock would disturb the exit.
"""

import os
import queue
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from marlin_cli.corpus.lines import MOST_LINE_BYTES
from marlin_cli.errors import UsageError

BLOCK_BYTES = 1 << 16

# Blocks that are read ahead of a consumer.
BLOCKS_AHEAD = 4

T = TypeVar("T")


def lines_of_pipe(descriptor: int, where: str) -> Iterator[tuple[str, bytes]]:
    """(`where: line 7`, the line without its line feed) of every line.

    Raises:
        UsageError: a line of more than 16 MiB, or something that cannot be read.
    """
    number = 0
    rest = b""
    while block := _read(descriptor, where):
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            number += 1
            yield f"{where}: line {number}", line
        if len(rest) > MOST_LINE_BYTES:
            raise UsageError(f"{where}: line {number + 1} is longer than {MOST_LINE_BYTES:,} bytes; cut it into several")
    if rest:
        yield f"{where}: line {number + 1}", rest


def blocks_of_pipe(descriptor: int, where: str) -> Iterator[bytes]:
    """What is read at once, and an empty block before what has to be waited for.

    Raises:
        UsageError: something that cannot be read.
    """
    for blocks in as_they_come(iter(lambda: _read(descriptor, where), b""), BLOCKS_AHEAD):
        yield from blocks
        yield b""


class PipeSource:
    """The bytes of a pipe in the order in which they come, for who wants to know when it has to wait for more.

    Args:
        pause_seconds: how long to wait before that is told.
    """

    name = "stdin"

    def __init__(self, descriptor: int, pause_seconds: float) -> None:
        self._arriving = Arriving(iter(lambda: _read(descriptor, self.name), b""), BLOCKS_AHEAD)
        self._pause_seconds = pause_seconds
        self._left = b""

    @property
    def has_more(self) -> bool:
        """Is there something to read now?"""
        return bool(self._left) or self._arriving.is_waiting

    def read(self, most: int) -> bytes | None:
        """The next bytes, `most` at most: nothing at the end, None where they have to be waited for.

        Raises:
            UsageError: something that cannot be read.
        """
        if not self._left:
            blocks = self._arriving.take(1, wait=True, seconds=self._pause_seconds)
            if not blocks:
                self._arriving.check()
                return b"" if self._arriving.over else None
            self._left = blocks[0]
        data, self._left = self._left[:most], self._left[most:]
        return data


def as_they_come(inputs: Iterable[T], size: int) -> Iterator[list[T]]:
    """Inputs in groups of those that are there, `size` at most, without waiting for more than one; read by a thread.

    An error comes after the inputs before it.
    """
    arriving = Arriving(inputs, 4 * size)
    while batch := arriving.take(size, wait=True):
        yield batch
    arriving.check()


class Arriving(Generic[T]):
    """Inputs as they come, read by a thread.

    Args:
        ahead: that are read before they are asked for.
    """

    def __init__(self, inputs: Iterable[T], ahead: int) -> None:
        self._waiting: queue.Queue[tuple[T] | Exception | None] = queue.Queue(maxsize=ahead)
        self._error: Exception | None = None
        self.over = False  # has all been taken?
        threading.Thread(target=self._read, args=[inputs], daemon=True).start()

    def take(self, most: int, *, wait: bool, seconds: float | None = None) -> list[T]:
        """Those that are there, `most` at most. With `wait` it waits for one, and nothing means that all is over.

        Args:
            seconds: to wait at most; `over` tells then what nothing means.
        """
        taken: list[T] = []
        while not self.over and len(taken) < most:
            try:
                each = self._waiting.get(block=wait and not taken, timeout=seconds)
            except queue.Empty:
                break
            if isinstance(each, tuple):
                taken.append(each[0])
            else:
                self.over, self._error = True, each
        return taken

    @property
    def is_waiting(self) -> bool:
        """Is there something to take, or the end?"""
        return not self._waiting.empty()

    def check(self) -> None:
        """Raise the error that ended the inputs, if one did."""
        if self._error is not None:
            raise self._error

    def _read(self, inputs: Iterable[T]) -> None:
        try:
            for each in inputs:
                self._waiting.put((each,))
            self._waiting.put(None)
        except Exception as error:  # it belongs to the caller, who is in another thread
            self._waiting.put(error)


def stdin_descriptor() -> int:
    """What `-` names."""
    return sys.stdin.fileno()


def _read(descriptor: int, where: str) -> bytes:
    try:
        return os.read(descriptor, BLOCK_BYTES)
    except OSError as error:
        raise UsageError(f"{where}: cannot read: {error.strerror}") from None
