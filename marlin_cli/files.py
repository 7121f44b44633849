"""Files: atomic writes, fingerprints, validated safetensors, and the folder where shipped data lies."""

import contextlib
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from marlin_cli.errors import CheckpointError, ConfigError, MarlinError, OutputError

# Bytes of a number, by the type's name in safetensors: those that are written here.
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "U32": 4, "U8": 1}

PACKAGE = Path(__file__).resolve().parent

# How the names of folders end that are being written, and those of files before their suffix.
UNFINISHED = ".unfinished"


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


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; when the block ends well it is flushed to disk and renamed to `path`.

    The temporary file keeps the suffix of `path`. Nothing stands under the final name unless it is whole; what earlier
    runs for the same `path` left because they were killed is removed first. A link is followed, and a device or a pipe
    is written into when all is ready, for renaming would take its place.

    Raises:
        OutputError: the folder is missing or not writable, the target is a folder, or the disk is full.
    """
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file to write")
    stream = path.exists() and not path.is_file()
    target = path.resolve() if path.is_symlink() and not stream else path
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


@contextlib.contextmanager
def writing_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path`; when the block ends well it takes the place of `path` in one rename.

    Raises:
        OutputError: `path` exists and `overwrite` is off, or the folder cannot be written.
    """
    check_output_folder(path, overwrite=overwrite)
    with scratch_folder(path) as temporary:
        yield temporary
        for file in temporary.iterdir():
            _flush(file)
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            path.rename(aside / path.name)
            try:
                temporary.rename(path)
            except BaseException:
                (aside / path.name).rename(path)
                aside.rmdir()
                raise
            shutil.rmtree(aside)
        else:
            temporary.rename(path)
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


def _remove_abandoned(path: Path, suffix: str = "") -> None:
    """Remove what is left of writing `path` and that no running process holds: temporary folders, or files of this suffix."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????{UNFINISHED}{glob.escape(suffix)}"):
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
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: already exists; name another folder or pass --overwrite")
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: is a file; name a folder to write")
    check_output_parent(path)


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


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with writing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, error: type[MarlinError] = ConfigError) -> Any:
    """The JSON document in `path`.

    Raises:
        MarlinError: as `error`: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(f"{path}: cannot read: {problem.strerror}") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not valid JSON: {problem}") from None


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of the bytes of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def safetensors_header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Tensors (name -> dtype, shape) and metadata of a safetensors file, checked by the `safetensors` library.

    Raises:
        CheckpointError: the file is missing, cut short, or its header is damaged or hostile.
    """
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, expected a safetensors file")
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {}
            for name in file.keys():  # noqa: SIM118 (a method of the library, not a mapping)
                view = file.get_slice(name)
                tensors[name] = {"dtype": view.get_dtype(), "shape": list(view.get_shape())}
            return tensors, dict(file.metadata() or {})
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror or error}") from None
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged safetensors file: {one_line(error)}; fetch it again") from None


def read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays of a safetensors file (`mlx.core.array`, read when first used) and its metadata.

    Raises:
        CheckpointError: see `safetensors_header`; or a dtype that MLX does not have.
    """
    import mlx.core as mx

    _, metadata = safetensors_header(path)
    try:
        arrays: Any = mx.load(str(path), format="safetensors")
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot load: {one_line(error)}") from None
    return dict(arrays), metadata


def save_arrays(path: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write MLX arrays as safetensors to a temporary path inside `writing` or `writing_folder`.

    Raises:
        OSError: they could not be written; `writing` names the file.
    """
    import mlx.core as mx

    try:
        mx.save_safetensors(str(path), dict(arrays), dict(metadata))
    except RuntimeError as error:
        raise OSError(f"{one_line(error)} (is the disk full?)") from None


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[str, tuple[int, ...]]],
    contents: Iterable[memoryview | bytes],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file tensor by tensor, of any of the format's types: the library's own writers want all at once.

    Args:
        shapes: name -> the format's name of the type (F32, F8_E4M3, ..) and the shape.
        contents: the bytes of each, in that order, contiguous and little-endian.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        end = offset + DTYPE_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for data in contents:
            file.write(data)


def one_line(error: object) -> str:
    """The message of a foreign exception as one line."""
    return " ".join(str(error).split())


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
