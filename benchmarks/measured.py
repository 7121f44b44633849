"""Rows of the table of peers: said as soon as they are measured, and kept in a file where one is asked for."""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One comparison, as the table shows it."""

    what: str
    marlin: str
    peer: str
    ratio: str  # marlin's speed over the peer's
    outputs: str  # how they were compared in the same run

    def __str__(self) -> str:
        return f"{self.what}: marlin {self.marlin}; {self.peer}; {self.ratio}; {self.outputs}"


def add_rows_option(parser: argparse.ArgumentParser) -> None:
    """`--rows-file FILE`, which `report` takes."""
    parser.add_argument("--rows-file", type=Path, help="also append the rows of the table of peers to this file, as JSON")


def report(row: Row, file: Path | None) -> None:
    """Print a row, and append it to a file."""
    print(row, flush=True)
    if file is not None:
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(asdict(row)) + "\n")


def read_rows(file: Path) -> list[Row]:
    """The rows that `report` left in a file."""
    return [Row(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
