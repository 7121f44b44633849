"""Sums of x^T x over the inputs of linear layers: kept in memory, or in files past a limit. Knows no network."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from marlin_cli.errors import StatisticsError
from marlin_cli.text import quoted

# (path of the layer in whose name an input is measured, domain) -> [channels, channels], float32.
HessianMapping = Mapping[tuple[str, str], npt.NDArray[np.float32]]

# Sums beyond this are kept in files that the system maps into memory.
MEMORY_LIMIT_BYTES = 2 << 30


class SummedHessians(HessianMapping):
    """Two mappings added up, a matrix at a time as it is asked for, so that neither has to fit into memory."""

    def __init__(self, a: HessianMapping, b: HessianMapping) -> None:
        self._a, self._b = a, b

    def __getitem__(self, key: tuple[str, str]) -> npt.NDArray[np.float32]:
        if key in self._a and key in self._b:
            return self._a[key] + self._b[key]
        return self._a[key] if key in self._a else self._b[key]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(sorted({*self._a, *self._b}))

    def __len__(self) -> int:
        return len({*self._a, *self._b})


class HessianAccumulator:
    """The sums of a run, added to in place.

    Args:
        channels: path -> channels of its input, for every input that is measured.
        folder: where files go when the sums of all of `domains` domains pass `limit_bytes`.
    """

    def __init__(self, channels: Mapping[str, int], domains: int, folder: Path, limit_bytes: int = MEMORY_LIMIT_BYTES) -> None:
        self.channels = dict(channels)
        self.total_bytes = hessian_bytes(channels, domains)
        self.consistent = True  # False between `begin` and `commit`: a window may be half added
        self._sums: dict[tuple[str, str], npt.NDArray[np.float32]] = {}
        self._folder = None
        if self.total_bytes > limit_bytes:
            self._folder = tempfile.TemporaryDirectory(prefix=".hessians-", dir=folder)

    @property
    def spilled(self) -> bool:
        """Are the sums in files?"""
        return self._folder is not None

    @property
    def sums(self) -> HessianMapping:
        """What was added so far; the arrays go on changing."""
        return self._sums

    def begin(self) -> None:
        """A window starts."""
        self.consistent = False

    def commit(self) -> None:
        """The window is wholly added."""
        self.consistent = True

    def restore(self, sums: HessianMapping) -> None:
        """Go on from sums that were saved.

        Raises:
            StatisticsError: they are of other inputs.
        """
        for path, domain in sums:
            saved = sums[path, domain]
            if len(saved) != self.channels.get(path):
                raise StatisticsError(f"the Hessians of {quoted(path)} are of another shape; the file is damaged")
            np.copyto(self._array(path, domain), saved)

    def add(self, path: str, domain: str, rows: npt.NDArray[np.float32]) -> None:
        """Add rows [n, channels]."""
        if path in self.channels:
            self._array(path, domain)[...] += rows.T @ rows

    def close(self) -> None:
        """Remove the files, if there are any."""
        self._sums = {}
        if self._folder is not None:
            self._folder.cleanup()

    def _array(self, path: str, domain: str) -> npt.NDArray[np.float32]:
        found = self._sums.get((path, domain))
        if found is None:
            shape = (self.channels[path],) * 2
            if self._folder is None:
                found = np.zeros(shape, np.float32)
            else:
                name = Path(self._folder.name) / f"{len(self._sums)}.f32"
                found = np.memmap(name, np.float32, "w+", shape=shape)
            self._sums[path, domain] = found
        return found


def hessian_bytes(channels: Mapping[str, int], domains: int) -> int:
    """Bytes of the sums of these inputs."""
    return 4 * domains * sum(count * count for count in channels.values())
