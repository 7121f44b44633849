"""A file of results, one JSON document a line, each with the time it was taken and a fingerprint of every model."""

import hashlib
import json
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from marlin_cli.bench.answering_report import AnsweringReport
from marlin_cli.bench.report import Report, to_json
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.errors import OutputError
from marlin_cli.files import sha256_of_file


def append_result(path: Path, report: Report | AnsweringReport, models: Sequence[str]) -> None:
    """Add the report to the end of `path`, whole or not at all; the file is made where there is none.

    Args:
        models: names or paths of the models, as `report.models` has them.

    Raises:
        OutputError: the file cannot be written.
    """
    document = json.loads(to_json(report))
    document["taken"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    for entry, name in zip(document["models"], models, strict=True):
        entry["fingerprint"] = fingerprint(locate_model(name))
    line = json.dumps(document, allow_nan=False).encode() + b"\n"
    is_new = not path.exists()
    try:
        with path.open("ab") as file:
            _append_whole(file.fileno(), line if _ends_a_line(path) else b"\n" + line)
    except OSError as error:
        if is_new:
            path.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot write: {error.strerror}") from None


def _ends_a_line(path: Path) -> bool:
    """Does the next byte of a file begin a line?"""
    if not path.is_file() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _append_whole(descriptor: int, line: bytes) -> None:
    """Write a line at the end of a file; where the disk is full, leave the file as it was."""
    before = os.fstat(descriptor).st_size
    written = 0
    try:
        while written < len(line):
            written += os.write(descriptor, line[written:])
    except OSError:
        if written:
            os.ftruncate(descriptor, before)
        raise


def fingerprint(path: Path) -> str:
    """SHA-256 over the names and contents of the files of a checkpoint, a file or a folder."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name if path.is_dir() else ''}\0{sha256_of_file(file)}\n".encode())
    return digest.hexdigest()
