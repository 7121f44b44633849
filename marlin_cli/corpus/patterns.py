"""The files below a folder, and those that a pattern names. Every folder is entered once, so loops of links end."""

import fnmatch
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from marlin_cli.errors import CorpusError

_MAGIC = re.compile(r"[*?\[]")


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder, except in hidden folders and linked ones.

    Raises:
        CorpusError: a folder that cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise CorpusError(f"{error.filename}: cannot list: {error.strerror}")

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def files_matching(pattern: str) -> Iterator[Path]:
    """What a pattern of `*`, `?`, `[...]` and `**` (any folders, or none) names, each once; hidden names if it says so.

    As `glob` has it, but `**` enters no linked folders, and a folder that several ways lead to is entered by the first.
    """
    parts = Path(pattern).parts
    if not any(_MAGIC.search(part) for part in parts):
        return
    found = [""]
    if os.path.isabs(parts[0]):
        found, parts = [parts[0]], parts[1:]
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if part == "**":
            found = _once(each for folder in found for each in _folders_below(folder))
            if last:
                found = [name for folder in found for name in _names_in(folder, "*")]
        elif _MAGIC.search(part):
            found = [name for folder in found for name in _names_in(folder, part)]
            if not last:
                found = _once(found)
        else:
            found = [name for folder in found if os.path.lexists(name := os.path.join(folder, part))]
    yield from map(Path, dict.fromkeys(found))


def _names_in(folder: str, part: str) -> Iterator[str]:
    try:
        names = sorted(os.listdir(folder or os.curdir))
    except (OSError, ValueError):  # no folder, no permission, no name
        return
    for name in names:
        if fnmatch.fnmatchcase(name, part) and (part.startswith(".") or not name.startswith(".")):
            yield os.path.join(folder, name)


def _folders_below(folder: str) -> Iterator[str]:
    """A folder, and those below that are neither hidden nor linked."""
    if os.path.isdir(folder or os.curdir):
        yield folder
    for parent, folders, _ in os.walk(folder or os.curdir):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        root = parent if folder else parent[2:]  # without ./
        yield from (path for name in folders if not os.path.islink(path := os.path.join(root, name)))


def _once(paths: Iterable[str]) -> list[str]:
    """Those that are folders, the first name of each."""
    names: dict[tuple[int, int], str] = {}
    for path in paths:
        try:
            status = os.stat(path or os.curdir)
        except (OSError, ValueError):
            continue
        names.setdefault((status.st_dev, status.st_ino), path)
    return list(names.values())
