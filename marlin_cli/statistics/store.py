"""Statistics as safetensors files: finished ones, and those of a run that can go on. Every write is atomic."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cli.config import from_mapping
from marlin_cli.documents import parse_json
from marlin_cli.errors import ConfigError, StatisticsError
from marlin_cli.statistics.data import KINDS, Moments, Run, Statistics, Totals, check_run
from marlin_cli.statistics.hessians import HessianMapping
from marlin_cli.statistics.possible import check_domains, check_hessian, check_moments
from marlin_cli.statistics.stored_arrays import StoredArrays, open_arrays
from marlin_cli.tensor_files import write_safetensors
from marlin_cli.text import quoted
from marlin_cli.version import __version__
from marlin_cli.writing import writing

FORMAT_VERSION = 1

# The one key of the metadata: safetensors writes several in any order, and equal statistics must be equal files.
METADATA_KEY = "marlin_statistics"

DTYPES = {"count": np.dtype("i8"), "sum_squares": np.dtype("f8"), "absolute_maximum": np.dtype("f4")}

# The same types by safetensors' names.
STORED = {np.dtype("i8"): "I64", np.dtype("f8"): "F64", np.dtype("f4"): "F32"}


@dataclass(frozen=True)
class _Header:
    """The JSON in the metadata; the arrays are named `<kind>.<path>.<field of Moments>`."""

    version: int
    created_by: str
    model: str
    domains: dict[str, int]
    layers: dict[str, str]
    attentions: tuple[str, ...]
    runs: tuple[Run, ...]
    hessians: bool = False  # there are arrays `hessians.<path>.<domain>` too
    corpus_state: dict[str, Any] | None = None  # where an unfinished run goes on


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Write finished statistics. Equal statistics give equal files, byte for byte.

    Raises:
        OutputError: the file cannot be written.
        StatisticsError: they hold numbers that no measurement gives (see `possible`); nothing is written.
    """
    _save(path, statistics, None)


def holds_statistics(path: Path) -> bool:
    """Is this file one that `save_statistics` wrote, by what its header says? An empty one has nothing to lose."""
    try:
        return not path.stat().st_size or METADATA_KEY in open_arrays(path).metadata
    except (StatisticsError, OSError):
        return False


def load_statistics(path: Path) -> Statistics:
    """Read and check finished statistics.

    Raises:
        StatisticsError: damaged, of another version, incomplete or impossible; or of an unfinished run.
    """
    statistics, state = _load(path)
    if state is not None:
        raise StatisticsError(f"{path}: of an unfinished run; finish it with marlin calibrate --resume")
    return statistics


def save_unfinished(path: Path, statistics: Statistics, corpus_state: Mapping[str, Any]) -> None:
    """Write what a run has so far, and the state of its corpus (as JSON takes it).

    Raises:
        OutputError: the file cannot be written.
        StatisticsError: they hold numbers that no measurement gives (see `possible`); nothing is written.
    """
    _save(path, statistics, dict(corpus_state))


def load_unfinished(path: Path) -> tuple[Statistics, dict[str, Any]]:
    """Read what `save_unfinished` wrote.

    Raises:
        StatisticsError: as `load_statistics`; or of a finished run.
    """
    statistics, state = _load(path)
    if state is None:
        raise StatisticsError(f"{path}: of a finished run; there is nothing to go on with")
    return statistics, state


class _StoredHessians(HessianMapping):
    """The Hessians in a file, read and checked one at a time as they are asked for."""

    def __init__(self, file: StoredArrays, channels: Mapping[tuple[str, str], int]) -> None:
        self._file, self._channels = file, dict(channels)

    def __getitem__(self, key: tuple[str, str]) -> npt.NDArray[np.float32]:
        channels = self._channels[key]
        name = _hessian_name(*key)
        place = self._file.places[name]
        if place.dtype != "F32" or place.shape != (channels, channels):
            found = f"{place.dtype} {quoted(list(place.shape))}"
            raise StatisticsError(f"{self._file.path}: {quoted(name)} is {found}, expected F32, {channels} squared")
        array: npt.NDArray[np.float32] = self._file.read(name)
        with _of_file(self._file.path):
            check_hessian(name, array)
        return array

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._channels)

    def __len__(self) -> int:
        return len(self._channels)


@contextlib.contextmanager
def _of_file(path: Path) -> Iterator[None]:
    """What is wrong inside begins with the name of the file."""
    try:
        yield
    except StatisticsError as error:
        raise StatisticsError(f"{path}: {error}") from None


def _hessian_name(path: str, domain: str) -> str:
    return f"hessians.{path}.{domain}"


