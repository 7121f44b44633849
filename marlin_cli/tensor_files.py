"""Safetensors files: read with every number of their header checked, written tensor by tensor."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from marlin_cli.errors import CheckpointError
from marlin_cli.files import check_regular, check_utf8_name, kind_of_file
from marlin_cli.text import one_line, quoted

# Types that the format has and MLX has not; float8 of other kinds than E4M3 and E8M0 among them.
MLX_LACKS = ("F64", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4")

# What the library says of a type that is newer than itself, or none.
UNKNOWN_TYPE = "unknown variant"

# Characters of what a library says of a file.
MOST_SAID = 200

# Some 100 bytes a tensor.
MOST_HEADER_BYTES = 4 << 20

# Bytes of a number, by the type's name in safetensors: those that are written here.
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "U32": 4, "U8": 1}


def safetensors_header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Tensors (name -> dtype, shape) and metadata of a safetensors file, checked by the `safetensors` library.

    Raises:
        CheckpointError: the file is missing, cut short, or its header is damaged or hostile.
    """
    from safetensors import SafetensorError, safe_open

    check_regular(path, CheckpointError)
    _check_header_size(path)
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
        said = one_line(error)[:MOST_SAID]  # names out of the file stand in it
        if UNKNOWN_TYPE in said:
            raise CheckpointError(f"{path}: a tensor is of a type that safetensors here does not know: {said}") from None
        kind = _kind_of_other(path)
        if kind is not None:
            raise CheckpointError(f"{path}: is {kind}, expected safetensors; fetch or name another file") from None
        raise CheckpointError(f"{path}: damaged safetensors file: {said}; fetch it again") from None


def _kind_of_other(path: Path) -> str | None:
    """What a file is that is not even a damaged safetensors file, where its first bytes tell."""
    try:
        kind = kind_of_file(path)
    except OSError:
        return None
    return None if kind == "safetensors" else kind


def _check_header_size(path: Path) -> None:
    """The library reads a header of up to 100 MB, which takes seconds and gigabytes."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror or error}") from None
    size, there = int.from_bytes(start, "little"), path.stat().st_size - len(start)
    if MOST_HEADER_BYTES < size <= there:
        raise CheckpointError(f"{path}: its header has {size:,} bytes, more than the {MOST_HEADER_BYTES:,} of any model")


def read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The arrays of a safetensors file (`mlx.core.array`, read when first used) and its metadata.

    Raises:
        CheckpointError: see `safetensors_header`; or a dtype or a name of a file that MLX does not take.
    """
    import mlx.core as mx

    check_utf8_name(path, CheckpointError)
    tensors, metadata = safetensors_header(path)
    for name, entry in tensors.items():
        if entry["dtype"] in MLX_LACKS:
            raise CheckpointError(
                f"{path}: {quoted(name)} is {entry['dtype']}, which MLX does not have; store it as F32 or BF16"
            )
    try:
        arrays: Any = mx.load(str(path), format="safetensors")
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot load: {one_line(error)[:MOST_SAID]}") from None
    return dict(arrays), metadata


def read_tensor_bytes(
    path: Path, names: Sequence[str] | None = None
) -> tuple[dict[str, tuple[str, tuple[int, ...], memoryview]], dict[str, str]]:
    """Tensors of a safetensors file (name -> type, shape, bytes) and its metadata; nothing of MLX, so any thread may ask.

    Args:
        names: of those that are wanted; None: all. Those that the file has not are left out.

    Raises:
        CheckpointError: see `safetensors_header`; or the file became shorter.
    """
    tensors, metadata = safetensors_header(path)
    found = {}
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            places = json.loads(file.read(header_bytes))
            for name in tensors if names is None else [name for name in names if name in tensors]:
                first, end = places[name]["data_offsets"]
                file.seek(8 + header_bytes + first)
                data = file.read(end - first)
                if len(data) < end - first:
                    raise CheckpointError(f"{path}: became shorter while it was read")
                found[name] = (tensors[name]["dtype"], tuple(tensors[name]["shape"]), memoryview(data))
    except (OSError, ValueError, KeyError, TypeError) as error:  # the header is another one than a moment ago
        raise CheckpointError(f"{path}: cannot read: {one_line(error)[:MOST_SAID]}") from None
    return found, metadata


