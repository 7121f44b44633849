"""What layers remember while decoding: keys and values, plain or packed, and the rows that a token shift delays."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from marlin_cli.engine.endless import Window
from marlin_cli.engine.states import Part
from marlin_cli.errors import UsageError
from marlin_cli.ops import attention, delay_one_row, paged_attention
from marlin_cli.ops.reference import PACKED_MODES, KeyValueRows, Packed, pack_rows

# Rows by which storage grows. Growing copies, so it must be rare; unused rows are waste, so it must be small.
ROWS_PER_STEP = 256

# Rows of a page of a packed cache: whole pages are taken, so a stream wastes half of one.
ROWS_PER_PAGE = 128


@dataclass(frozen=True)
class CacheBits:
    """How a cache holds keys and values; of a MegaByte the global one, as its local cache is a patch long.

    Raises:
        UsageError: a share that is none.
    """

    keys: int = 16  # bits
    values: int = 16
    window: Window | None = None  # how streams go on beyond the model's context; None: they end there
    share_left: float | None = None  # of a softmax, what pages that are not read may have at most; None: all are read

    def __post_init__(self) -> None:
        if self.share_left is not None and not 0 <= self.share_left < 1:
            raise UsageError(f"--sparse must be 0 or more and less than 1, found {self.share_left}")

    @property
    def is_packed(self) -> bool:
        """Are keys or values packed?"""
        return min(self.keys, self.values) < 16


class Rows:
    """An array [batch, heads, rows, width] that grows along its rows."""

    def __init__(self, rows_per_step: int) -> None:
        self._rows_per_step = rows_per_step
        self._storage: mx.array | None = None
        self.count = 0

    @classmethod
    def of(cls, page: mx.array) -> "Rows":
        """The rows of a page that is full."""
        found = cls(page.shape[2])
        found._storage, found.count = page, page.shape[2]
        return found

    def append(self, new: mx.array) -> mx.array:
        """Add rows and return all rows so far."""
        batch, heads, added, width = new.shape
        total = self.count + added
        storage = self._with_room((batch, heads, added, width), new.dtype)
        storage[:, :, self.count : total] = new
        self.count = total
        return self.rows

    @property
    def rows(self) -> mx.array:
        """All rows so far, of which there are some."""
        assert self._storage is not None
        return self._storage[:, :, : self.count]

    @property
    def all(self) -> mx.array:
        """The rows so far, one at least."""
        assert self._storage is not None
        return self._storage[:, :, : self.count]

    def with_room(self) -> mx.array:
        """All storage, with room for a row or more behind those that are there."""
        assert self._storage is not None
        batch, heads, _, width = self._storage.shape
        return self._with_room((batch, heads, 1, width), self._storage.dtype)

    def emptied(self) -> "Rows":
        """As many rows of storage as here, none of which is in use."""
        assert self._storage is not None
        made = Rows(self._rows_per_step)
        made._storage = mx.zeros_like(self._storage)
        return made

    def _with_room(self, new: tuple[int, int, int, int], dtype: mx.Dtype) -> mx.array:
        batch, heads, added, width = new
        total = self.count + added
        if self._storage is None or total > self._storage.shape[2]:
            capacity = -(-total // self._rows_per_step) * self._rows_per_step
            room = mx.zeros((batch, heads, capacity - self.count, width), dtype=dtype)
            kept = [] if self._storage is None else [self._storage[:, :, : self.count]]
            self._storage = mx.concatenate([*kept, room], axis=2)
        return self._storage

    def forget(self, rows: int) -> None:
        """Let go of the last rows; others will be written in their place."""
        self.count -= rows

    def keep(self, streams: mx.array) -> None:
        """Keep these members of the batch."""
        if self._storage is not None:
            self._storage = self._storage[streams]

    def join(self, other: "Rows") -> None:
        """Take in the members of another batch behind these. All end with the same row: the shorter begin with filler."""
        if self._storage is None or other._storage is None:
            return
        count = max(self.count, other.count)
        capacity = -(-count // self._rows_per_step) * self._rows_per_step
        self._storage = mx.concatenate([
            mx.pad(each._storage[:, :, : each.count], [(0, 0), (0, 0), (count - each.count, capacity - count), (0, 0)])
            for each in (self, other) if each._storage is not None
        ])  # fmt: skip
        self.count = count

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        if self._storage is None:
            return 0
        return self._storage.nbytes * self.count // self._storage.shape[2]


class KeyValueCache:
    """Keys and values of one layer in the network's own type; a `marlin_cli.models.megabyte_layers.LayerCache`.

    Args:
        left_padding: [batch] filler rows at the start of each sequence; None for none.
        rows_per_step: rows by which the storage grows.
    """

    def __init__(self, left_padding: mx.array | None = None, rows_per_step: int = ROWS_PER_STEP) -> None:
        self._left_padding = left_padding
        self._keys, self._values = Rows(rows_per_step), Rows(rows_per_step)
        self._delayed: dict[int, mx.array] = {}
        self._delayed_rows: dict[int, int] = {}

    @property
    def rows(self) -> int:
        """Rows held, filler included."""
        return self._keys.count

    @property
    def offset(self) -> int | mx.array:
        return self.rows if self._left_padding is None else self.rows - self._left_padding

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use, delayed rows included."""
        return self._keys.nbytes + self._values.nbytes + sum(row.nbytes for row in self._delayed.values())

    def with_room(self) -> tuple[mx.array, mx.array]:
        """The storage of keys and values, with room for a row or more; whoever writes rows in place says so to `wrote`."""
        return self._keys.with_room(), self._values.with_room()

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Add rows [batch, kv_heads, n, head_dim]."""
        self._keys.append(keys)
        self._values.append(values)

    def wrote(self, rows: int) -> None:
        """Count rows that have been written in place."""
        self._keys.count += rows
        self._values.count += rows

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None) -> mx.array:
        everything = self._keys.append(keys), self._values.append(values)
        return attention(queries, *everything, scale, window=window, left_padding=self._left_padding)

    def delay(self, slot: int, rows: mx.array) -> mx.array:
        seen = self._delayed_rows.get(slot, 0)
        if self._left_padding is not None:
            real = mx.arange(seen, seen + rows.shape[1]) >= self._left_padding[:, None]
            rows = mx.where(real[..., None], rows, 0)  # the first real row must follow zeros, not filler
        delayed = delay_one_row(rows, self._delayed.get(slot))
        self._delayed[slot] = rows[:, -1:]
        self._delayed_rows[slot] = seen + rows.shape[1]
        return delayed

    def stored(self) -> tuple[Part, Part]:
        """The rows in use, as `restore` takes them: keys, and values."""
        return [self._keys.all], [self._values.all]

    def restore(self, parts: tuple[Part, Part]) -> None:
        """Take rows as `stored` gives them, in place of none. They are copied."""
        self.append(parts[0][0], parts[1][0])

    @property
    def delayed(self) -> mx.array | None:
        """The last row that each slot has seen: [slots, batch, 1, channels]; None for no shift of tokens."""
        return mx.stack([self._delayed[slot] for slot in sorted(self._delayed)]) if self._delayed else None

    def delay_on(self, delayed: mx.array, rows: int) -> None:
        """Go on where `delayed` is the last of so many rows."""
        self._delayed = dict(enumerate(delayed))
        self._delayed_rows = dict.fromkeys(self._delayed, rows)

    def keep(self, streams: mx.array) -> None:
        """Keep these members of the batch."""
        if self._left_padding is not None:
            self._left_padding = self._left_padding[streams]
        self._delayed = {slot: row[streams] for slot, row in self._delayed.items()}
        self._keys.keep(streams)
        self._values.keep(streams)

    def join(self, other: "KeyValueCache", streams: tuple[int, int]) -> None:
        """Take in the members of another batch behind these; the shorter ones have more filler.

        Args:
            streams: members of this batch and of the other.
        """
        rows = max(self.rows, other.rows)
        padding = [
            mx.zeros((count,), dtype=mx.int32) if each._left_padding is None else each._left_padding
            for each, count in zip((self, other), streams, strict=True)
        ]
        if self.rows != other.rows or self._left_padding is not None or other._left_padding is not None:
            self._left_padding = mx.concatenate([padding[0] + (rows - self.rows), padding[1] + (rows - other.rows)])
        self._delayed = {slot: mx.concatenate([row, other._delayed[slot]]) for slot, row in self._delayed.items()}
        self._delayed_rows = dict.fromkeys(self._delayed_rows, rows)
        self._join_rows(other)

    def _join_rows(self, other: Any) -> None:
        self._keys.join(other._keys)
        self._values.join(other._values)


class Pages:
    """Keys or values [batch, heads, rows, head_dim] in pages of fixed size: what stands there is never copied or packed again.

    Args:
        bits: 16 keeps the rows as they come; 8 and 4 pack them (mxfp8, nvfp4).
    """

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._full: list[KeyValueRows] = []
        self._open: list[Rows] = []  # of the page that is being filled: rows, or words and scales

    def append(self, new: mx.array) -> list[KeyValueRows]:
        """Add rows, and return the pages of all rows so far."""
        return self.add([new] if self._bits == 16 else pack_rows(new, self._bits)[:2])

    def add(self, parts: Part) -> list[KeyValueRows]:
        """Add rows as they are stored: themselves, or words and scales; the pages of all rows so far."""
        while parts[0].shape[2]:
            if not self._open or self._open[0].count == ROWS_PER_PAGE:
                self._open = [Rows(ROWS_PER_PAGE) for _ in parts]
            room = ROWS_PER_PAGE - self._open[0].count
            # Rows that fill a page would stay a view into the whole prompt, which every kernel would copy at every step.
            for rows, part in zip(self._open, parts, strict=True):
                rows.append(mx.contiguous(part[:, :, :room]))
            parts = [part[:, :, room:] for part in parts]
            if self._open[0].count == ROWS_PER_PAGE:
                self._full.append(self._page)
        return self.pages

    @property
    def pages(self) -> list[KeyValueRows]:
        """The pages of all rows so far."""
        return [*self._full, self._page] if self._is_open else self._full

    @property
    def _is_open(self) -> bool:
        """Are there rows in a page that is not full?"""
        return bool(self._open) and 0 < self._open[0].count < ROWS_PER_PAGE

    def with_room(self) -> list[Part]:
        """The storage of each page, with room for a row or more in the last; there are rows. Who writes says so to `wrote`."""
        if self._open[0].count == ROWS_PER_PAGE:
            self._open = [rows.emptied() for rows in self._open]
        full = [[page.packed, page.scales] if isinstance(page, Packed) else [page] for page in self._full]
        return [*full, [rows.with_room() for rows in self._open]]

    def wrote(self, rows: int) -> None:
        """Count rows that have been written in place in the last page; fewer than none are forgotten."""
        if rows < 0 and self._open[0].count == ROWS_PER_PAGE:
            self._full.pop()
        for each in self._open:
            each.count += rows
        if rows > 0 and self._open[0].count == ROWS_PER_PAGE:
            self._full.append(self._page)

    def forget(self, rows: int) -> None:
        """Let go of the last rows; a page that was full is open again."""
        while rows:
            if not self._open or self._open[0].count == ROWS_PER_PAGE:
                page = self._full.pop()
                self._open = [Rows.of(each) for each in ([page.packed, page.scales] if isinstance(page, Packed) else [page])]
            taken = min(rows, self._open[0].count)
            for each in self._open:
                each.forget(taken)
            rows -= taken
            if self._open[0].count == 0:
                self._open = []

    def drop(self, sinks: int, first: int) -> int:
        """Let go of the whole pages between the first `sinks` rows and row `first`: how many rows fewer there are."""
        between = slice(-(-sinks // ROWS_PER_PAGE), max(-(-sinks // ROWS_PER_PAGE), first // ROWS_PER_PAGE))
        dropped = len(self._full[between])
        del self._full[between]
        return dropped * ROWS_PER_PAGE

    @property
    def _page(self) -> KeyValueRows:
        """The page that is being filled, or that is full now."""
        rows = [each.rows for each in self._open]
        return rows[0] if self._bits == 16 else Packed(rows[0], rows[1], self._bits)

    def keep(self, streams: mx.array) -> None:
        """Keep these members of the batch."""
        self._full = [
            Packed(page.packed[streams], page.scales[streams], page.bits) if isinstance(page, Packed) else page[streams]
            for page in self._full
        ]
        for rows in self._open:
            rows.keep(streams)

    def join(self, other: "Pages") -> None:
        """Take in the members of another batch behind these; see `Rows.join`. What is packed is not packed again."""
        everything = [pages.stored() for pages in (self, other)]
        if not all(everything):
            return
        count = max(parts[0].shape[2] for parts in everything)
        filled = [
            [mx.pad(part, [(0, 0), (0, 0), (count - part.shape[2], 0), (0, 0)]) for part in parts] for parts in everything
        ]
        together = [mx.concatenate(list(parts)) for parts in zip(*filled, strict=True)]
        self._full, self._open = [], []
        for first in range(0, count, ROWS_PER_PAGE):
            self._open = [Rows(ROWS_PER_PAGE) for _ in together]
            arrays = [
                rows.append(mx.contiguous(part[:, :, first : first + ROWS_PER_PAGE]))
                for rows, part in zip(self._open, together, strict=True)
            ]
            if self._open[0].count == ROWS_PER_PAGE:
                self._full.append(arrays[0] if self._bits == 16 else Packed(arrays[0], arrays[1], self._bits))

    def stored(self) -> list[mx.array]:
        """All rows, or all words and all scales; nothing if there are none."""
        full = [[page.packed, page.scales] if isinstance(page, Packed) else [page] for page in self._full]
        if self._is_open:
            full.append([rows.all for rows in self._open])
        return [mx.concatenate(list(parts), axis=2) for parts in zip(*full, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        full = sum(page.packed.nbytes + page.scales.nbytes if isinstance(page, Packed) else page.nbytes for page in self._full)
        return full + sum(rows.nbytes for rows in self._open if self._is_open)


class PackedKeyValueCache(KeyValueCache):
    """Keys and values of one layer in 4 bits (nvfp4) or 8 (mxfp8), in pages, packed as they come.

    Keys and queries are rotated by a Hadamard matrix per head, which leaves their inner products as they are and
    spreads the few large channels of a key over all (plain 4-bit keys ruin some models).
    """

    def __init__(self, key_bits: int, value_bits: int, left_padding: mx.array | None = None) -> None:
        super().__init__(left_padding)
        self._pages = (Pages(key_bits), Pages(value_bits))
        self._rows = 0

    @property
    def rows(self) -> int:
        return self._rows

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(pages.nbytes for pages in self._pages)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None) -> mx.array:
        self._rows += keys.shape[2]
        return paged_attention(
            mx.hadamard_transform(queries),
            self._pages[0].append(mx.hadamard_transform(keys)),
            self._pages[1].append(values),
            scale,
            window=window,
            left_padding=self._left_padding,
        )

    def pages_with_room(self) -> list[tuple[Part, Part]]:
        """The storage of keys and values by page, with room for a row or more in the last; see `wrote`."""
        return list(zip(*(pages.with_room() for pages in self._pages), strict=True))

    def wrote(self, rows: int) -> None:
        self._rows += rows
        for pages in self._pages:
            pages.wrote(rows)

    def stored(self) -> tuple[Part, Part]:
        return self._pages[0].stored(), self._pages[1].stored()

    def restore(self, parts: tuple[Part, Part]) -> None:
        self._rows += parts[0][0].shape[2]
        for pages, part in zip(self._pages, parts, strict=True):
            pages.add(part)

    def keep(self, streams: mx.array) -> None:
        super().keep(streams)
        for pages in self._pages:
            pages.keep(streams)

    def _join_rows(self, other: Any) -> None:
        self._rows = max(self._rows, other._rows)
        for pages, others in zip(self._pages, other._pages, strict=True):
            pages.join(others)


def check_cache_bits(key_bits: int, value_bits: int, head_dim: int) -> None:
    """Refuse bit widths that keys and values of this width cannot be packed in.

    Raises:
        UsageError: bits other than 4, 8 and 16, or a head_dim that is not a multiple of the format's group or
            that has no Hadamard matrix.
    """
    for bits in (key_bits, value_bits):
        if bits != 16 and bits not in PACKED_MODES:
            raise UsageError(f"--kv-bits must be 4, 8 or 16, found {bits}")
        if bits in PACKED_MODES:
            mode, group_size = PACKED_MODES[bits]
            if head_dim % group_size:
                raise UsageError(
                    f"--kv-bits {bits}: {mode} packs groups of {group_size}, which do not fit a head_dim of"
                    f" {head_dim}; use --kv-bits 16"
                )
    odd = head_dim
    while odd % 2 == 0:
        odd //= 2
    if min(key_bits, value_bits) < 16 and odd not in (1, 3, 5, 7):
        raise UsageError(f"--kv-bits: a head_dim of {head_dim} has no Hadamard rotation; use --kv-bits 16")
