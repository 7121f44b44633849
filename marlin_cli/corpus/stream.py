"""Sources mixed by weight into one stream of windows, on Hugging Face `datasets` in streaming mode."""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cli.corpus.readers import SHORTEST_WINDOW_BYTES, is_raw, size_of_windows, windows_of_source
from marlin_cli.corpus.recipes import MOST_BYTES, MOST_WINDOW_BYTES, Recipe, find_recipe, load_recipe
from marlin_cli.corpus.sources import Source, parse_source
from marlin_cli.errors import CorpusError
from marlin_cli.text import quoted

DEFAULT_SEQUENCE_BYTES = 16384

# The library goes on drawing sources that are exhausted: what is left of a far lighter one would take for ever.
LARGEST_WEIGHT_RATIO = 1000.0


@dataclass(frozen=True)
class Window:
    """At most `sequence_bytes` consecutive bytes of one file, row or pipe; `index` counts from 0."""

    domain: str
    bytes: npt.NDArray[np.uint8]
    index: int


class Corpus:
    """Windows of the sources, drawn by weight until all are exhausted or `max_bytes` is reached.

    The same arguments and files give the same windows, each of them once: when a source is exhausted the others go
    on. A corpus is read once; a second loop goes on where the first one stopped. `state` after a window and `resume`
    of another object go on with the next window.

    Peak memory, beside the libraries: three windows and a reader's buffers (below 1 MB; for tables the longest row, of
    JSON 16 MiB at most, for Parquet a page of 128 MiB at most and a few rows; an .xz may ask for 96 MiB) for each
    source, and the names of all files. The size of a file does not matter: 1 MiB and 6 GiB of raw bytes were read with
    the same peak.
    """

    def __init__(self, sources: Sequence[Source], *, sequence_bytes: int, seed: int, max_bytes: int | None) -> None:
        """Raises `CorpusError` for sizes below 1 or beyond all bounds, no sources, stdin twice, or files that are gone."""
        sizes = (("sequence_bytes", sequence_bytes, MOST_WINDOW_BYTES), ("max_bytes", max_bytes, MOST_BYTES))
        for name, value, most in sizes:
            if value is not None and not 1 <= value <= most:
                raise CorpusError(f"{name} of a corpus must be at least 1 and at most {most}, found {quoted(value)}")
        if not sources:
            raise CorpusError("no corpus is named")
        if sum(source.stdin for source in sources) > 1:
            raise CorpusError("stdin can be read once; name - a single time")
        weights = [source.weight for source in sources]
        if max(weights) > LARGEST_WEIGHT_RATIO * min(weights):
            raise CorpusError(
                f"the weights of a corpus must be within {LARGEST_WEIGHT_RATIO:.0f} times of each other,"
                f" found {min(weights):g} and {max(weights):g}"
            )
        self.sources = tuple(sources)
        self.sequence_bytes, self.seed, self.max_bytes = sequence_bytes, seed, max_bytes
        self._sizes = [[_size(file) for file in source.files] for source in sources]
        self._place = _Place()
        self._stream: Any = _mixed(self.sources, sequence_bytes, seed)
        self._windows = _read(self._stream, self._place, sequence_bytes, max_bytes, _named(self.sources))

    @property
    def domains(self) -> list[str]:
        """The domains, each once, in the order of the sources."""
        return list(dict.fromkeys(source.domain for source in self.sources))

    @property
    def resumable(self) -> bool:
        """Can the stream be read again, and so go on elsewhere? A pipe cannot."""
        return not any(source.stdin for source in self.sources)

    @property
    def total_bytes(self) -> int | None:
        """How many bytes the windows hold; `max_bytes` or None where compressed files, tables or pipes hide it."""
        total = 0
        for source, sizes in zip(self.sources, self._sizes, strict=True):
            if not source.files or not all(is_raw(file, source) for file in source.files):
                return self.max_bytes
            total += sum(size_of_windows(size, self.sequence_bytes) for size in sizes)
        return total if self.max_bytes is None else min(total, self.max_bytes)

    def __iter__(self) -> Iterator[Window]:
        return self._windows

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON takes it.

        Raises:
            CorpusError: stdin is one of the sources; a pipe cannot be read again.
        """
        self._check_resumable()
        return {
            "corpus": self.fingerprint(),
            "windows": self._place.windows,
            "bytes": self._place.bytes,
            "stream": self._stream.state_dict(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on after the window at which `state` was taken. What came before is read again, but not given.

        Raises:
            CorpusError: not a state of this corpus with these settings; or stdin is one of the sources.
        """
        self._check_resumable()
        if not isinstance(state, dict) or not {"corpus", "windows", "bytes", "stream"} <= state.keys():
            raise CorpusError("the saved place in the corpus is damaged; start again")
        if state["corpus"] != self.fingerprint():
            raise CorpusError("the saved place is of another corpus or other settings; name the same ones")
        counts = state["windows"], state["bytes"]
        if not (all(type(each) is int and each >= 0 for each in counts) and _alike(state["stream"], self._stream.state_dict())):
            raise CorpusError("the saved place in the corpus is damaged; start again")
        self._place = _Place(*counts)
        self._stream.load_state_dict(state["stream"])
        self._windows = _read(self._stream, self._place, self.sequence_bytes, self.max_bytes, _named(self.sources))

    def fingerprint(self) -> str:
        """SHA-256 over what decides which windows come: domains, weights, names and sizes of files, and the settings.

        A folder may be moved; the contents of files are not looked at.
        """
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        facts = []
        for source, sizes in zip(self.sources, self._sizes, strict=True):
            root = os.path.commonpath([file.parent for file in source.files]) if source.files else ""
            names = [os.path.relpath(file, root) for file in source.files]
            kind = "stdin" if source.stdin else source.hub
            facts.append([source.domain, source.weight, kind, list(zip(names, sizes, strict=True))])
        text = json.dumps([facts, self.sequence_bytes, self.seed, self.max_bytes])
        return hashlib.sha256(text.encode()).hexdigest()

    def _check_resumable(self) -> None:
        if not self.resumable:
            raise CorpusError("stdin cannot be resumed; write it to a file first")


