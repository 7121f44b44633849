"""What EvaByte's layers remember: rows of the open window, and of the windows before it a row for each chunk."""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from marlin_cli.engine.block_decoding import MemoryRows
from marlin_cli.engine.cache import CacheBits, Pages, Rows
from marlin_cli.models.evabyte import Attention, EvaByte
from marlin_cli.ops import attention, paged_attention

# Rows by which storage grows.
ROWS_PER_STEP = 256

Pair = tuple[mx.array, mx.array]  # keys and values [n, heads, rows, head_dim]


class AttendedRows(Protocol):
    """Keys and values that are attended to: chunks of earlier windows, and behind them the open window."""

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""

    def attend(self, queries: mx.array, new: Pair, scale: float) -> mx.array:
        """Add rows to the open window; the queries of these rows read all that they see."""

    def close_window(self, short: Pair) -> None:
        """Forget the window; a row for each of its chunks stands for it."""

    def forget(self, rows: int) -> None:
        """Let go of the last rows of the open window."""

    def keep(self, streams: mx.array) -> None:
        """Keep these members of the batch."""


class PlainRows:
    """`AttendedRows` in the network's own type, in one storage."""

    def __init__(self) -> None:
        self._rows = Rows(ROWS_PER_STEP), Rows(ROWS_PER_STEP)
        self._short = 0

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self._rows)

    def attend(self, queries: mx.array, new: Pair, scale: float) -> mx.array:
        keys, values = (rows.append(each) for rows, each in zip(self._rows, new, strict=True))
        return attention(queries, keys, values, scale)

    def close_window(self, short: Pair) -> None:
        for rows, each in zip(self._rows, short, strict=True):
            rows.count = self._short
            rows.append(each)
        self._short += short[0].shape[2]

    def forget(self, rows: int) -> None:
        for each in self._rows:
            each.forget(rows)

    def keep(self, streams: mx.array) -> None:
        for rows in self._rows:
            rows.keep(streams)


class PackedRows:
    """`AttendedRows` in 4 bits (nvfp4) or 8 (mxfp8), in pages, packed as they come; 16 bits keep the network's own type.

    Keys and queries are rotated by a Hadamard matrix per head, as in `cache.PackedKeyValueCache`.
    """

    def __init__(self, bits: CacheBits) -> None:
        self._bits = bits.keys, bits.values
        self._short = Pages(bits.keys), Pages(bits.values)
        self._window = Pages(bits.keys), Pages(bits.values)

    @property
    def nbytes(self) -> int:
        return sum(pages.nbytes for pages in (*self._short, *self._window))

    def attend(self, queries: mx.array, new: Pair, scale: float) -> mx.array:
        keys, values = (
            [*short.pages, *window.append(each)]
            for short, window, each in zip(self._short, self._window, _turned(new), strict=True)
        )
        return paged_attention(mx.hadamard_transform(queries), keys, values, scale)

    def close_window(self, short: Pair) -> None:
        for pages, each in zip(self._short, _turned(short), strict=True):
            pages.append(each)
        self._window = Pages(self._bits[0]), Pages(self._bits[1])

    def forget(self, rows: int) -> None:
        for pages in self._window:
            pages.forget(rows)

    def keep(self, streams: mx.array) -> None:
        for pages in (*self._short, *self._window):
            pages.keep(streams)


def _turned(pair: Pair) -> Pair:
    return mx.hadamard_transform(pair[0]), pair[1]


class LayerWindow:
    """What one layer remembers; a `models.evabyte.WindowMemory`.

    A chunk's row is made when its last byte has come, of exact keys and values, and is seen when its window is full.
    """

    def __init__(self, bits: CacheBits) -> None:
        self.offset = 0
        self._rows: AttendedRows = PlainRows() if bits == CacheBits() else PackedRows(bits)
        self._open: Pair | None = None  # rows of the open chunk
        self._chunks: list[Pair] = []  # of the open window
        self._may_go_back = False
        self._before: tuple[Pair | None, list[Pair], Pair] | None = None  # both as they were before the last rows, and those

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        return self._rows.nbytes + sum(each.nbytes for each in self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """What is held beside the rows that were attended to."""
        return [array for pair in (*self._chunks, *([self._open] if self._open else [])) for array in pair]

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, by: Attention) -> mx.array:
        found, start = [], 0
        while start < queries.shape[2]:  # a window, or what is there of it
            end = min(start + by.window_bytes - self.offset % by.window_bytes, queries.shape[2])
            part = slice(start, end)
            found.append(self._within(queries[:, :, part], (keys[:, :, part], values[:, :, part]), by))
            start = end
        self._may_go_back = False
        return found[0] if len(found) == 1 else mx.concatenate(found, axis=2)

    def may_go_back(self) -> None:
        """Note at the next rows what it takes to forget any of them that stand in the window which is open behind them."""
        self._may_go_back = True

    def forget(self, rows: int, by: Attention) -> None:
        """Forget the last rows, of those that were noted."""
        assert self._before is not None
        self._open, self._chunks, (keys, values) = self._before
        kept = keys.shape[2] - rows
        self.offset -= rows
        self._rows.forget(rows)
        if kept:
            self._add_chunks(keys[:, :, :kept], values[:, :, :kept], by)
        self._before = None

    def _within(self, queries: mx.array, new: Pair, by: Attention) -> mx.array:
        """Attention of rows of the open window."""
        self.offset += queries.shape[2]
        found = self._rows.attend(queries, new, by.scale)
        self._before = (self._open, list(self._chunks), new) if self._may_go_back else None
        self._add_chunks(*new, by)
        if self.offset % by.window_bytes == 0:
            keys, values = (mx.concatenate(list(each), axis=2) for each in zip(*self._chunks, strict=True))
            self._rows.close_window((keys, values))
            self._chunks = []
        return found

    def _add_chunks(self, keys: mx.array, values: mx.array, by: Attention) -> None:
        """Make rows of the chunks that are whole now."""
        if self._open is not None:
            keys, values = mx.concatenate([self._open[0], keys], axis=2), mx.concatenate([self._open[1], values], axis=2)
        whole = keys.shape[2] // by.chunk_bytes * by.chunk_bytes
        if whole:
            self._chunks.append(by.of_chunks(keys[:, :, :whole], values[:, :, :whole]))
        left = keys.shape[2] - whole
        # A view would hold all that it is of.
        self._open = (mx.contiguous(keys[:, :, whole:]), mx.contiguous(values[:, :, whole:])) if left else None

    def keep(self, streams: mx.array) -> None:
        """Keep these members of the batch."""
        self._rows.keep(streams)
        self._chunks = [(keys[streams], values[streams]) for keys, values in self._chunks]
        self._open = None if self._open is None else (self._open[0][streams], self._open[1][streams])


def window_rows(network: EvaByte, streams: int, bits: CacheBits) -> MemoryRows:
    """What such a network remembers of so many texts that have no ids yet."""
    memory: Sequence[LayerWindow] = [LayerWindow(bits) for _ in network.layers]
    return MemoryRows(network, memory)
