"""A file of results, one JSON document a line, each with the time it was taken and a fingerprint of every model."""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from marlin_cli import console
from marlin_cli.bench.answering_result import AnsweringReport
from marlin_cli.bench.encoding_result import EncodingReport
from marlin_cli.bench.result import Report
from marlin_cli.checkpoints import ImportOptions
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.documents import parse_json
from marlin_cli.errors import OutputError
from marlin_cli.files import sha256_of_file
from marlin_cli.reports.changes import MOST_RESULT_BYTES
from marlin_cli.reports.forms import to_json


def append_result(
    path: Path,
    report: Report | AnsweringReport | EncodingReport,
    models: Sequence[str],
    imports: Mapping[str, ImportOptions],
) -> None:
    """Add the report to the end of `path`, whole or not at all; the file is made where there is none.

    Args:
        models: names or paths of the models, as `report.models` has them.
        imports: what was said of models that do not say all, by their names: it makes another model of the same files.

    Raises:
        OutputError: the file cannot be written.
    """
    document = json.loads(to_json(report))
    document["taken"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    for entry, name in zip(document["models"], models, strict=True):
        entry["fingerprint"] = fingerprint(locate_model(name), imports.get(name))
    line = json.dumps(document, allow_nan=False).encode() + b"\n"
    is_new = not path.exists()
    try:
        with path.open("ab") as file:
            if path.is_file():
                fcntl.flock(file, fcntl.LOCK_EX)  # another run may be at it
                line = _after_torn_line(path, file.fileno()) + line
            _append_whole(file.fileno(), line)
    except OSError as error:
        if is_new:
            path.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot write: {error.strerror}") from None


def _after_torn_line(path: Path, descriptor: int) -> bytes:
    """What has to be written before a new line: a line feed, where the last line has none.

    A last line that begins as ours do and is not whole was being written when its run was killed. It goes: nobody could
    read it, nor what follows it on the same line.
    """
    size = os.fstat(descriptor).st_size
    with path.open("rb") as file:
        file.seek(max(0, size - MOST_RESULT_BYTES))
        _, feed, last = file.read(MOST_RESULT_BYTES).rpartition(b"\n")
    if not last:
        return b""
    if (feed or len(last) == size) and _BEGINNING.startswith(last[: len(_BEGINNING)]) and not _is_json(last):
        os.ftruncate(descriptor, size - len(last))
        console.note(f"{path}: its last line was cut short by a run that was killed; it is removed")
        return b""
    return b"\n"


# How a result begins: see `forms.to_json`.
_BEGINNING = b'{"format_version": '


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line, "", OutputError)
    except OutputError:
        return False
    return True


def _append_whole(descriptor: int, line: bytes) -> None:
    """Write a line at the end of a file; where the disk is full or the run is interrupted, leave the file as it was."""
    before = os.fstat(descriptor).st_size
    written = 0
    try:
        while written < len(line):
            written += os.write(descriptor, line[written:])
    except BaseException:
        # An interrupt may come between a write and the count of it.
        if os.fstat(descriptor).st_size > before:
            os.ftruncate(descriptor, before)
        raise


def fingerprint(path: Path, options: ImportOptions | None = None) -> str:
    """SHA-256 over the names and contents of the files of a checkpoint, a file or a folder, and what was said of it."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    digest = hashlib.sha256()
    for name, value in () if options is None else vars(options).items():
        if value is not None:
            digest.update(f"{name}={value}\n".encode())
    for file in files:
        digest.update(f"{file.name if path.is_dir() else ''}\0{sha256_of_file(file)}\n".encode())
    return digest.hexdigest()
