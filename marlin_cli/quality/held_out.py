"""The bytes that models are scored on: files by domain, as they lie, in windows that score each byte once. No shuffling."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from marlin_cli.corpus.readers import is_raw
from marlin_cli.corpus.sources import UNNAMED_DOMAIN, Source, parse_source
from marlin_cli.errors import CorpusError, UsageError
from marlin_cli.files import check_regular


@dataclass(frozen=True)
class Windowing:
    """How files become windows. Each window is read from an empty context.

    Windows are disjoint, or with `stride_bytes` they slide: each begins that many bytes after the one before, and what it
    shares with that one is context that is not scored again. So every byte is scored once either way, and beyond the
    first window of a file each has at least `window_bytes - stride_bytes` bytes before it.

    Raises:
        UsageError: a size below 1, or a stride longer than a window.
    """

    window_bytes: int = 2048  # the last one of a file may be shorter
    stride_bytes: int | None = None  # None: that of disjoint windows
    max_bytes_per_file: int | None = None  # only the first bytes of each file
    max_bytes: int | None = None  # in all, an equal share for each domain

    def __post_init__(self) -> None:
        for option, value in (
            ("--window-bytes", self.window_bytes),
            ("--stride-bytes", self.stride_bytes),
            ("--max-bytes-per-file", self.max_bytes_per_file),
            ("--max-quality-bytes", self.max_bytes),
        ):
            if value is not None and value < 1:
                raise UsageError(f"{option} must be at least 1, found {value}")
        if self.stride > self.window_bytes:
            raise UsageError(f"--stride-bytes {self.stride_bytes} leaves bytes out between windows of {self.window_bytes}")

    @property
    def stride(self) -> int:
        """Bytes from the start of a window to that of the next."""
        return self.window_bytes if self.stride_bytes is None else self.stride_bytes


@dataclass(frozen=True)
class Window:
    """`length` bytes of a file from `start` on, of which the first `context` are read but not scored."""

    file: Path
    start: int
    length: int
    context: int = 0

    @property
    def scored(self) -> int:
        """Bytes that are scored."""
        return self.length - self.context

    def read(self) -> npt.NDArray[np.uint8]:
        """The bytes [length].

        Raises:
            CorpusError: the file cannot be read, or has become shorter.
        """
        return self.read_with_margins(0)[0]

    def read_with_margins(self, margin: int) -> tuple[npt.NDArray[np.uint8], int]:
        """The bytes with at most `margin` more of the file on each side, and how many of those stand before.

        Raises:
            CorpusError: as `read`.
        """
        before = min(margin, self.start)
        try:
            with self.file.open("rb") as file:
                file.seek(self.start - before)
                data = file.read(before + self.length + margin)
        except OSError as error:
            raise CorpusError(f"{self.file}: cannot read: {error.strerror or error}") from None
        if len(data) < before + self.length:
            raise CorpusError(f"{self.file}: became shorter while it was being scored")
        return np.frombuffer(data, dtype=np.uint8), before


def files_by_domain(*names: str) -> dict[str, list[Path]]:
    """The files that `names` stand for, sorted, by domain; empty files are left out.

    A name is a folder, whose immediate subfolders are domains, or a recipe, a file or a pattern (see
    `corpus.parse_source`). Bytes are taken as they lie in the file; hidden files of a folder are left out.

    Raises:
        CorpusError: nothing of that name, no bytes, or sources that are not plain files.
        UsageError: a file that two names stand for.
    """
    domains: dict[str, list[Path]] = {}
    seen: dict[Path, str] = {}
    for name in names:
        for source in _sources(name):
            if source.hub is not None or source.stdin:
                raise CorpusError(f"--quality {name}: scores files, not a stream; write the bytes to a file first")
            for file in source.files:
                check_regular(file, CorpusError)
                _check_plain(file, source)
                if seen.setdefault(file.resolve(), name) is not name:
                    raise UsageError(f"--quality {name}: {file} is among {seen[file.resolve()]} too; name it once")
            domains.setdefault(source.domain, []).extend(source.files)
    return {domain: sorted(files) for domain, files in domains.items()}


def cut(files: Mapping[str, Sequence[Path]], windowing: Windowing) -> dict[str, list[Window]]:
    """The windows to score, by domain, in the order of the files.

    Where a domain has more than its share of `max_bytes`, windows at even steps through it are taken.

    Raises:
        UsageError: the share of a domain is smaller than one window.
    """
    windows = {domain: [window for path in paths for window in _windows_of(path, windowing)] for domain, paths in files.items()}
    if windowing.max_bytes is None:
        return windows
    share = windowing.max_bytes // len(windows)
    return {domain: _thinned(found, share, windowing) for domain, found in windows.items()}


def _sources(name: str) -> list[Source]:
    root = Path(os.path.expanduser(name))
    if not root.is_dir():
        return parse_source(name)
    # Calibration draws from the standard domains alone where a folder has them; of a score no file may be left out.
    domains: dict[str, list[Path]] = {}
    for file in sorted(root.rglob("*")):
        parts = file.relative_to(root).parts
        if file.is_file() and file.stat().st_size > 0 and not any(part.startswith(".") for part in parts):
            domains.setdefault(parts[0] if len(parts) > 1 else UNNAMED_DOMAIN, []).append(file)
    if not domains:
        raise CorpusError(f"--quality {name}: holds no bytes")
    return [Source(domain, 1.0, tuple(files)) for domain, files in domains.items()]


def _check_plain(file: Path, source: Source) -> None:
    if not is_raw(file, source):
        # `marlin calibrate` reads through these: scoring them as they lie would compare different bytes.
        raise CorpusError(
            f"{file}: --quality scores bytes as they lie and does not read rows or compressed files;"
            " unpack it, or write the text of its rows to a plain file"
        )


def _windows_of(path: Path, windowing: Windowing) -> list[Window]:
    size = path.stat().st_size
    if windowing.max_bytes_per_file is not None:
        size = min(size, windowing.max_bytes_per_file)
    windows: list[Window] = []
    scored = 0  # bytes of the file so far
    for start in range(0, size, windowing.stride):
        end = min(start + windowing.window_bytes, size)
        if end > scored:
            windows.append(Window(path, start, end - start, scored - start if windows else 0))
            scored = end
    return windows


def _thinned(windows: list[Window], share: int, windowing: Windowing) -> list[Window]:
    if sum(window.scored for window in windows) <= share:
        return windows
    for count in range(min(share // windowing.stride, len(windows)), 0, -1):
        chosen = [windows[(2 * number + 1) * len(windows) // (2 * count)] for number in range(count)]
        # The first window of a file scores all its bytes, those that slide a stride of them.
        if sum(window.scored for window in chosen) <= share:
            return chosen
    raise UsageError(
        f"--max-quality-bytes {windowing.max_bytes} leaves {share} bytes for a domain, less than one window of"
        f" {windowing.window_bytes}; raise it or lower --window-bytes"
    )
