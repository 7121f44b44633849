"""Caches of texts that have equally many bytes, and patches of them that end or begin at different ones."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.engine.cache import Rows
from marlin_cli.ops import attention

# Rows by which storage grows.
ROWS_PER_STEP = 256

# Rows of all texts together that are read at once: bounds what a layer has between two products.
ROWS_AT_ONCE = 2048

Indices = npt.NDArray[np.int64]


class WindowCache:
    """Keys and values of a layer of bytes: those that its window sees, without one all; a `models.layer_cache.LayerCache`."""

    def __init__(self) -> None:
        self.offset = 0
        self._rows = Rows(ROWS_PER_STEP), Rows(ROWS_PER_STEP)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        return sum(rows.nbytes for rows in self._rows)

    @property
    def arrays(self) -> list[mx.array]:
        """All that is held."""
        return [rows.rows for rows in self._rows if rows.count]

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None) -> mx.array:
        new = keys.shape[2]
        self.offset += new
        every_key, every_value = (rows.append(each) for rows, each in zip(self._rows, (keys, values), strict=True))
        if window is None:
            return attention(queries, every_key, every_value, scale)
        before = max(0, self._rows[0].count - new - window)
        back = window if self._rows[0].count - before > window + 1 else None
        found = attention(queries, every_key[:, :, before:], every_value[:, :, before:], scale, window=back)
        if self._rows[0].count >= 2 * (window + 1):
            self._cut(window)
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
    """Keys and values of layers that have a row a patch, of texts that have unequal numbers of patches."""

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
    """A layer of `PatchCaches` in one pass; a `models.layer_cache.LayerCache`."""

    def __init__(self, storage: list[mx.array], streams: Indices, counts: Indices, total: int) -> None:
        self._storage, self._streams, self._counts, self._total = storage, streams, counts, total
        self._everyone = len(streams) == total and bool((counts == counts[0]).all())

    @property
    def offset(self) -> int | mx.array:
        return int(self._counts[0]) if self._everyone else mx.array(self._counts.astype(np.int32))

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None) -> mx.array:
        rows = keys.shape[2]
        end = int(self._counts.max()) + rows
        self._grow(end, keys)
        if self._everyone:
            for index, new in enumerate((keys, values)):
                self._storage[index][:, end - rows : end] = new.swapaxes(1, 2)
            every_key, every_value = (each[:, :end].swapaxes(1, 2) for each in self._storage)
            return attention(queries, every_key, every_value, scale, window=window)
        own = mx.array(self._streams.astype(np.int32))
        places = mx.array((self._counts[:, None] + np.arange(rows)).astype(np.int32))
        for index, new in enumerate((keys, values)):
            self._storage[index][own[:, None], places] = new.swapaxes(1, 2)
        every_key, every_value = (each[own, :end].swapaxes(1, 2) for each in self._storage)
        at, places = mx.arange(end), places[:, None, :, None]
        mask = at <= places if window is None else (at <= places) & (at >= places - window)
        return mx.fast.scaled_dot_product_attention(queries, every_key, every_value, scale=scale, mask=mask)

    def _grow(self, rows: int, like: mx.array) -> None:
        have = self._storage[0].shape[1] if self._storage else 0
        if rows <= have:
            return
        capacity = -(-rows // ROWS_PER_STEP) * ROWS_PER_STEP
        room = mx.zeros((self._total, capacity - have, like.shape[1], like.shape[3]), dtype=like.dtype)
        old = self._storage or [room[:, :0], room[:, :0]]
        self._storage[:] = [mx.concatenate([each, room], axis=1) for each in old]
