"""The lines of a file one by one, in bounded memory: every line has a largest size, and a whole file may have one."""

import codecs
from collections.abc import Iterator
from typing import IO

from marlin_cli.errors import MarlinError

# The longest line of JSON. Its values take up to some twenty times as much.
MOST_LINE_BYTES = 16 << 20


def lines_of(
    file: IO[bytes], name: str, error: type[MarlinError], *, most_bytes: int | None = None
) -> Iterator[tuple[str, bytes]]:
    """(`name: line 7`, the line without its line feed) of each line that holds more than blanks.

    Raises:
        MarlinError: as `error`: a line of more than 16 MiB, or a file of more than `most_bytes`.
    """
    total = number = 0
    while line := file.readline(MOST_LINE_BYTES + 1):
        number += 1
        total += len(line)
        if len(line) > MOST_LINE_BYTES:
            raise error(f"{name}: line {number} is longer than {MOST_LINE_BYTES:,} bytes; cut what it holds into several")
        if most_bytes is not None and total > most_bytes:
            raise error(f"{name}: is larger than {most_bytes:,} bytes; cut it into several files")
        if line.removeprefix(codecs.BOM_UTF8).strip():
            yield f"{name}: line {number}", line.removesuffix(b"\n")
