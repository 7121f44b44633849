"""States of prompts as files: safetensors that say what made them. What is not as it was written is refused."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli import console
from marlin_cli.engine.fingerprints import bytes_of, digest_of
from marlin_cli.engine.states import ArrayRows, Beginning, Place, StreamState, Units, shared_units
from marlin_cli.errors import CheckpointError, MarlinError, OutputError
from marlin_cli.files import check_utf8_name
from marlin_cli.tensor_files import read_tensor_bytes, write_safetensors
from marlin_cli.text import quoted
from marlin_cli.writing import writing

TensorType: TypeAlias = tuple[mx.Dtype, tuple[int, ...]]

FORMAT, VERSION = "marlin state", "1"

# The types of what states are made of, by the names that safetensors has for them.
TYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.uint8: "U8", mx.int32: "I32"}

# Their words in numpy, which has no bfloat16.
WORDS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "U8": "u1", "I32": "<i4"}

# Type, shape and bytes.
Tensor: TypeAlias = tuple[str, tuple[int, ...], memoryview]

SUM = "sha256"


class StateError(MarlinError):
    """A file holds no state that this model could go on from; the message names it and says what differs."""


class ForeignStateError(StateError):
    """It may be whole, but another model, device or version of marlin wrote it."""


@dataclass(frozen=True)
class StateKind:
    """What the states of a model have in common, on one device with one width of keys and values.

    Attributes:
        facts: what a file says of them, and has to say to be read.
        units: how ids become rows.
        lead: rows before the first unit.
        tensors: (rows) -> type and shape of every tensor of keys and values, by name.
        place: type and shape of what the last row of a prompt has given.
        delayed: type and shape by layer of what a shift of tokens delays; None for no shift.
    """

    facts: Mapping[str, str]
    units: Units
    lead: int
    tensors: Callable[[int], dict[str, TensorType]]
    place: TensorType
    delayed: TensorType | None = None


def write_state(path: Path, state: StreamState, kind: StateKind) -> None:
    """Write a state; it is whole under its name or not there, and nobody but its owner may read it.

    Raises:
        OutputError: it cannot be written.
    """
    check_utf8_name(path, OutputError)
    parts = _parts_of(state)
    facts = {**kind.facts, "prompt_ids": str(len(state.ids))}
    metadata = {**facts, SUM: digest_of(facts, parts)}
    with writing(path, private=True) as temporary:
        shapes = {name: (dtype, shape) for name, (dtype, shape, _) in parts.items()}
        write_safetensors(temporary, shapes, (data for _, _, data in parts.values()), metadata)


@dataclass(frozen=True)
class StoredState:
    """A state as it stands in a file, every byte of it checked. Nothing of it is MLX's yet: any thread may read one.

    Attributes:
        ids, places: as in `StreamState`, of which a place is given by its units.
        tensors: type, shape and bytes, by name.
    """

    kind: StateKind
    ids: npt.NDArray[np.int32]
    places: Sequence[int]
    tensors: Mapping[str, Tensor]

    def units_of(self, ids: Sequence[int]) -> int:
        """The rows that a prompt can begin with."""
        return shared_units(self.ids, ids, self.kind.units, self.places, self.kind.delayed is None)

    def state(self) -> StreamState:
        """As arrays of MLX: for the thread that owns the network."""
        layers: dict[str, tuple[list[mx.array], list[mx.array]]] = {}
        for name in self.kind.tensors(1):
            layer, _, part = name.partition(".")
            layers.setdefault(layer, ([], []))[part.startswith("values")].append(_array(self.tensors[name]))
        last = _array(self.tensors["last"])
        delayed = None if self.kind.delayed is None else _array(self.tensors["delayed"])
        return StreamState(
            self.ids,
            self.kind.units,
            ArrayRows(list(layers.values()), self.kind.lead + len(self.ids) // self.kind.units.size),
            tuple(
                Place(at, last[number], () if delayed is None else tuple(delayed[number]))
                for number, at in enumerate(self.places)
            ),
            is_cut_anywhere=delayed is None,
        )


def read_state(path: Path, kind: StateKind) -> StreamState:
    """The state in a file: new arrays, all of whose bytes are those that were written.

    Raises:
        StateError: see `read_stored`.
    """
    return read_stored(path, kind).state()


def read_stored(path: Path, kind: StateKind) -> StoredState:
    """The state in a file, before it is made into arrays.

    Raises:
        StateError: the file is missing, damaged, cut, of another format or version, or made by another model, with other bits
            of keys and values, or by other kernels.
    """
    check_utf8_name(path, StateError)
    try:
        tensors, metadata = read_tensor_bytes(path)
        count = _checked_facts(path, metadata, kind)
        _check_tensors(path, tensors, kind, count)
    except CheckpointError as error:
        raise StateError(str(error)) from None
    said = metadata.pop(SUM, "")
    if digest_of(metadata, tensors) != said:
        raise StateError(f"{path}: is damaged: its bytes are not those that were written")
    ids, places = (np.frombuffer(tensors[name][2], dtype="<i4") for name in ("ids", "places"))
    units, at = count // kind.units.size, places.tolist()
    if ids.min(initial=0) < 0 or at != sorted({*at}) or at[-1:] != [units] or at[0] < 1:
        raise StateError(f"{path}: is damaged: its ids or places are none")
    return StoredState(kind, ids, at, tensors)


def read_ids(path: Path, kind: StateKind) -> npt.NDArray[np.int32]:
    """The prompt of a state alone, for who looks for one; the rest of the file is not looked at.

    Raises:
        StateError: as `read_state`, as far as the header tells.
    """
    try:
        tensors, metadata = read_tensor_bytes(path, ["ids"])
        count = _checked_facts(path, metadata, kind)
    except CheckpointError as error:
        raise StateError(str(error)) from None
    dtype, shape, data = tensors.get("ids", ("", (), memoryview(b"")))
    if (dtype, shape) != ("I32", (count,)):
        raise StateError(f"{path}: is damaged: it holds no prompt")
    return np.frombuffer(data, dtype="<i4")


def _array(tensor: Tensor) -> mx.array:
    dtype, shape, data = tensor
    words = np.frombuffer(data, dtype=WORDS[dtype]).reshape(shape)
    return mx.array(words).view(mx.bfloat16) if dtype == "BF16" else mx.array(words)


def _parts_of(state: StreamState) -> dict[str, Tensor]:
    """Type, shape and bytes of every tensor, by name; nothing is computed, as this may be another thread than MLX's."""
    places = np.array([place.units for place in state.places], dtype=np.int32)
    parts = {
        "ids": ("I32", state.ids.shape, memoryview(state.ids.tobytes())),
        "places": ("I32", places.shape, memoryview(places.tobytes())),
        "last": _stacked([[place.last] for place in state.places]),
    }
    if not state.is_cut_anywhere:
        parts["delayed"] = _stacked([place.delayed for place in state.places], inner=True)
    for layer, both in enumerate(state.rows.stored()):
        for name, part in zip(("keys", "values"), both, strict=True):
            for full_name, array in zip((f"{layer}.{name}", f"{layer}.{name}.scales"), part, strict=False):
                parts[full_name] = (TYPES[array.dtype], array.shape, bytes_of(array))
    return parts


