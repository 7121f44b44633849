"""One run over a stream of any length: what its bytes and lines cost a model, in bounded memory, from a file or a pipe."""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from marlin_cli.bench.cost_files import CostFile, CostSink
from marlin_cli.bench.line_costs import Line, LineCosts
from marlin_cli.bench.surprise_state import RunState, read_run_state, write_run_state
from marlin_cli.continuing_model import ContinuingModel
from marlin_cli.engine.endless import Window, reach_of
from marlin_cli.engine.fingerprints import arithmetic_of, fingerprint_of
from marlin_cli.engine.stream_scoring import StreamScorer, stream_scorer
from marlin_cli.errors import UsageError
from marlin_cli.version import __version__

# What stays in view unless the caller says otherwise: logs are predicted little better with more, and it costs time.
DEFAULT_WINDOW_BYTES = 2048

# A run that is killed goes on from what it was at most so long before.
CHECKPOINT_SECONDS = 10.0

BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class Surprise:
    """What a stream cost."""

    model: str
    input: str
    bytes: int
    lines: int
    bits_per_byte: float
    seconds: float  # of this run
    bytes_per_second: float  # of this run
    costliest: tuple[Line, ...]


class Source(Protocol):
    """Bytes as they come."""

    name: str

    def read(self, most: int) -> bytes | None:
        """The next bytes, `most` at most: nothing at the end, None where they have to be waited for."""


class FileSource:
    """The bytes of a file, which is closed when the block ends that has it as its context.

    Raises:
        UsageError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise UsageError(f"--surprise {path}: cannot read: {error.strerror}") from None

    def __enter__(self) -> "FileSource":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, most: int) -> bytes | None:
        """See `Source`."""
        try:
            return self._file.read(most)
        except OSError as error:
            raise UsageError(f"--surprise {self.name}: cannot read: {error.strerror}") from None


def default_window(config: Any) -> Window:
    """What is in view where nobody says so; of a network that has no window, its context, read again from its last half on."""
    for size in (min(DEFAULT_WINDOW_BYTES, config.max_bytes), config.max_bytes):
        try:
            reach_of(config, Window(size))
        except UsageError:
            continue
        return Window(size)
    return Window()


def surprise(
    model: ContinuingModel,
    name: str,
    source: Source,
    sink: CostSink,
    top: int,
    *,
    file: CostFile | None = None,
    resume: bool = False,
    on_bytes: Callable[[int], None] = lambda count: None,
    clock: Callable[[], float] = time.monotonic,
) -> Surprise:
    """Score a stream.

    Args:
        model: with a window, see `ContinuingModel.cached`.
        sink: takes the costs where there is no `file`.
        top: how many of the costliest lines are told.
        file: where the costs go, and beside it the state of the run.
        resume: go on where a run of the same model, window and bytes was ended.

    Raises:
        MarlinError: the stream cannot be read, the output not written, or what is there is of another run.
    """
    run = _Run(stream_scorer(model.network, model.cache_bits), LineCosts(top), on_bytes)
    started, before = clock(), 0
    if file is None:
        run.read(source, sink, lambda: None, clock)
    else:
        facts = _facts_of(model)
        state = read_run_state(file.state, facts) if resume and file.state.exists() else None
        if state is not None:
            before = state.seen
            run.take_up(file, state, source)
        with file.writing(None if state is None else state.written) as costs:

            def save() -> None:
                write_run_state(file.state, run.state(costs.sync()), facts)

            try:
                run.read(source, costs, save, clock)
            except BaseException:
                if run.is_whole:
                    save()
                raise
    seconds = clock() - started
    seen, lines = run.scorer.seen, run.lines
    return Surprise(
        name, source.name, seen, lines.lines, lines.bits / max(1, seen), seconds, (seen - before) / max(seconds, 1e-9),
        tuple(lines.costliest),
    )  # fmt: skip


class _Run:
    """A stream while it is scored.

    Attributes:
        is_whole: do the scorer, the lines and the digest stand at the same place?
    """

    def __init__(self, scorer: StreamScorer, lines: LineCosts, on_bytes: Callable[[int], None]) -> None:
        self.scorer, self.lines, self._on_bytes = scorer, lines, on_bytes
        self.is_whole = True
        self._digest = hashlib.sha256()

    def read(self, source: Source, sink: CostSink, save: Callable[[], None], clock: Callable[[], float]) -> None:
        """Score all that is left of a source, and `save` now and then."""
        saved = clock()
        for portion in _portions(source, self.scorer):
            self.is_whole = False
            bits = self.scorer.score(portion)
            self._digest.update(portion)
            sink.add(bits, self.lines.push(portion, bits))
            self.is_whole = True
            sink.flush()
            self._on_bytes(len(portion))
            if clock() - saved >= CHECKPOINT_SECONDS:
                save()
                saved = clock()
        self.is_whole = False  # a line that the stream ends in has not ended where more bytes follow
        sink.add(np.zeros(0, dtype=np.float32), self.lines.finish())
        sink.flush()

    def state(self, written: int) -> RunState:
        """Where the run stands, of whose output so many bytes are written."""
        return RunState(self.scorer.seen, self._digest.hexdigest(), written, self.scorer.memory(), self.lines.memory())

    def take_up(self, file: CostFile, state: RunState, source: Source) -> None:
        """Go on from a state, behind the bytes of the source that were scored before.

        Raises:
            UsageError: the state is damaged, or the source begins with other bytes.
        """
        try:
            self.scorer.remember(state.scorer)
            self.lines.remember(dict(state.lines))
            if self.scorer.seen != state.seen or file.unfinished.stat().st_size < state.written:
                raise ValueError("its output is shorter than it says")
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UsageError(f"--resume: {file.state}: is damaged: {error}; delete it to begin again") from None
        left = state.seen
        while left and (part := source.read(min(BLOCK_BYTES, left))) != b"":
            self._digest.update(part or b"")
            left -= len(part or b"")
        if left or self._digest.hexdigest() != state.digest:
            raise UsageError(
                f"--resume: {source.name}: does not begin with the {state.seen:,} bytes that were scored;"
                " leave --resume out to begin again"
            )
        self._on_bytes(state.seen)


def _portions(source: Source, scorer: StreamScorer) -> Iterator[bytes]:
    """What is scored at once: as much as the scorer likes best, and less before bytes that have to be waited for."""
    waiting = bytearray()
    while True:
        part = source.read(scorer.portion - len(waiting))
        if part:
            waiting += part
            if len(waiting) < scorer.portion:
                continue
        if waiting:
            yield bytes(waiting)
            waiting.clear()
        if part is not None and not part:
            return


def _facts_of(model: ContinuingModel) -> dict[str, str]:
    """What decides the numbers of a run."""
    return {
        "version": __version__,
        "model": fingerprint_of(model.network),
        "cache": repr(model.cache_bits),
        "arithmetic": arithmetic_of(by_kernels=model.device.name == "cpu"),
    }
