"""What comes through a pipe, as it comes: lines, blocks, and as many of anything as are there.

Pipes are read unbuffered and by a thread of their own: one that waits in a buffer's lock would disturb the exit.
"""

import itertools
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

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


def as_they_come(inputs: Iterable[T], size: int) -> Iterator[list[T]]:
    """Inputs in groups of those that are there, `size` at most, without waiting for more than one; read by a thread.

    An error comes after the inputs before it.
    """
    waiting: queue.Queue[tuple[T] | Exception | None] = queue.Queue(maxsize=4 * size)

    def read() -> None:
        try:
            for each in inputs:
                waiting.put((each,))
            waiting.put(None)
        except Exception as error:  # it belongs to the caller, who is in another thread
            waiting.put(error)

    threading.Thread(target=read, daemon=True).start()
    ended: Exception | bool = False
    while not ended:
        batch: list[T] = []
        for number in itertools.count():
            try:
                each = waiting.get(block=number == 0)
            except queue.Empty:
                break
            if not isinstance(each, tuple):
                ended = each or True
                break
            batch.append(each[0])
            if len(batch) == size:
                break
        if batch:
            yield batch
    if isinstance(ended, Exception):
        raise ended


def _read(descriptor: int, where: str) -> bytes:
    try:
        return os.read(descriptor, BLOCK_BYTES)
    except OSError as error:
        raise UsageError(f"{where}: cannot read: {error.strerror}") from None