@dataclass
class _Place:
    """How far a stream has come."""

    windows: int = 0
    bytes: int = 0


def _named(sources: Sequence[Source]) -> str:
    """The corpus, as errors name it: by its first file."""
    names = [str(each) for source in sources for each in source.files or (source.hub or "stdin",)]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1:,} more"


def _read(stream: Any, place: _Place, sequence_bytes: int, max_bytes: int | None, where: str) -> Iterator[Window]:
    """The windows from `place` on, which goes with them.

    It holds no corpus that holds it: one that is left early closes its files at once. Else that were left to the garbage
    collector, which may run in a thread of the library's that the closing waits for.
    """
    items = iter(stream)
    while max_bytes is None or place.bytes < max_bytes:
        item = next(items, None)
        if item is None:
            break
        data = item["bytes"]
        if max_bytes is not None:
            data = data[: max_bytes - place.bytes]
        window = Window(item["domain"], np.frombuffer(data, dtype=np.uint8), place.windows)
        place.windows += 1
        place.bytes += len(data)
        yield window
    if place.windows == 0:
        shortest = min(SHORTEST_WINDOW_BYTES, sequence_bytes)
        raise CorpusError(f"{where}: the corpus holds no window of bytes: no file or row has {shortest} or more")


def open_corpus(
    names: Sequence[str], *, sequence_bytes: int | None = None, seed: int = 0, max_bytes: int | None = None
) -> Corpus:
    """The corpus that `names` (see `parse_source`) stand for.

    A size that is None is the one of the recipe, where that is the only name; else 16384 bytes a window, and all bytes.

    Raises:
        CorpusError: a name that stands for nothing, or no bytes.
        ConfigError: a recipe with a wrong key or value.
    """
    if isinstance(names, str):
        raise TypeError("open_corpus takes a list of names")
    sources = [source for name in names for source in parse_source(name)]
    recipe = _only_recipe(names)
    return Corpus(
        sources,
        sequence_bytes=default_sequence_bytes(names) if sequence_bytes is None else sequence_bytes,
        seed=seed,
        max_bytes=recipe.max_bytes if recipe is not None and max_bytes is None else max_bytes,
    )


def default_sequence_bytes(names: Sequence[str]) -> int:
    """Bytes of a window where the caller of `open_corpus` names none."""
    recipe = _only_recipe(names)
    return DEFAULT_SEQUENCE_BYTES if recipe is None else recipe.seq_bytes


def _only_recipe(names: Sequence[str]) -> Recipe | None:
    return load_recipe(names[0]) if len(names) == 1 and find_recipe(names[0]) is not None else None


def _mixed(sources: Sequence[Source], sequence_bytes: int, seed: int) -> Any:
    """One streaming dataset of all sources."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it announces each retry
    # Without features, interleaving reads windows of each source to guess them: those of stdin would be lost.
    features = datasets.Features({"domain": datasets.Value("string"), "bytes": datasets.Value("binary")})
    info = datasets.DatasetInfo(features=features)
    rng = np.random.default_rng(seed)
    streams = []
    for source in sources:
        # A tuple is one value to the library; a list would be shards.
        order = tuple(str(source.files[index]) for index in rng.permutation(len(source.files)))
        arguments = {"source": source, "files": order, "sequence_bytes": sequence_bytes}
        # Not `from_generator`: that leaves lock files in the library's cache, and fails where it cannot.
        examples = datasets.iterable_dataset.ExamplesIterable(_numbered, arguments)
        streams.append(datasets.IterableDataset(examples, info=info))
    if len(streams) == 1:
        return streams[0]
    weights = np.array([source.weight for source in sources]) / max(source.weight for source in sources)
    return datasets.interleave_datasets(
        streams,
        probabilities=list(weights / weights.sum()),
        seed=seed,
        stopping_strategy="all_exhausted_without_replacement",
    )


def _numbered(**arguments: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    yield from enumerate(windows_of_source(**arguments))


def _alike(saved: Any, fresh: Any) -> bool:
    """Have two states of one stream the same parts? What has not begun is None."""
    if isinstance(saved, dict) and isinstance(fresh, dict):
        return saved.keys() == fresh.keys() and all(_alike(saved[key], fresh[key]) for key in fresh)
    if isinstance(saved, list) and isinstance(fresh, list):
        return len(saved) == len(fresh) and all(map(_alike, saved, fresh))
    if isinstance(saved, int) and isinstance(fresh, int):
        return saved >= 0
    return type(saved) is type(fresh) or fresh is None


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise CorpusError(f"{file}: cannot read: {error.strerror}") from None