def _stacked(rows: Sequence[Sequence[mx.array]], *, inner: bool = False) -> Tensor:
    """Type, shape and bytes of arrays of one shape behind each other: [rows, ..], with `inner` [rows, arrays of a row, ..]."""
    first = rows[0][0]
    shape = (len(rows), *((len(rows[0]),) if inner else ()), *first.shape)
    return TYPES[first.dtype], shape, memoryview(b"".join(bytes_of(array) for row in rows for array in row))


def _checked_facts(path: Path, metadata: Mapping[str, str], kind: StateKind) -> int:
    """The ids of the prompt, of a file that says of itself what this run would write."""
    if metadata.get("format") != FORMAT:
        raise StateError(f"{path}: is no state of a prompt")
    if metadata.get("version") != VERSION:
        found = quoted(metadata.get("version", ""))
        raise ForeignStateError(f"{path}: is a state of version {found}, and this marlin reads version {VERSION}")
    for name, expected in kind.facts.items():
        if metadata.get(name) != expected:
            found = quoted(metadata.get(name, ""))
            raise ForeignStateError(f"{path}: is the state of another {name}: {found}, and here it is {quoted(expected)}")
    unknown = metadata.keys() - kind.facts.keys() - {"prompt_ids", SUM}
    text = metadata.get("prompt_ids", "")
    if unknown or not (text.isascii() and text.isdecimal() and len(text) < 12):
        raise StateError(f"{path}: is damaged: its header is not one that was written")
    count = int(text)
    if count < kind.units.size or count % kind.units.size:
        raise StateError(f"{path}: is damaged: {count} ids are no whole patches")
    return count


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], kind: StateKind, count: int) -> None:
    units = count // kind.units.size
    found = {name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()}
    shape_of_places = found.get("places", ("", ()))[1]
    places = shape_of_places[0] if len(shape_of_places) == 1 else 0
    expected: dict[str, TensorType] = {
        "ids": (mx.int32, (count,)),
        "places": (mx.int32, (places,)),
        "last": (kind.place[0], (places, *kind.place[1])),
        **kind.tensors(kind.lead + units),
    }
    if kind.delayed is not None:
        expected["delayed"] = (kind.delayed[0], (places, *kind.delayed[1]))
    written = {name: (TYPES[dtype], shape) for name, (dtype, shape) in expected.items()}
    if not 0 < places <= units or found != written:
        wrong = sorted(name for name in {*found, *written} if found.get(name) != written.get(name))
        raise StateError(f"{path}: is damaged: {quoted(wrong[0] if wrong else 'places')} is not as this model has it")


class StateFile:
    """A `PromptKeeper` of one prompt: where its beginning may be read from, and where its state goes.

    Args:
        load: a file that is used if it holds a beginning of the prompt; else a line on stderr says why it is not.
        save: the file to write.
    """

    keeps_outputs = False  # what follows a prompt is another's business, as with llama.cpp's --prompt-cache

    def is_ready(self, ids: Sequence[int]) -> bool:
        """Who reads one prompt waits for its file."""
        return True

    def __init__(self, kind: StateKind, load: Path | None = None, save: Path | None = None) -> None:
        self._kind, self._load, self._save = kind, load, save
        self._found: StreamState | None = None
        self.ids_restored = 0

    def restore(self, ids: Sequence[int]) -> Beginning | None:
        """As much of the prompt as the file holds."""
        if self._load is None:
            return None
        try:
            self._found = read_state(self._load, self._kind)
        except StateError as error:
            console.note(f"{error}; the prompt is read as usual")
            return None
        beginning = self._found.beginning_of(ids)
        if beginning is None:
            console.note(f"{self._load}: the state of another prompt, which begins otherwise; this one is read as usual")
            return None
        self.ids_restored = beginning.units * self._kind.units.size
        return beginning

    def keep(self, state: StreamState) -> None:
        """Write the state, unless the file that was read is the one to write and holds it.

        Raises:
            OutputError: it cannot be written.
        """
        same = self._save == self._load and self._found is not None and self._found.holds(state)
        if self._save is not None and not same:
            write_state(self._save, state, self._kind)
