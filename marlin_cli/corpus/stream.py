"""Sources mixed by weight into one stream of windows, on Hugging Face `datasets` in streaming mode."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from logging import CRITICAL
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cli.corpus.readers import (
    is_table,
    rows_of_hub,
    rows_of_table,
    windows_of_files,
    windows_of_rows,
    windows_of_stdin,
)
from marlin_cli.corpus.sources import Source, parse_source
from marlin_cli.errors import CorpusError


@dataclass(frozen=True)
class Window:
    """At most `sequence_bytes` consecutive bytes of one domain; `index` counts from 0."""

    domain: str
    bytes: npt.NDArray[np.uint8]
    index: int


class Corpus:
    """Windows of the sources, drawn by weight until all are exhausted or `max_bytes` is reached.

    The same arguments and files give the same windows. Each window is given once. `state` after a window and
    `resume` on a new object go on with the next one.

    Peak memory is a window and its reader's block for each source, beside the libraries: it does not depend on the
    size of a file.
    """

    def __init__(self, sources: Sequence[Source], *, sequence_bytes: int, seed: int, max_bytes: int | None) -> None:
        if sequence_bytes < 1:
            raise CorpusError(f"a window must have at least 1 byte, found {sequence_bytes}")
        if not sources:
            raise CorpusError("no corpus is named")
        if sum(source.stdin for source in sources) > 1:
            raise CorpusError("stdin can be read once; name `-` a single time")
        self.sources = tuple(sources)
        self.sequence_bytes, self.seed, self.max_bytes = sequence_bytes, seed, max_bytes
        self._windows = 0
        self._bytes = 0
        self._stream: Any = _mixed(self.sources, sequence_bytes, seed)

    @property
    def domains(self) -> list[str]:
        """The domains, each once, in the order of the sources."""
        return list(dict.fromkeys(source.domain for source in self.sources))

    @property
    def total_bytes(self) -> int | None:
        """How much there is, as far as files tell, and at most `max_bytes`; None where nothing tells."""
        known = [_size(source) for source in self.sources]
        if any(size is None for size in known):
            return self.max_bytes
        total = sum(size or 0 for size in known)
        return total if self.max_bytes is None else min(total, self.max_bytes)

    def __iter__(self) -> Iterator[Window]:
        for item in self._stream:
            data = item["bytes"]
            if self.max_bytes is not None:
                data = data[: self.max_bytes - self._bytes]
            if not data:
                return
            window = Window(item["domain"], np.frombuffer(data, dtype=np.uint8), self._windows)
            self._windows += 1
            self._bytes += len(data)
            yield window
        if self._windows == 0:
            raise CorpusError("the corpus holds no window of bytes; is it empty?")

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON takes it.

        Raises:
            CorpusError: stdin is one of the sources; a pipe cannot be read again.
        """
        if any(source.stdin for source in self.sources):
            raise CorpusError("stdin cannot be resumed; write it to a file first")
        return {"windows": self._windows, "bytes": self._bytes, "stream": self._stream.state_dict()}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on after the window at which `state` was taken.

        Raises:
            CorpusError: not a state of a corpus like this one.
        """
        try:
            self._windows, self._bytes = int(state["windows"]), int(state["bytes"])
            self._stream.load_state_dict(state["stream"])
        except (KeyError, TypeError, ValueError) as error:
            raise CorpusError(f"the corpus cannot go on from its saved state: {error}") from None

    def fingerprint(self) -> str:
        """SHA-256 over everything that decides which windows come: names, sizes, weights, seed, window size."""
        facts = [
            [source.domain, source.weight, source.hub, [[file.name, file.stat().st_size] for file in source.files]]
            for source in self.sources
        ]
        text = json.dumps([facts, self.sequence_bytes, self.seed, self.max_bytes])
        return hashlib.sha256(text.encode()).hexdigest()


def open_corpus(names: Sequence[str], *, sequence_bytes: int = 16384, seed: int = 0, max_bytes: int | None = None) -> Corpus:
    """The corpus that `names` (see `parse_source`) stand for.

    Raises:
        CorpusError: a name that stands for nothing, or no bytes.
    """
    sources = [source for name in names for source in parse_source(name)]
    return Corpus(sources, sequence_bytes=sequence_bytes, seed=seed, max_bytes=max_bytes)


def _mixed(sources: Sequence[Source], sequence_bytes: int, seed: int) -> Any:
    """One streaming dataset of all sources."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(CRITICAL)
    rng = np.random.default_rng(seed)
    streams, weights = [], []
    for source in sources:
        parts = _streams_of(source, sequence_bytes, rng)
        streams += parts
        weights += [source.weight / len(parts)] * len(parts)
    if len(streams) == 1:
        return streams[0]
    total = sum(weights)
    return datasets.interleave_datasets(
        streams,
        probabilities=[weight / total for weight in weights],
        seed=seed,
        stopping_strategy="all_exhausted_without_replacement",
    )


def _streams_of(source: Source, sequence_bytes: int, rng: np.random.Generator) -> list[Any]:
    """The streaming datasets of one source: raw files in a drawn order, and each table."""
    import datasets

    made = datasets.IterableDataset.from_generator
    if source.stdin:
        return [made(windows_of_stdin, gen_kwargs={"domain": source.domain, "sequence_bytes": sequence_bytes})]
    if source.hub is not None:
        common = {"domain": source.domain, "sequence_bytes": sequence_bytes, "where": f"hf:{source.hub}"}
        return [made(windows_of_rows, gen_kwargs={"rows": rows_of_hub(source), **common})]
    plain = [str(file) for file in source.files if not is_table(file)]
    streams = []
    if plain:
        arguments = {
            "domain": source.domain,
            "keeps_compressed": source.keeps_compressed,
            "sequence_bytes": sequence_bytes,
        }
        # The library takes a list for shards to be spread over; a tuple is one value.
        order = [plain[index] for index in rng.permutation(len(plain))]
        streams.append(made(_windows_of_tuple, gen_kwargs={"files": tuple(order), **arguments}))
    for file in source.files:
        if is_table(file):
            common = {"domain": source.domain, "sequence_bytes": sequence_bytes, "where": str(file)}
            streams.append(made(_windows_of_table, gen_kwargs={"path": str(file), **common}))
    return streams


def _windows_of_tuple(files: tuple[str, ...], **arguments: Any) -> Iterator[dict[str, Any]]:
    yield from windows_of_files(list(files), **arguments)


def _windows_of_table(path: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    yield from windows_of_rows(rows_of_table(path), **arguments)


def _size(source: Source) -> int | None:
    if source.hub is not None or source.stdin or any(is_table(file) for file in source.files):
        return None
    return sum(file.stat().st_size for file in source.files)
