"""Where the costs of a stream go while it is scored: a line of JSON for each line, or a float32 for each byte.

A file grows under another name, beside which the state of the run stands, and has its own name when the stream has ended: so it
is whole or not there, and a run that was ended goes on where it was.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import numpy.typing as npt

from marlin_cli.bench.line_costs import Line
from marlin_cli.errors import OutputError, UsageError
from marlin_cli.writing import check_output_file, claimed

UNFINISHED, STATE = ".unfinished", ".unfinished.state"

# numpy's own header, filled up so that any number of bytes fits it: it is written anew with each checkpoint.
NPY_HEADER_BYTES = 128


class CostSink(Protocol):
    """Takes what bytes cost."""

    def add(self, bits: npt.NDArray[np.float32], ended: Sequence[Line]) -> None:
        """Take the costs of the next bytes, and the lines that end with them."""

    def flush(self) -> None:
        """Hand on what was taken."""


class NoFile:
    """A `CostSink` that keeps nothing."""

    def add(self, bits: npt.NDArray[np.float32], ended: Sequence[Line]) -> None:
        pass

    def flush(self) -> None:
        pass


class LinesTo:
    """A `CostSink` that writes lines of JSON to an open stream."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def add(self, bits: npt.NDArray[np.float32], ended: Sequence[Line]) -> None:
        for line in ended:
            self._stream.write(json.dumps(line.as_mapping()).encode("ascii") + b"\n")

    def flush(self) -> None:
        self._stream.flush()


class _BytesTo:
    """A `CostSink` that writes a .npy of float32, whose header says how many stand in it at the last flush."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def add(self, bits: npt.NDArray[np.float32], ended: Sequence[Line]) -> None:
        self._stream.write(bits.astype("<f4").tobytes())

    def flush(self) -> None:
        end = self._stream.seek(0, os.SEEK_END)
        self._stream.seek(0)
        self._stream.write(npy_header((end - NPY_HEADER_BYTES) // 4))
        self._stream.seek(end)
        self._stream.flush()


def npy_header(count: int) -> bytes:
    """The first bytes of a .npy (format 1.0) of so many float32."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({count},), }}".ljust(NPY_HEADER_BYTES - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("ascii")


class CostFile:
    """The output of a run over a stream.

    Raises:
        OutputError: it cannot be written.
        UsageError: a name that tells no form.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix not in (".jsonl", ".npy"):
            raise UsageError(f"--output {path}: name it .jsonl for a line of JSON a line, or .npy for a float32 a byte")
        check_output_file(path)
        if path.exists() and not path.is_file():
            raise UsageError(f"--output {path}: is no file, and costs are written to one as they come; leave it out for stdout")
        self.path = path
        self.unfinished, self.state = (path.with_name(path.name + end) for end in (UNFINISHED, STATE))

    @contextlib.contextmanager
    def writing(self, length: int | None) -> Iterator["OpenCosts"]:
        """The file, open: from its beginning (None), or after the first `length` bytes of what a run before has left.

        When the block ends well it has its name, and the state is gone. When it does not, and there is no state from which
        another run could go on, nothing is left.

        Raises:
            OutputError: it cannot be written, or another run writes it.
        """
        with claimed(self.path):
            try:
                if length is None:
                    self.state.unlink(missing_ok=True)  # it tells of what is overwritten now
                with self.unfinished.open("r+b" if length is not None else "w+b") as stream:
                    if length is not None:
                        stream.truncate(length)
                    elif self.path.suffix == ".npy":
                        stream.write(npy_header(0))
                    stream.seek(0, os.SEEK_END)
                    costs = OpenCosts(stream, _BytesTo(stream) if self.path.suffix == ".npy" else LinesTo(stream))
                    yield costs
                    costs.sync()
                self.unfinished.replace(self.path)
                self.state.unlink(missing_ok=True)
            except OSError as error:
                raise OutputError(f"{self.path}: cannot write: {error.strerror or error}") from None
            finally:
                if not self.state.exists():
                    self.unfinished.unlink(missing_ok=True)


class OpenCosts:
    """A `CostSink` into a file."""

    def __init__(self, stream: IO[bytes], sink: CostSink) -> None:
        self._stream, self._sink = stream, sink

    def add(self, bits: npt.NDArray[np.float32], ended: Sequence[Line]) -> None:
        self._sink.add(bits, ended)

    def flush(self) -> None:
        self._sink.flush()

    def sync(self) -> int:
        """See that all is on disk: bytes of the file."""
        self.flush()
        os.fsync(self._stream.fileno())
        return self._stream.tell()
