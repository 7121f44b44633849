"""Files that are read: where shipped ones and caches lie, what is a file at all, fingerprints."""

import hashlib
import os
import stat
import sys
from pathlib import Path

from marlin_cli.errors import MarlinError, OutputError, UsageError
from marlin_cli.text import quoted

PACKAGE = Path(__file__).resolve().parent


def shipped(relative: str) -> Path:
    """The path of data that ships with marlin, for example `configs/models/megabyte-demo`.

    An installed wheel holds it inside the package, a checkout beside it.
    """
    inside = PACKAGE / relative
    return inside if inside.exists() else PACKAGE.parent / relative


def user_cache() -> Path:
    """Where marlin keeps what it can make again: MARLIN_CACHE, else `marlin` in the user's cache folder.

    A path that is not absolute would mean another folder wherever marlin is started, and code would be loaded from there.
    So MARLIN_CACHE is refused, and XDG_CACHE_HOME is ignored as its specification asks.

    Raises:
        UsageError: MARLIN_CACHE is empty or relative.
        OutputError: the user has no home folder.
    """
    named = os.environ.get("MARLIN_CACHE")
    if named is not None:
        if not Path(named).is_absolute():
            raise UsageError(f"MARLIN_CACHE must be an absolute path, found {quoted(named)}; name one, or unset it")
        return Path(named)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            home = Path.home()
        except RuntimeError:  # neither HOME nor an entry among the users
            home = Path()
        if not home.is_absolute() or home == Path("/"):
            raise OutputError("no place for a cache: HOME names no folder; set MARLIN_CACHE to an absolute path")
        base = home / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return base / "marlin"


def check_regular(path: Path, error: type[MarlinError], expected: str = "a file") -> None:
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
        raise error(f"{path}: is a {_kind(mode)}, expected {expected}")


def check_utf8_name(path: Path, error: type[MarlinError]) -> None:
    """See that MLX can take the name of a file: it reads and writes only those that are UTF-8.

    Raises:
        MarlinError: as `error`: the path is of other bytes.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise error(f"{path}: the path is not UTF-8, and MLX takes no other; rename it, or link to it") from None


# What files begin with that are often named in place of another, and what they are.
BEGINNINGS = {
    b"version https://git-lfs": "a pointer of Git LFS (git lfs pull fetches what it points to)",
    b"PK\x03\x04": "a zip file, as torch.save writes",
    b"GGUF": "GGUF",
    b"\x1f\x8b": "compressed by gzip",
    b"\xfd7zXZ": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
}
BEGINNING_BYTES = 256


def kind_of_content(start: bytes) -> str | None:
    """What a file is by its first bytes, to stand after `is`; None where they do not tell.

    Args:
        start: its first BEGINNING_BYTES, or all of it.
    """
    if not start:
        return "empty"
    for beginning, kind in BEGINNINGS.items():
        if start.startswith(beginning):
            return kind
    if start[8:9] == b"{" and start[7:8] == b"\0":  # the length of a header, then JSON
        return "safetensors"
    if start[:1] == b"\x80":
        return "a bare pickle"
    try:
        text = start.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:  # a character that was cut is no reason
            return None
        text = start[: error.start].decode("utf-8-sig")
    if not all(each.isprintable() or each in "\n\r\t\f" for each in text):
        return None
    first = text.lstrip().lower()
    return "JSON" if first[:1] in ("{", "[") else "a page of HTML" if first.startswith(("<!doctype", "<html")) else "text"


def kind_of_file(path: Path) -> str | None:
    """As `kind_of_content`, of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return kind_of_content(file.read(BEGINNING_BYTES))


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
