"""Log-probabilities of a reference model, kept in the user's cache: comparing another model with it then costs one pass.

They are kept as float32, as they were computed, so that nothing changes in what is computed from them. (In float16 a
log-probability of -8 bits is good to 0.004, which is more than the divergence of 8-bit weights.) That takes 1 KiB for each byte
scored.
"""

import contextlib
import hashlib
import io
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.errors import OutputError
from marlin_cli.writing import writing

DEFAULT_LIMIT_BYTES = 2 << 30
HEADER_BYTES, DIGEST_BYTES = 128, 32


class ReferenceCache:
    """A file for each pass, named by the model, what computed it and the very bytes that were scored.

    What was not used for longest is removed for what is new; but never what this run used, so that a run which needs
    more than the limit finds the same part of it the next time. A file ends with the SHA-256 of all before; one that is
    damaged, by whatever, is never used but computed again.
    """

    def __init__(self, folder: Path, model: str, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        """
        Args:
            folder: made when first needed.
            model: whatever decides the numbers: fingerprint of the model, device, versions.
            limit_bytes: that all files in the folder may take together.
        """
        self._folder, self._model, self._limit_bytes = folder, model, limit_bytes
        self._since = time.time()
        self.hits = self.misses = 0  # passes that were there, and that were not

    def __call__(self, data: npt.NDArray[np.uint8], compute: Callable[[], mx.array]) -> mx.array:
        """Log-probabilities [n, length, vocab] of bytes [n, length]: those of the file, or computed and kept."""
        digest = hashlib.sha256(f"{self._model} {data.shape} ".encode() + data.tobytes()).hexdigest()
        path = self._folder / f"{digest}.npy"
        found = _read(path, data.shape)
        if found is not None:
            self.hits += 1
            with contextlib.suppress(OSError):
                os.utime(path)
            return mx.array(found)
        self.misses += 1
        computed = compute()
        self._keep(path, np.array(computed))
        return computed

    def _keep(self, path: Path, values: npt.NDArray[np.float32]) -> None:
        # A cache that cannot be written costs time and nothing else.
        with contextlib.suppress(OSError, OutputError):
            self._folder.mkdir(0o700, parents=True, exist_ok=True)
            if self._make_room(values.nbytes + HEADER_BYTES + DIGEST_BYTES):
                buffer = io.BytesIO()
                np.save(buffer, values)
                data = buffer.getvalue()
                if not path.is_file():  # a pipe would be written into
                    path.unlink(missing_ok=True)
                with writing(path) as temporary:
                    temporary.write_bytes(data + hashlib.sha256(data).digest())

    def _make_room(self, size: int) -> bool:
        """Is there room for so many bytes, if need be where older files were?"""
        entries = sorted(_entries(self._folder))
        excess = sum(length for _, length, _ in entries) + size - self._limit_bytes
        old = [entry for entry in entries if entry[0] < self._since]
        if excess > sum(length for _, length, _ in old):
            return False
        for _, length, path in old:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= length
        return True


def _entries(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """When each file was last used, its size and its path; those that vanish meanwhile are left out."""
    for path in folder.glob("*.npy"):
        with contextlib.suppress(OSError):
            status = path.stat()
            yield status.st_mtime, status.st_size, path


def _read(path: Path, shape: tuple[int, ...]) -> npt.NDArray[np.float32] | None:
    try:
        # A pipe is not waited for; whatever else than a file stands there fails below.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            size = os.fstat(file.fileno()).st_size - HEADER_BYTES - DIGEST_BYTES
            if size <= 0 or size % (4 * math.prod(shape)):
                return None
            data = memoryview(file.read())
        if hashlib.sha256(data[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:
            return None
        values: npt.NDArray[np.float32] = np.load(io.BytesIO(data[:-DIGEST_BYTES]), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    whole = values.ndim == 3 and values.shape[:2] == shape and values.dtype == np.float32
    return values if whole else None
