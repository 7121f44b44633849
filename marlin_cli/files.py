"""Files that are read: where shipped ones and caches lie, what is a file at all, fingerprints."""

import hashlib
import os
import stat
import sys
from pathlib import Path

from marlin_cli.errors import MarlinError

PACKAGE = Path(__file__).resolve().parent


def shipped(relative: str) -> Path:
    """The path of data that ships with marlin, for example `configs/models/megabyte-demo`.

    An installed wheel holds it inside the package, a checkout beside it.
    """
    inside = PACKAGE / relative
    return inside if inside.exists() else PACKAGE.parent / relative


def user_cache() -> Path:
    """Where marlin keeps what it can make again: MARLIN_CACHE, else `marlin` in the user's cache folder."""
    if "MARLIN_CACHE" in os.environ:
        return Path(os.environ["MARLIN_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(base) / "marlin"


def check_regular(path: Path, error: type[MarlinError]) -> None:
    """See that `path` is a file with an end: opening a pipe would wait for ever, and reading a device never ends.

    Raises:
        MarlinError: as `error`: it is missing, no regular file, or its name is none.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as problem:
        raise error(f"{path}: cannot read: {problem.strerror}") from None
    except ValueError as problem:  # a zero byte in the name
        raise error(f"{str(path)!r}: is no name of a file: {problem}") from None
    if not stat.S_ISREG(mode):
        raise error(f"{path}: is a {_kind(mode)}, expected a file")


def _kind(mode: int) -> str:
    kinds = {"folder": stat.S_ISDIR, "pipe": stat.S_ISFIFO, "socket": stat.S_ISSOCK}
    return next((name for name, test in kinds.items() if test(mode)), "device")


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of the bytes of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
