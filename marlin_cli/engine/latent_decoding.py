"""What a Byte Latent Transformer remembers: windows of bytes, the open patch, and a row for each patch that has ended.

Texts of a batch have equally many bytes, and patches that end at different ones: the global transformer runs over those texts
alone whose patch ends, each at its own place.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.patch_caches import ROWS_AT_ONCE, Indices, PatchCaches, WindowCache
from marlin_cli.errors import UsageError
from marlin_cli.models.blt import Blt
from marlin_cli.models.unequal_patches import at_rows, ends_of_patches, patches_of

Pair = tuple[mx.array, mx.array]


class LatentRows:
    """What a Byte Latent Transformer remembers of a batch of texts; an `engine.byte_decoding.Rows`."""

    def __init__(self, network: Blt, streams: int) -> None:
        config = network.config
        self._network, self._streams = network, streams
        self._patcher = [WindowCache() for _ in network.patcher.layers]
        self._encoder = [WindowCache() for _ in network.byte_encoder.layers]
        self._decoder = [WindowCache() for _ in network.byte_decoder.layers]
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
