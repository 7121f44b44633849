"""What a SpaceByte remembers: windows of bytes, and a row for each patch that has begun, in each text at bytes of its own."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.patch_caches import ROWS_AT_ONCE, Indices, PatchCaches, WindowCache
from marlin_cli.errors import UsageError
from marlin_cli.models.spacebyte import SpaceByte
from marlin_cli.models.spacebyte_patches import Before
from marlin_cli.models.unequal_patches import patches_of


class SpaceRows:
    """What a SpaceByte remembers of a batch of texts; an `engine.byte_decoding.Rows`."""

    def __init__(self, network: SpaceByte, streams: int) -> None:
        self._network = network
        self._initial = [WindowCache() for _ in network.initial.layers]
        self._final = [WindowCache() for _ in network.final.layers]
        self._global = PatchCaches(network.config.global_layers, streams)
        self._before = Before.nothing(streams)
        self._ended = np.zeros(streams, np.bool_)  # texts that had no room for a patch

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(cache.nbytes for cache in (*self._initial, *self._final)) + self._global.nbytes

    @property
    def patches(self) -> list[int]:
        """Patches of each text that are remembered."""
        return [int(count) for count in self._global.counts]

    def read(self, ids: mx.array) -> mx.array:
        """Append ids [n, rows], one row at least: logits [n, vocab] of what follows."""
        step = max(1, ROWS_AT_ONCE // ids.shape[0])
        for start in range(0, ids.shape[1], step):
            hidden = self._read_some(ids[:, start : start + step])
            # What is remembered would else be a graph as long as the text.
            mx.eval(hidden, [each.arrays for each in (*self._initial, *self._final)], self._global.arrays)
        return self._network.ended(self._network.head(hidden[:, -1]), self._ended)

    def _read_some(self, ids: mx.array) -> mx.array:
        """Hidden rows [n, rows, local_dim] of ids [n, rows]."""
        network = self._network
        begun = network.begun(ids, self._before)
        x = network.initial(network.embedded(ids, self._before.rows), self._initial)
        beginning = np.flatnonzero(begun.first.any(axis=1))
        if len(beginning):
            x = self._with_patches(x, beginning, begun.first)
        self._before, self._ended = begun.after, begun.beyond[:, -1]
        hidden: mx.array = network.norm(network.final(x, self._final))
        return hidden

    def _with_patches(self, x: mx.array, beginning: Indices, first: np.ndarray) -> mx.array:
        """Rows x to which the patches of the texts `beginning` have been added, which begin among them."""
        network, texts = self._network, mx.array(beginning.astype(np.int32))
        everyone = len(beginning) == len(first)
        own, first = x if everyone else x[texts], first[beginning]
        places = patches_of(first).last
        numbers = mx.array(self._global.counts[beginning].astype(np.int32))[:, None] + mx.arange(places.shape[1])
        y = network["global"](network.rows_of_patches(own, places, numbers), self._global.of(beginning))
        self._global.add(beginning, first.sum(axis=1))
        with_patches = network.with_patches(own, y, mx.array(first))
        if everyone:
            return with_patches
        x[texts] = with_patches
        return x

    def keep(self, streams: Sequence[int]) -> None:
        """Keep these members of the batch, in this order."""
        members = mx.array(list(streams))
        for cache in (*self._initial, *self._final):
            cache.keep(members)
        self._global.keep(streams)
        self._before = self._before.of(list(streams))
        self._ended = self._ended[list(streams)]


def space_rows(network: SpaceByte, streams: int, bits: CacheBits) -> SpaceRows:
    """What such a network remembers of so many texts that have no ids yet.

    Raises:
        UsageError: bits of keys and values, which keep their own type.
    """
    if bits != CacheBits():
        raise UsageError("--kv-bits: what a SpaceByte remembers keeps its own type; leave it out")
    return SpaceRows(network, streams)