def tensor_places(path: Path) -> dict[str, int]:
    """Where the tensors of a safetensors file begin (name -> byte), checked as `safetensors_header` does.

    Raises:
        CheckpointError: see `safetensors_header`.
    """
    tensors, _ = safetensors_header(path)
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            places = json.loads(file.read(header_bytes))
            return {name: 8 + header_bytes + int(places[name]["data_offsets"][0]) for name in tensors}
    except (OSError, ValueError, KeyError, TypeError) as error:  # the header is another one than a moment ago
        raise CheckpointError(f"{path}: cannot read: {one_line(error)[:MOST_SAID]}") from None


# Of rows that are read to take columns out of them.
BLOCK_BYTES = 1 << 20

# Types of which parts are read, and the words of that size in numpy.
_WORDS = {
    "F32": ("float32", "<u4"), "F16": ("float16", "<u2"), "BF16": ("bfloat16", "<u2"), "U32": ("uint32", "<u4"),
    "U8": ("uint8", "u1"),
}  # fmt: skip


def read_slices(path: Path, cuts: Mapping[str, tuple[slice, ...]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Parts of the arrays of a safetensors file (`mlx.core.array`); of what lies between them one block at a time is in memory.

    Args:
        cuts: name -> what is wanted, by axis. Names that the file has not, of another type than a network's or of another
            shape than `shapes` says, are left out.

    Raises:
        CheckpointError: see `safetensors_header`; or the file became shorter.
    """
    import mlx.core as mx
    import numpy as np

    tensors, _ = safetensors_header(path)
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            places = json.loads(file.read(header_bytes))
            found = {}
            for name, cut in cuts.items():
                entry = tensors.get(name)
                if entry is None or entry["dtype"] not in _WORDS or tuple(entry["shape"]) != shapes[name]:
                    continue
                dtype, words = _WORDS[entry["dtype"]]
                file.seek(8 + header_bytes + places[name]["data_offsets"][0])
                part = _read_slice(file, np.dtype(words), shapes[name], cut)
                found[name] = mx.array(part).view(getattr(mx, dtype))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot read: {one_line(error)[:MOST_SAID]}") from None
    return found


def _read_slice(file: Any, words: Any, shape: tuple[int, ...], cut: tuple[slice, ...]) -> Any:
    """A part of the array that begins where the file stands, a few rows at a time: a map would keep what is not wanted, too."""
    import numpy as np

    rows = range(*cut[0].indices(shape[0]))
    row_words = math.prod(shape[1:])
    file.seek(rows.start * row_words * words.itemsize, 1)
    step = max(1, BLOCK_BYTES // max(1, row_words * words.itemsize))
    parts, inner = [], (slice(None), *cut[1:])
    for start in range(0, len(rows), step):
        count = min(step, len(rows) - start)
        data = file.read(count * row_words * words.itemsize)
        block = np.frombuffer(data, dtype=words).reshape(count, *shape[1:])  # ValueError where the file has become shorter
        parts.append(np.ascontiguousarray(block[inner]))
    return np.concatenate(parts) if parts else np.zeros((0, *shape[1:]), dtype=words)


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


# Of an array of MLX.
TypeAndShape: TypeAlias = tuple[Any, tuple[int, ...]]


def save_rows(
    path: Path,
    shapes: Mapping[str, TypeAndShape],
    blocks: Iterable[Mapping[str, Any]],
    metadata: Mapping[str, str],
) -> None:
    """As `save_arrays`, of arrays that come some rows at a time; of them one block is in memory.

    Args:
        shapes: name -> type of MLX, and shape, whose first axis is cut.
        blocks: rows of arrays by name; those of each follow each other.

    Raises:
        OSError: as `save_arrays`.
    """
    import mlx.core as mx
    import numpy as np

    types = {getattr(mx, dtype): (name, words) for name, (dtype, words) in _WORDS.items()}
    header, starts = _header_of({name: (types[dtype][0], shape) for name, (dtype, shape) in shapes.items()}, metadata)
    with path.open("wb") as file:
        file.write(header)
        for block in blocks:
            for name, rows in block.items():
                words = rows.view(getattr(mx, np.dtype(types[rows.dtype][1]).name))
                data = np.array(words).reshape(-1).data.cast("B")
                file.seek(len(header) + starts[name])
                file.write(data)
                starts[name] += len(data)


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
    header, _ = _header_of(shapes, metadata)
    with path.open("wb") as file:
        file.write(header)
        for data in contents:
            file.write(data)


def _header_of(shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """What a safetensors file begins with, and how far behind it each tensor begins."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts, offset = {}, 0
    for name, (dtype, shape) in shapes.items():
        end = offset + DTYPE_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        starts[name], offset = offset, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts
