"""What one stage of a MegaByte remembers of a batch of streams: what decoding asks of it, and its form in arrays of MLX."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx

from marlin_cli.engine.cache import CacheBits, KeyValueCache, PackedKeyValueCache
from marlin_cli.engine.endless import Reach
from marlin_cli.engine.ring import RingCache
from marlin_cli.engine.states import ArrayRows, Beginning, KeptRows, Layers
from marlin_cli.models.megabyte_config import StageConfig
from marlin_cli.models.megabyte_layers import Stack


class StageMemory(NamedTuple):
    """All that a cache of a single stream remembers."""

    layers: Layers  # the rows that are held
    dropped: int  # rows that were seen before those, and let go
    delayed: tuple[mx.array, ...]  # see `states.Place`


class StageCache(Protocol):
    """What one stage of a batch of streams remembers."""

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""

    def run(self, rows: mx.array) -> mx.array:
        """Take rows [streams, n, dim], which follow those seen before, through the layers: hidden rows."""

    def keep(self, streams: Sequence[int]) -> None:
        """Keep these members of the batch."""

    def kept(self) -> KeptRows:
        """The rows of a single stream so far, which stay as they are."""

    def delayed(self) -> tuple[mx.array, ...]:
        """See `states.Place`."""

    def take_up(self, beginning: Beginning) -> None:
        """Go on from the beginning of a prompt, in place of nothing."""

    def memory(self) -> StageMemory:
        """All that is remembered of a single stream, to go on from later."""

    def remember(self, memory: StageMemory) -> None:
        """Go on from what `memory` gave, in place of nothing."""


class GraphCache:
    """What one stage remembers, as arrays of MLX; takes rows through the network's own layers."""

    def __init__(
        self,
        stack: Stack,
        stage: StageConfig,
        short: bool,
        padding: Sequence[int],
        bits: CacheBits,
        reach: Reach | None = None,
    ) -> None:
        self._stack = stack
        left = mx.array(list(padding)) if padding else None
        assert reach is None or left is None, "sequences of a window have no filler before them"
        self.layers: list[KeyValueCache] = [
            RingCache(reach, bits.keys, bits.values) if reach is not None
            else KeyValueCache(left, rows_per_step=stage.length + 1) if short
            else KeyValueCache(left) if not bits.is_packed
            else PackedKeyValueCache(bits.keys, bits.values, left)
            for _ in range(stage.layers)
        ]  # fmt: skip

    def run(self, rows: mx.array) -> mx.array:
        return self._stack(rows, self.layers)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def keep(self, streams: Sequence[int]) -> None:
        chosen = mx.array(list(streams))
        for layer in self.layers:
            layer.keep(chosen)

    def kept(self) -> ArrayRows:
        return ArrayRows([layer.stored() for layer in self.layers], self.layers[0].rows)

    def delayed(self) -> tuple[mx.array, ...]:
        return tuple(layer.delayed for layer in self.layers if layer.delayed is not None)

    def take_up(self, beginning: Beginning) -> None:
        count, stored = beginning.count, beginning.rows.stored()
        for number, (layer, parts) in enumerate(zip(self.layers, stored, strict=True)):
            keys, values = ([array[:, :, :count] for array in part] for part in parts)
            layer.restore((keys, values))
            if beginning.delayed:
                layer.delay_on(beginning.delayed[number], count)

    def memory(self) -> StageMemory:
        dropped = [layer.dropped for layer in self.layers if isinstance(layer, RingCache)]
        return StageMemory([layer.stored() for layer in self.layers], dropped[0] if dropped else 0, self.delayed())

    def remember(self, memory: StageMemory) -> None:
        for number, (layer, parts) in enumerate(zip(self.layers, memory.layers, strict=True)):
            if isinstance(layer, RingCache):
                layer.take_back(parts, memory.dropped)
            else:
                layer.restore(parts)
            if memory.delayed:
                layer.delay_on(memory.delayed[number], layer.rows)

    def join(self, other: "GraphCache", streams: tuple[int, int]) -> None:
        """Take in the members of another batch, see `KeyValueCache.join`."""
        for layer, theirs in zip(self.layers, other.layers, strict=True):
            layer.join(theirs, streams)
