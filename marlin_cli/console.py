"""What a person sees on stderr (progress, notes, tables, errors) and the tables of stdout. The only user of rich."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from marlin_cli.ranks import is_follower
from marlin_cli.text import printable

# Of long work, where nobody sees a moving bar.
SECONDS_BETWEEN_LINES = 10.0


class Console(RichConsole):
    """rich's own, which would end the program with code 1 where a reader has gone, and close stdout with stderr."""

    def on_broken_pipe(self) -> None:
        """Leave the error to the caller."""
        raise BrokenPipeError


def note(message: str) -> None:
    """One line of information on stderr; rank 0 alone says it."""
    if is_follower():
        return
    with _nobody_may_read():
        _stderr().print(printable(message), style="dim", highlight=False, markup=False, soft_wrap=True)


def note_to_terminal(message: str) -> None:
    """A note for a person who watches; silent where stderr is not a terminal."""
    if sys.stderr.isatty():
        note(message)


def failure(message: str) -> None:
    """One line on stderr that says what went wrong."""
    with _nobody_may_read():
        _stderr().print(f"marlin: {printable(message)}", highlight=False, markup=False, soft_wrap=True)


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, to_stdout: bool = False, numbers: bool = True
) -> None:
    """A table; the first column is text, the others are right-aligned numbers, or text too. Rank 0 alone prints it.

    Numbers are never cut: where a terminal is too narrow for all of them, the rest stands below, beside the first column again.
    """
    if is_follower():
        return
    columns, rows = [printable(column) for column in columns], [[printable(cell) for cell in row] for row in rows]
    # A pipe has no width: give it one in which no column is cut.
    console = Console(stderr=not to_stdout, emoji=False)
    if not console.is_terminal:
        console = Console(stderr=not to_stdout, width=160, emoji=False)
    with contextlib.nullcontext() if to_stdout else _nobody_may_read():
        # rich would break a title at the width of its table.
        console.print(printable(title), style="bold", markup=False, highlight=False, soft_wrap=True)
        for places in _blocks([columns, *rows], console.width) if numbers else [range(len(columns))]:
            console.print(_grid(columns, rows, places, numbers=numbers), markup=False)


GAP = 2  # between columns


def _blocks(lines: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """Columns that stand beside one another in so many characters. The first, which may fold to a third, leads each block."""
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    room = width - min(widths[0], width // 3)
    blocks: list[list[int]] = [[]]
    left = room
    for place, needed in enumerate(widths[1:], 1):
        if blocks[-1] and needed + GAP > left:
            blocks.append([])
            left = room
        blocks[-1].append(place)
        left -= needed + GAP
    return [[0, *block] for block in blocks]


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]], places: Sequence[int], *, numbers: bool) -> Table:
    grid = Table(box=None, pad_edge=False, show_header=any(columns))
    for place in places:
        number = numbers and place > 0
        grid.add_column(columns[place], justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        grid.add_row(*(row[place] for place in places))
    return grid


@contextlib.contextmanager
def byte_progress(description: str, total_bytes: int | None) -> Iterator["ByteProgress"]:
    """A progress line on stderr: bytes, bytes/s, time left. Where stderr is no terminal a line every ten seconds."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = _stderr()
    with Progress(*columns, console=console, disable=not console.is_terminal or is_follower(), transient=True) as progress:
        yield ByteProgress(progress, description, total_bytes, says_lines=not console.is_terminal)


class ByteProgress:
    """Handle of `byte_progress`."""

    def __init__(self, progress: Progress, description: str, total_bytes: int | None, *, says_lines: bool) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total_bytes)
        self._description, self._total, self._says_lines = description, total_bytes, says_lines
        self._done, self._said = 0, time.monotonic()

    def advance(self, count: int) -> None:
        """Say that `count` more bytes are done."""
        self._progress.advance(self._task, count)
        self._done += count
        if self._says_lines and (now := time.monotonic()) - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            share = f", {min(1.0, self._done / self._total):.0%}" if self._total else ""
            note(f"{self._description}: {self._done:,} bytes{share}")


@contextlib.contextmanager
def _nobody_may_read() -> Iterator[None]:
    """What stderr does not take is lost, and the work goes on: it is not for what a person would have seen."""
    try:
        yield
    except OSError:
        with contextlib.suppress(OSError):  # Python would write it once more at its end; not every stderr is a file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _stderr() -> Console:
    return Console(file=sys.stderr, emoji=False)  # `x:-1:` is no thumb
