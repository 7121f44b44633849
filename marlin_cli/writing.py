"""Results that are whole under their name or not there: a temporary one beside it, flushed, and renamed in one step."""

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from marlin_cli.errors import OutputError
from marlin_cli.files import check_utf8_name

# How the names of folders end that are being written, and those of files before their suffix.
UNFINISHED = ".unfinished"

# What a model folder of marlin's consists of: all that --overwrite takes the place of.
MODEL_FILES = (
    "config.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "README.md", "*.safetensors",
    "*.safetensors.index.json", "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*",
)  # fmt: skip

# What a model of anybody's could not be read without. Statistics may lie beside it, under other names.
MODEL_CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json")
MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.index.json")


@contextlib.contextmanager
def writing(path: Path, *, private: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`; when the block ends well it is flushed to disk and renamed to `path`.

    The temporary file keeps the suffix of `path`. Nothing stands under the final name unless it is whole; what earlier
    runs for the same `path` left because they were killed is removed first. A link is followed, and a device or a pipe
    is written into when all is ready, for renaming would take its place.

    Args:
        private: nobody but its owner may read it.

    Raises:
        OutputError: the folder is missing or not writable, the target is a folder, or the disk is full.
    """
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file to write")
    stream = path.exists() and not path.is_file()
    target = path if stream else _followed(path)
    try:
        if not stream:
            _remove_abandoned(target, target.suffix)
        handle, name = tempfile.mkstemp(
            prefix=f".{target.name}.", suffix=UNFINISHED + target.suffix, dir=None if stream else target.parent
        )
    except OSError as error:
        raise _cannot_write(path, error) from None
    temporary = Path(name)
    try:
        _lock(handle)
        yield temporary
        if stream:
            with temporary.open("rb") as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        else:
            _flush(temporary)
            if not private:
                temporary.chmod(0o666 & ~_umask())
            temporary.replace(target)
            _flush(target.parent)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def _followed(path: Path) -> Path:
    """The path that a link stands for, and of `.` and `..` one with a name, beside which something can be made.

    Raises:
        OutputError: the link leads to itself.
    """
    if path.name and path.name != ".." and not path.is_symlink():
        return path
    found = Path(os.path.realpath(path))  # of a link to itself the link, in every Python; `Path.resolve` differs
    if found.is_symlink():
        raise OutputError(f"{path}: cannot write: {os.strerror(errno.ELOOP)}")
    return found


@contextlib.contextmanager
def writing_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path`; when the block ends well it takes the place of `path` in one step.

    With `overwrite` a model folder that stands there goes, and nothing else does. Without, one that another process
    put there meanwhile stays, and this one is lost.

    Raises:
        OutputError: `path` exists and `overwrite` is off or it holds other files, or the folder cannot be written; or its
            name is not UTF-8.
    """
    path = _followed(path)
    check_output_folder(path, overwrite=overwrite)
    with scratch_folder(path) as temporary:
        yield temporary
        for file in temporary.iterdir():
            _flush(file)
        temporary.chmod(0o777 & ~_umask())
        check_output_folder(path, overwrite=overwrite)
        if path.exists():
            _exchange(temporary, path)
        else:
            _rename_to_nothing(temporary, path)
        _flush(path.parent)


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, for what `path` is made from; it is gone when the block ends.

    Folders that earlier runs for the same `path` left because they were killed are removed first.

    Raises:
        OutputError: it cannot be made, or the block cannot write.
    """
    try:
        _remove_abandoned(path)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=path.parent))
        lock = _locked(temporary)
    except OSError as error:
        raise _cannot_write(path, error) from None
    try:
        yield temporary
    except OSError as error:
        raise _cannot_write(path, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """While the block runs, no other process runs one for the same `path`: for work of hours that is saved as it goes.

    Raises:
        OutputError: another process does.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        descriptor = _open_lock(lock)
    except BlockingIOError:
        raise OutputError(f"{path}: another run is writing it; let that one end, or name another output") from None
    except OSError as error:
        raise _cannot_write(path, error) from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    """A descriptor that holds the lock file at `path`, made where it is missing; on a file system without locks, of no use.

    Raises:
        BlockingIOError: another process holds it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except OSError as error:
            if isinstance(error, BlockingIOError):
                os.close(descriptor)
                raise
            return descriptor
        os.close(descriptor)  # its holder has removed it meanwhile


def _remove_abandoned(path: Path, suffix: str = "") -> None:
    """Remove what is left of writing `path` and that no running process holds: temporary folders, or files of this suffix."""
    remove_abandoned(path.parent, glob.escape(path.name), suffix)


def remove_abandoned(folder: Path, names: str, suffix: str = "") -> None:
    """Remove what is left of writing files or folders of these names (a pattern) and that no running process holds.

    Args:
        suffix: of files; nothing for folders.
    """
    for left in folder.glob(f".{names}.????????{UNFINISHED}{glob.escape(suffix)}"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            lock = _locked(left)
            if lock is not None:
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)
                os.close(lock)


def _locked(path: Path) -> int | None:
    """A descriptor that locks a folder or file until it is closed or the process ends; None if another process holds it."""
    descriptor = os.open(path, os.O_RDONLY)
    if _lock(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _lock(descriptor: int) -> bool:
    """Lock what is open; False if another process holds it, or the file system has no locks, where nothing is removed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def check_output_folder(path: Path, *, overwrite: bool) -> None:
    """Raise now what `writing_folder` would raise after the work is done.

    Raises:
        OutputError: see `writing_folder`.
    """
    check_utf8_name(path, OutputError)
    if path.exists():
        if not overwrite:
            raise OutputError(f"{path}: already exists; name another folder or pass --overwrite")
        if not path.is_dir():
            raise OutputError(f"{path}: is a file; name a folder to write")
        try:
            foreign = sorted(each.name for each in path.iterdir() if not _is_of_a_model(each))
        except OSError as error:
            raise OutputError(f"{path}: cannot list what --overwrite would replace: {error.strerror}") from None
        if foreign:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise OutputError(
                f"{path}: --overwrite replaces a model folder, and {foreign[0]!r}{more} there is no part of one;"
                " move it, or name another folder"
            )
    check_output_parent(path)


def is_part_of_a_model(path: Path) -> bool:
    """Is there a file at `path`, or where a link there leads, without which the model in its folder could not be read?"""
    path = Path(os.path.realpath(path))
    return (
        path.is_file()
        and path.with_name("config.json").is_file()
        and any(path.match(pattern) for pattern in (*MODEL_CONFIGS, *MODEL_WEIGHTS))
    )


def _is_of_a_model(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and any(path.match(pattern) for pattern in MODEL_FILES)


def check_output_file(path: Path) -> None:
    """Raise now what `writing` would raise after the work is done.

    Raises:
        OutputError: see `writing`.
    """
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file to write")
    if path.exists() and not path.is_file():
        return  # a device or a pipe: its folder takes nothing
    check_output_parent(path)


def check_output_parent(path: Path) -> None:
    """Raise `OutputError` unless the folder that will hold `path` exists and can be written."""
    parent = path.parent
    if not parent.is_dir():
        raise OutputError(f"{path}: the folder {parent} does not exist; make it first")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{path}: no permission to write in {parent}")


# Flags of renameat2 (Linux) and renamex_np (macOS).
_NO_REPLACE = {"linux": 1, "darwin": 4}
_SWAP = {"linux": 2, "darwin": 2}

# What a system or a file system says that has no such renaming.
_NOT_KNOWN = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def _rename_to_nothing(source: Path, target: Path) -> None:
    """Rename a folder to a name that nothing has; `OutputError` where something came to stand there meanwhile."""
    try:
        if not _renamed(source, target, _NO_REPLACE):
            source.rename(target)  # fails too where a folder with files in it has the name
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
            raise
        raise OutputError(f"{target}: another run wrote it meanwhile; name another folder or pass --overwrite") from None


def _exchange(new: Path, old: Path) -> None:
    """Let `new` stand under the name of `old`, in one step where the system has one; what was there takes `new`'s name."""
    if _renamed(new, old, _SWAP):
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{old.name}.old.", dir=old.parent))
    try:
        old.rename(aside / old.name)
        try:
            new.rename(old)
        except BaseException:
            (aside / old.name).rename(old)
            raise
        (aside / old.name).rename(new)
    finally:
        aside.rmdir()


def _renamed(source: Path, target: Path, flags: dict[str, int]) -> bool:
    """Rename by a system call that does more than POSIX's; False where there is none."""
    name = {"linux": "renameat2", "darwin": "renameatx_np"}.get(sys.platform, "")
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
    if call is None:
        return False
    here = {"linux": -100, "darwin": -2}[sys.platform]  # AT_FDCWD
    if call(here, os.fsencode(source), here, os.fsencode(target), flags[sys.platform]) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_KNOWN:
        return False
    raise OSError(number, os.strerror(number), str(target))


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path}: cannot write: {error.strerror or error}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
