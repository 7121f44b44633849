"""Arrays of `marlin encode` as .npy or .safetensors, row by row: more than memory holds, and whole or not there."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from marlin_cli.errors import UsageError
from marlin_cli.tensor_files import write_safetensors
from marlin_cli.writing import writing

Floats = npt.NDArray[np.float32]

# The name in a safetensors file of vectors that stand below each other; states have the numbers of their texts.
VECTORS = "vectors"

SUFFIXES = (".npy", ".safetensors")

# Arrays with names of their own: the format's own library refuses longer headers.
MOST_ARRAYS = 1_000_000

# Copied at once.
BLOCK_BYTES = 1 << 20


def check_suffix(path: Path) -> None:
    """Raise `UsageError` for a file of another format."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--output {path}: arrays are written as {' or '.join(SUFFIXES)}; name one of these")


class VectorFile:
    """A file in the making: `add` the array of each text in turn."""

    def __init__(self, path: Path, temporary: Path, spool: IO[bytes], stacked: bool) -> None:
        self._path, self._temporary, self._spool, self._stacked = path, temporary, spool, stacked
        self._shapes: list[tuple[int, ...]] = []

    def add(self, array: Floats) -> None:
        """Take a text's vector [dim], or its states [positions, dim].

        Raises:
            UsageError: states of a second text for .npy, which holds one array, or of more than a file has names for.
        """
        if self._path.suffix == ".npy" and self._shapes and not self._stacked:
            raise UsageError(
                f"{self._path}: .npy holds the states of one text, and there are more; write .safetensors, or pool them"
            )
        if not self._stacked and len(self._shapes) == MOST_ARRAYS:
            raise UsageError(
                f"{self._path}: holds the states of {MOST_ARRAYS:,} texts, and there are more; cut them into files"
            )
        self._shapes.append(array.shape)
        self._spool.write(np.ascontiguousarray(array, dtype="<f4").data)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write what was added; `metadata` stands in a safetensors file.

        Raises:
            UsageError: there was no text.
        """
        if not self._shapes:
            raise UsageError(f"{self._path}: there is no text to encode, and so nothing to write")
        shapes = {str(index): shape for index, shape in enumerate(self._shapes)}
        if self._stacked:
            shapes = {VECTORS: (len(self._shapes), *self._shapes[0])}
        if self._path.suffix == ".safetensors":
            self._spool.seek(0)
            typed = {name: ("F32", shape) for name, shape in shapes.items()}
            write_safetensors(self._temporary, typed, self._blocks(), metadata)
            return
        with self._temporary.open("wb") as file:
            header: dict[str, Any] = {"descr": "<f4", "fortran_order": False, "shape": next(iter(shapes.values()))}
            np.lib.format.write_array_header_1_0(file, header)
            self._spool.seek(0)
            for block in self._blocks():
                file.write(block)

    def _blocks(self) -> Iterator[bytes]:
        while block := self._spool.read(BLOCK_BYTES):
            yield block


@contextlib.contextmanager
def writing_vectors(path: Path, *, stacked: bool) -> Iterator[VectorFile]:
    """A `VectorFile` for `path`, to finish within the block; it is there when the block ends well.

    The header of either format says what comes, so the numbers wait in a file without a name beside it.

    Args:
        stacked: vectors, which stand below each other in one array.

    Raises:
        OutputError: see `writing.writing`.
    """
    with writing(path) as temporary, tempfile.TemporaryFile(dir=temporary.parent) as spool:
        yield VectorFile(path, temporary, spool, stacked)
