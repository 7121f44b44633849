"""What stands for a prompt that has been read: rows of keys and values, and where they may be taken up. No files.

Whoever reads prompts is given a `PromptKeeper` and calls two functions of it: `restore` before a prompt is read, and `keep`
when it has been. A restored beginning is exact: reading goes on from the very numbers that reading the whole prompt gives, so
that the bytes that follow are the same (where a row of a product does not depend on the rows beside it: `MARLIN_ROWS=exact`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.models import ARCHITECTURES, Reading

# Rows of the keys or of the values of a layer: [1, heads, rows, ..], and the scales of their groups where they are packed.
Part: TypeAlias = Sequence[mx.array]
Layers: TypeAlias = Sequence[tuple[Part, Part]]


class KeptRows(Protocol):
    """Rows of keys and values of one stream that nothing changes any more."""

    @property
    def count(self) -> int:
        """Rows."""

    def stored(self) -> Layers:
        """The rows of each layer, evaluated."""

    def memory(self) -> Mapping[int, int]:
        """Address -> bytes of each piece of memory that is held; what two name they share."""


class KernelRows:
    """`KeptRows` in the pages of the kernels; a cache that goes on from them shares those that are full.

    Args:
        cache: a `StackCache` that nobody else has.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    @property
    def count(self) -> int:
        return int(self.cache.rows)

    def stored(self) -> Layers:
        layers: Layers = self.cache.stored()
        return layers

    def memory(self) -> Mapping[int, int]:
        return dict(self.cache.places())


class ArrayRows:
    """`KeptRows` as arrays: out of a file, or out of MLX's own caches, which take a copy."""

    def __init__(self, layers: Layers, count: int) -> None:
        # In order in memory, as whoever writes them to a file may do so in another thread, where MLX computes nothing.
        self._layers = [
            ([mx.contiguous(each) for each in keys], [mx.contiguous(each) for each in values]) for keys, values in layers
        ]
        self._count = count
        mx.eval(self._layers)

    @property
    def count(self) -> int:
        return self._count

    def stored(self) -> Layers:
        return self._layers

    def memory(self) -> Mapping[int, int]:
        return {id(array): array.nbytes for layer in self._layers for part in layer for array in part}


@dataclass(frozen=True)
class Units:
    """How ids become rows: `size` of them one row, and the last `slack` ids of a prompt are left to finer stages."""

    size: int = 1
    slack: int = 0

    def whole(self, ids: int) -> int:
        """The rows that a prompt of so many ids has."""
        return max(0, ids - self.slack) // self.size


@dataclass(frozen=True)
class Place:
    """Where a state may be taken up without a look at what is before.

    Attributes:
        units: rows of ids before it.
        last: what their last row has given: of a MegaByte the condition of the next stage, of bytewise networks logits.
        delayed: by layer, what a shift of tokens lets the next row read; empty for no shift.
    """

    units: int
    last: mx.array
    delayed: tuple[mx.array, ...] = ()

    def __post_init__(self) -> None:
        mx.eval(self.last, self.delayed)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.last.nbytes + sum(each.nbytes for each in self.delayed)


@dataclass(frozen=True)
class Beginning:
    """The beginning of a prompt that need not be read.

    Attributes:
        units: rows of ids in it, one at least.
        rows: of a state, of which the first `count` are meant.
        count: `units`, and what leads them.
        places: of the state, up to here; the last of them stands here, if `last` is not None.
    """

    units: int
    rows: KeptRows
    count: int
    places: tuple[Place, ...]

    @property
    def here(self) -> Place | None:
        """The place at its end; without one there is a unit of the prompt still to read."""
        return self.places[-1] if self.places and self.places[-1].units == self.units else None

    @property
    def delayed(self) -> tuple[mx.array, ...]:
        """See `Place`."""
        return () if self.here is None else self.here.delayed