def _save(path: Path, statistics: Statistics, corpus_state: dict[str, Any] | None) -> None:
    totals = statistics.totals
    header = _Header(
        version=FORMAT_VERSION,
        created_by=f"marlin {__version__}",
        model=statistics.model,
        domains=dict(totals.domains),
        layers=dict(statistics.layers),
        attentions=tuple(totals.keys),
        runs=statistics.runs,
        hessians=bool(statistics.hessians),
        corpus_state=corpus_state,
    )
    arrays = {
        f"{kind}.{name}.{field}": np.ascontiguousarray(getattr(moments, field))
        for kind, name, moments in totals.items()
        for field in DTYPES
    }
    sides = {_hessian_name(*key): (key, totals.inputs[key[0]].sum_squares.shape[-1]) for key in sorted(statistics.hessians)}
    shapes = {name: (STORED[array.dtype], array.shape) for name, array in arrays.items()}
    shapes.update({name: ("F32", (side, side)) for name, (_, side) in sides.items()})

    def contents() -> Iterator[memoryview]:
        for name in shapes:
            array = statistics.hessians[sides[name][0]] if name in sides else arrays[name]
            if name in sides:
                check_hessian(name, array)
            yield np.ascontiguousarray(array).data

    check_domains(totals.domains)
    for kind, name, moments in totals.items():
        check_moments(f"{kind}.{name}", moments.count, moments.sum_squares, moments.absolute_maximum)
    text = json.dumps(dataclasses.asdict(header), allow_nan=False)
    with writing(path) as temporary:
        write_safetensors(temporary, shapes, contents(), {METADATA_KEY: text})


def _load(path: Path) -> tuple[Statistics, dict[str, Any] | None]:
    file = open_arrays(path)
    header = _header(path, file.metadata)
    names = {"inputs": sorted(set(header.layers.values())), "keys": header.attentions, "values": header.attentions}
    parts = {kind: {name: _moments(file, f"{kind}.{name}", len(header.domains)) for name in names[kind]} for kind in KINDS}
    totals = Totals(header.domains, **parts)
    sides = {
        (name, domain): moments.sum_squares.shape[-1]
        for name, moments in totals.inputs.items()
        for domain in header.domains
        if _hessian_name(name, domain) in file.places
    }
    if header.hessians != bool(sides):
        raise StatisticsError(f"{path}: its Hessians are missing; calibrate again")
    found = Statistics(header.model, header.layers, header.runs, totals, _StoredHessians(file, sides) if sides else {})
    return found, header.corpus_state


def _kind(metadata: Mapping[str, str]) -> str:
    """What a safetensors file that holds no statistics is."""
    return "the state of a prompt" if "prompt_ids" in metadata else "weights of a model or other arrays"


def _header(path: Path, metadata: Mapping[str, str]) -> _Header:
    if METADATA_KEY not in metadata:
        raise StatisticsError(f"{path}: holds {_kind(metadata)}, not statistics; those come from marlin calibrate -o FILE")
    document = parse_json(metadata[METADATA_KEY], f"{path}: its metadata", StatisticsError)
    version = document.get("version") if isinstance(document, dict) else None
    if version != FORMAT_VERSION:
        raise StatisticsError(
            f"{path}: statistics of format version {quoted(version)}, this marlin reads {FORMAT_VERSION}; calibrate again"
        )
    try:
        header = from_mapping(_Header, document, str(path))
    except ConfigError as error:
        raise StatisticsError(str(error)) from None
    with _of_file(path):
        check_domains(header.domains)
        for run in header.runs:
            check_run(run)
    return header


def _moments(file: StoredArrays, name: str, domains: int) -> Moments:
    """The arrays of one input, whose types and shapes are checked before they are read."""
    places = {}
    for field, dtype in DTYPES.items():
        place = file.places.get(f"{name}.{field}")
        if place is None:
            raise StatisticsError(f"{file.path}: the array {quoted(f'{name}.{field}')} is missing; calibrate again")
        if place.dtype != STORED[dtype]:
            raise StatisticsError(f"{file.path}: {quoted(f'{name}.{field}')} is {place.dtype}, expected {STORED[dtype]}")
        places[field] = place
    shape = places["sum_squares"].shape
    alike = places["count"].shape == shape[:2] and places["absolute_maximum"].shape == shape
    if len(shape) != 3 or shape[0] != domains or not alike:
        raise StatisticsError(f"{file.path}: the arrays of {quoted(name)} do not have the shapes of {domains} domains")
    moments = Moments(**{field: file.read(f"{name}.{field}") for field in DTYPES})
    with _of_file(file.path):
        check_moments(name, moments.count, moments.sum_squares, moments.absolute_maximum)
    return moments
