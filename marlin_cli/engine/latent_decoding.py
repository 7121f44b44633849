"""What a Byte Latent Transformer remembers: windows of bytes, the open patch, and a row for each patch that has ended.

Texts of a batch have equally many bytes, and patches that end at different ones: the global transformer runs over those texts
alone whose patch ends, each at its own place.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.engine.cache import CacheBits, Rows
from marlin_cli.errors import UsageError
from marlin_cli.models.blt import Block, Blt
from marlin_cli.models.blt_patches import at_rows, ends_of_patches, patches_of
from marlin_cli.ops import attention

# Rows by which storage grows.
ROWS_PER_STEP = 256

# Rows of all texts together that are read at once: bounds what a layer has between two products.
ROWS_AT_ONCE = 2048

Indices = npt.NDArray[np.int64]
Pair = tuple[mx.array, mx.array]


class WindowCache:
    """Keys and values of a layer of bytes, the last `window` of them or (None) all; a `models.blt.LayerCache`."""

    def __init__(self, window: int | None) -> None:
        self.offset, self._window = 0, window
        self._rows = Rows(ROWS_PER_STEP), Rows(ROWS_PER_STEP)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        return sum(rows.nbytes for rows in self._rows)

    @property
    def arrays(self) -> list[mx.array]:
        """All that is held."""
        return [rows.rows for rows in self._rows if rows.count]

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        new = keys.shape[2]
        self.offset += new
        every_key, every_value = (rows.append(each) for rows, each in zip(self._rows, (keys, values), strict=True))
        if self._window is None:
            return attention(queries, every_key, every_value, scale)
        before = max(0, self._rows[0].count - new - (self._window - 1))
        back = self._window - 1 if self._rows[0].count - before > self._window else None
        found = attention(queries, every_key[:, :, before:], every_value[:, :, before:], scale, window=back)
        if self._rows[0].count >= 2 * self._window:
            self._cut(self._window - 1)
        return found

    def _cut(self, kept: int) -> None:
        rows = Rows(ROWS_PER_STEP), Rows(ROWS_PER_STEP)
        for own, other in zip(rows, self._rows, strict=True):
            own.append(other.rows[:, :, other.count - kept :])
        self._rows = rows

    def keep(self, streams: mx.array) -> None:
        """Keep these members of the batch."""
        for rows in self._rows:
            rows.keep(streams)


class PatchCaches:
    """Keys and values of the global transformer, a row a patch, of texts that have unequal numbers of patches."""

    def __init__(self, layers: int, streams: int) -> None:
        self.counts: Indices = np.zeros(streams, np.int64)
        self._storage: list[list[mx.array]] = [[] for _ in range(layers)]  # keys and values [streams, rows, heads, head_dim]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use, those that stand for another text's longer one among them."""
        total = int(self.counts.max(initial=0))
        return sum(each.nbytes * total // each.shape[1] for layer in self._storage for each in layer)

    @property
    def arrays(self) -> list[mx.array]:
        """All that is held."""
        return [each for layer in self._storage for each in layer]

    def of(self, streams: Indices) -> "list[_PatchCache]":
        """The caches of the layers for a pass over patches of these texts; `add` counts them then."""
        return [_PatchCache(layer, streams, self.counts[streams], len(self.counts)) for layer in self._storage]

    def add(self, streams: Indices, patches: Indices) -> None:
        """Count patches of these texts, whose rows have been written."""
        self.counts[streams] += patches

    def keep(self, streams: Sequence[int]) -> None:
        """Keep these members of the batch."""
        self.counts = self.counts[list(streams)]
        for layer in self._storage:
            layer[:] = [each[mx.array(list(streams))] for each in layer]


class _PatchCache:
    """A layer of `PatchCaches` in one pass; a `models.blt.LayerCache`."""

    def __init__(self, storage: list[mx.array], streams: Indices, counts: Indices, total: int) -> None:
        self._storage, self._streams, self._counts, self._total = storage, streams, counts, total
        self._everyone = len(streams) == total and bool((counts == counts[0]).all())

    @property
    def offset(self) -> int | mx.array:
        return int(self._counts[0]) if self._everyone else mx.array(self._counts.astype(np.int32))

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        rows = keys.shape[2]
        end = int(self._counts.max()) + rows
        self._grow(end, keys)
        if self._everyone:
            for index, new in enumerate((keys, values)):
                self._storage[index][:, end - rows : end] = new.swapaxes(1, 2)
            every_key, every_value = (each[:, :end].swapaxes(1, 2) for each in self._storage)
            return attention(queries, every_key, every_value, scale)
        own = mx.array(self._streams.astype(np.int32))
        places = mx.array((self._counts[:, None] + np.arange(rows)).astype(np.int32))
        for index, new in enumerate((keys, values)):
            self._storage[index][own[:, None], places] = new.swapaxes(1, 2)
        every_key, every_value = (each[own, :end].swapaxes(1, 2) for each in self._storage)
        mask = mx.arange(end) <= places[:, None, :, None]
        return mx.fast.scaled_dot_product_attention(queries, every_key, every_value, scale=scale, mask=mask)

    def _grow(self, rows: int, like: mx.array) -> None:
        have = self._storage[0].shape[1] if self._storage else 0
        if rows <= have:
            return
        capacity = -(-rows // ROWS_PER_STEP) * ROWS_PER_STEP
        room = mx.zeros((self._total, capacity - have, like.shape[1], like.shape[3]), dtype=like.dtype)
        old = self._storage or [room[:, :0], room[:, :0]]
        self._storage[:] = [mx.concatenate([each, room], axis=1) for each in old]


class LatentRows:
    """What a Byte Latent Transformer remembers of a batch of texts; an `engine.byte_decoding.Rows`."""

    def __init__(self, network: Blt, streams: int) -> None:
        config = network.config
        self._network, self._streams = network, streams

        def windows(layers: Sequence[Block], window: int | None) -> list[WindowCache]:
            return [WindowCache(window) for _ in layers]

        self._patcher = windows(network.patcher.layers, config.patcher_window)
        self._encoder = windows(network.byte_encoder.layers, config.local_window)
        self._decoder = windows(network.byte_decoder.layers, config.local_window)
        self._global = PatchCaches(config.patches.layers, streams)
        self._before: mx.array | None = None  # the ids that hashes of the next ones reach back to
        self._open: mx.array | None = None  # rows of the encoder [streams, rows, width], of open patches and before them
        self._open_bytes: Indices = np.zeros(streams, np.int64)
        # Of the last patch of each text: keys and values [streams, 1, patch_rows, heads, head_dim], by layer that reads them.
        self._read: list[tuple[mx.array, mx.array]] = []

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        windows = sum(cache.nbytes for cache in self._windows)
        held = [self._before, self._open, *(each for pair in self._read for each in pair)]
        return windows + self._global.nbytes + sum(each.nbytes for each in held if each is not None)

    @property
    def patches(self) -> list[int]:
        """Patches of each text that have ended."""
        return [int(count) for count in self._global.counts]

    @property
    def _windows(self) -> list[WindowCache]:
        return [*self._patcher, *self._encoder, *self._decoder]

    def read(self, ids: mx.array) -> mx.array:
        """Append ids [n, rows], one row at least: logits [n, vocab] of what follows."""
        step = max(1, ROWS_AT_ONCE // ids.shape[0])
        for start in range(0, ids.shape[1], step):
            hidden = self._read_some(ids[:, start : start + step])
            # What is remembered would else be a graph as long as the text.
            windows = [each.arrays for each in self._windows]
            mx.eval(hidden, windows, self._global.arrays, self._open, self._read, self._before)
        return self._network.head(hidden[:, -1])

    def _read_some(self, ids: mx.array) -> mx.array:
        """Hidden rows [n, rows, width] of ids [n, rows]."""
        network, config = self._network, self._network.config
        first = self._before is None
        entropies = np.array(network.patcher(ids, self._patcher))
        ends = ends_of_patches(entropies, config.threshold, config.max_patch_bytes, self._open_bytes, first=first)
        x = network.embedded(ids, self._before)
        for layer, cache in zip(network.byte_encoder.layers, self._encoder, strict=True):
            x = layer(x, cache)
        self._remember_ids(ids)
        self._open = x if self._open is None else mx.concatenate([self._open, x], axis=1)
        closing = np.flatnonzero(ends.any(axis=1))
        if len(closing):
            self._end_patches(closing, ends)
        # The last patch before these ids stands first, where there is one.
        seen = ends.cumsum(axis=1) - (1 if first else 0)
        hidden = network.byte_decoder(x, self._read, mx.array(seen.astype(np.int32)), self._decoder)
        self._forget(ends, first)
        return hidden

    def _end_patches(self, closing: Indices, ends: npt.NDArray[np.bool_]) -> None:
        """Run the patches that end among these rows through the global transformer; bytes read what they come to."""
        assert self._open is not None
        rows, before = ends.shape[1], self._open_bytes[closing]
        longest = int(before.max()) + rows
        x = self._open[:, self._open.shape[1] - longest :]
        x = x if len(closing) == len(ends) else x[mx.array(closing.astype(np.int32))]
        filler = int(bool((before < before.max()).any()))  # one patch, of what is behind a shorter open patch and a row before
        within = np.zeros((len(closing), filler + longest), np.bool_)
        within[:, filler + longest - rows :] = ends[closing]
        if filler:
            within[np.arange(len(closing)), before.max() - before] = True
            x = mx.pad(x, [(0, 0), (1, 0), (0, 0)])
        vectors = self._network.byte_encoder.patches(x, patches_of(within))[:, filler:]
        found = self._network.patches(vectors, self._global.of(closing))
        self._global.add(closing, ends[closing].sum(axis=1))
        new = self._network.byte_decoder.keys(found)
        if len(closing) < len(ends):
            places = mx.array(closing.astype(np.int32))
            new = [(_spread(keys, places, len(ends)), _spread(values, places, len(ends))) for keys, values in new]
        self._read = [_behind(old, pair) for old, pair in zip(self._read, new, strict=True)] if self._read else new

    def _forget(self, ends: npt.NDArray[np.bool_], first: bool) -> None:
        """Keep the rows of open patches, and of the patches that are read the last of each text."""
        assert self._open is not None
        rows, counts = ends.shape[1], ends.sum(axis=1)
        since = np.where(counts > 0, ends[:, ::-1].argmax(axis=1), self._open_bytes + rows)
        self._open_bytes = since.astype(np.int64)
        self._open = mx.contiguous(self._open[:, self._open.shape[1] - int(since.max()) :])
        if self._read[0][0].shape[1] > 1:
            last = mx.array((counts - int(first)).astype(np.int32))[:, None]
            self._read = [(at_rows(keys, last), at_rows(values, last)) for keys, values in self._read]

    def _remember_ids(self, ids: mx.array) -> None:
        """Keep the ids that hashes of the next ones reach back to."""
        known = ids if self._before is None else mx.concatenate([self._before, ids], axis=1)
        most = max(self._network.config.hash_lengths, default=1) - 1
        self._before = mx.contiguous(known[:, max(0, known.shape[1] - most) :])

    def keep(self, streams: Sequence[int]) -> None:
        """Keep these members of the batch, in this order."""
        members = mx.array(list(streams))
        for cache in self._windows:
            cache.keep(members)
        self._global.keep(streams)
        self._open_bytes = self._open_bytes[list(streams)]
        self._open = None if self._open is None else self._open[members]
        self._before = None if self._before is None else self._before[members]
        self._read = [(keys[members], values[members]) for keys, values in self._read]


def _behind(old: Pair, new: Pair) -> Pair:
    return mx.concatenate([old[0], new[0]], axis=1), mx.concatenate([old[1], new[1]], axis=1)


def _spread(some: mx.array, places: mx.array, total: int) -> mx.array:
    """Rows [m, ..] as those at `places` among [total, ..], which else are zero."""
    every = mx.zeros((total, *some.shape[1:]), dtype=some.dtype)
    every[places] = some
    return every


def latent_rows(network: Blt, streams: int, bits: CacheBits) -> LatentRows:
    """What such a network remembers of so many texts that have no ids yet.

    Raises:
        UsageError: bits of keys and values, which keep their own type.
    """
    if bits != CacheBits():
        raise UsageError("--kv-bits: what a Byte Latent Transformer remembers keeps its own type; leave it out")
    return LatentRows(network, streams)