@dataclass(frozen=True)
class StreamState:
    """A prompt, or as many whole units of it as have been read, and what stands for it.

    Attributes:
        ids: int32, `units.size` for each row.
        units: how they became rows.
        rows: those, after what leads a text.
        places: by units, rising; the last stands at the end.
        is_cut_anywhere: may reading go on after any row? With a shift of tokens it may at places alone.
    """

    ids: npt.NDArray[np.int32]
    units: Units
    rows: KeptRows
    places: tuple[Place, ...]
    is_cut_anywhere: bool = True
    lead: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lead", self.rows.count - len(self.ids) // self.units.size)

    @property
    def memory(self) -> Mapping[int, int]:
        """See `KeptRows.memory`; places included."""
        return {**self.rows.memory(), **{id(place): place.nbytes for place in self.places}}

    def beginning_of(self, ids: Sequence[int]) -> Beginning | None:
        """As much of a prompt as this state stands for; None where that is nothing."""
        shared = shared_units(self.ids, ids, self.units, [place.units for place in self.places], self.is_cut_anywhere)
        if shared < 1:
            return None
        places = tuple(place for place in self.places if place.units <= shared)
        return Beginning(shared, self.rows, self.lead + shared, places)

    def holds(self, other: "StreamState") -> bool:
        """Does it stand for all that `other` stands for?"""
        if common_ids(self.ids, other.ids) < len(other.ids):
            return False
        return self.is_cut_anywhere or {place.units for place in other.places} <= {place.units for place in self.places}


class PromptKeeper(Protocol):
    """What readers of prompts ask, on the one thread that owns the network and its caches.

    Attributes:
        keeps_outputs: is it given the state of a prompt once more, with what followed it, when the stream has ended?
    """

    keeps_outputs: bool

    def is_ready(self, ids: Sequence[int]) -> bool:
        """Would `restore` of this prompt answer at once? If not, what it waits for is on its way from here on."""

    def restore(self, ids: Sequence[int]) -> Beginning | None:
        """The longest beginning of a prompt that is known; None: read all of it."""

    def keep(self, state: StreamState) -> None:
        """Take the state of a prompt that has been read. Nothing of it may change later; caches see to that."""


def units_of(config: Any) -> Units:
    """How a network of this configuration reads ids into rows."""
    continuing = ARCHITECTURES[config.model_type].continuing
    if continuing is not None and continuing.reading is Reading.PATCHES:
        # megabyte_pytorch predicts from the patch that ends a prompt, so that patch is read by the finer stages.
        return Units(config.patch_size, 1 if config.layout == "megabyte_pytorch" else 0)
    return Units()


def is_cut_anywhere(config: Any) -> bool:
    """See `StreamState`."""
    return not getattr(config, "token_shift", False)


def ids_of(ids: Sequence[int] | npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Ids, or bytes, as an array."""
    if isinstance(ids, bytes):
        return np.frombuffer(ids, dtype=np.uint8).astype(np.int32)
    return np.asarray(ids, dtype=np.int32)


def common_ids(kept: npt.NDArray[np.int32], ids: Sequence[int] | npt.NDArray[np.int32]) -> int:
    """How many ids two texts begin with alike."""
    most = min(len(kept), len(ids))
    differs = np.flatnonzero(kept[:most] != ids_of(ids[:most]))
    return int(differs[0]) if len(differs) else most


def shared_units(
    kept: npt.NDArray[np.int32], ids: Sequence[int], units: Units, places: Sequence[int], is_cut_anywhere: bool
) -> int:
    """The rows of a state that a prompt can begin with; see `StreamState`, of which `places` are those of its places."""
    wanted = units.whole(len(ids))
    shared = min(common_ids(kept, ids) // units.size, wanted)
    if not is_cut_anywhere:
        return max((place for place in places if place <= shared), default=0)
    # What the last unit of a prompt gave is known at a place alone; elsewhere it is read again.
    return shared - 1 if shared == wanted and shared not in places else shared


def taken_up(cache: Any, beginning: Beginning) -> Any:
    """A `StackCache` that goes on from a beginning: pages that it shares, or rows that it takes into its own.

    Args:
        cache: an empty one of the same kind.
    """
    if isinstance(beginning.rows, KernelRows):
        cache = beginning.rows.cache.copy()
    else:
        cache.restore(beginning.rows.stored(), beginning.rows.count)
    cache.cut(beginning.count, list(beginning.delayed))
    return cache
