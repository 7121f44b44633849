"""What layers remember while decoding: keys and values, plain or packed, and the rows that a token shift delays."""

from collections.abc import Sequence

import mlx.core as mx

from marlin_cli.errors import UsageError
from marlin_cli.ops import attention, delay_one_row

# Rows by which storage grows. Growing copies, so it must be rare; unused rows are waste, so it must be small.
ROWS_PER_STEP = 256

# MLX's formats for a packed cache, by bits.
PACKED_MODES = {4: ("nvfp4", 16), 8: ("mxfp8", 32)}


class Rows:
    """An array [batch, heads, rows, width] that grows along its rows."""

    def __init__(self, rows_per_step: int) -> None:
        self._rows_per_step = rows_per_step
        self._storage: mx.array | None = None
        self.count = 0

    def append(self, new: mx.array) -> mx.array:
        """Add rows and return all rows so far."""
        batch, heads, added, width = new.shape
        total = self.count + added
        if self._storage is None or total > self._storage.shape[2]:
            capacity = -(-total // self._rows_per_step) * self._rows_per_step
            room = mx.zeros((batch, heads, capacity - self.count, width), dtype=new.dtype)
            kept = [] if self._storage is None else [self._storage[:, :, : self.count]]
            self._storage = mx.concatenate([*kept, room], axis=2)
        self._storage[:, :, self.count : total] = new
        self.count = total
        return self._storage[:, :, :total]

    def keep(self, streams: mx.array) -> None:
        """Keep these members of the batch."""
        if self._storage is not None:
            self._storage = self._storage[streams]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        if self._storage is None:
            return 0
        return self._storage.nbytes * self.count // self._storage.shape[2]


class KeyValueCache:
    """Keys and values of one layer in the network's own type; a `marlin_cli.models.megabyte.LayerCache`.

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

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None) -> mx.array:
        return self._attention(queries, self._keys.append(keys), self._values.append(values), scale, window)

    def delay(self, slot: int, rows: mx.array) -> mx.array:
        seen = self._delayed_rows.get(slot, 0)
        if self._left_padding is not None:
            real = mx.arange(seen, seen + rows.shape[1]) >= self._left_padding[:, None]
            rows = mx.where(real[..., None], rows, 0)  # the first real row must follow zeros, not filler
        delayed = delay_one_row(rows, self._delayed.get(slot))
        self._delayed[slot] = rows[:, -1:]
        self._delayed_rows[slot] = seen + rows.shape[1]
        return delayed

    def keep(self, streams: mx.array) -> None:
        """Keep these members of the batch."""
        if self._left_padding is not None:
            self._left_padding = self._left_padding[streams]
        self._delayed = {slot: row[streams] for slot, row in self._delayed.items()}
        for part in self._parts():
            part.keep(streams)

    def _parts(self) -> Sequence[Rows]:
        return (self._keys, self._values)

    def _attention(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None) -> mx.array:
        return attention(queries, keys, values, scale, window=window, left_padding=self._left_padding)


class PackedKeyValueCache(KeyValueCache):
    """Keys and values of one layer in 4 bits (nvfp4) or 8 (mxfp8), packed as they come.

    Keys and queries are rotated by a Hadamard matrix per head, which leaves their inner products as they are and
    spreads the few large channels of a key over all (plain 4-bit keys ruin some models).
    """

    def __init__(self, key_bits: int, value_bits: int, left_padding: mx.array | None = None) -> None:
        super().__init__(left_padding)
        self._bits = (key_bits, value_bits)
        self._scales = (Rows(ROWS_PER_STEP), Rows(ROWS_PER_STEP))

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(part.nbytes for part in self._scales)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None) -> mx.array:
        keys = self._append(0, mx.hadamard_transform(keys))
        values = self._append(1, values)
        return self._attention(mx.hadamard_transform(queries), keys, values, scale, window)

    def _append(self, which: int, new: mx.array) -> mx.array:
        storage = (self._keys, self._values)[which]
        if self._bits[which] == 16:
            return storage.append(new)
        mode, group_size = PACKED_MODES[self._bits[which]]
        packed, scales, *_ = mx.quantize(new, group_size=group_size, mode=mode)
        return mx.dequantize(
            storage.append(packed), self._scales[which].append(scales),
            group_size=group_size, mode=mode, dtype=new.dtype,
        )  # fmt: skip

    def _parts(self) -> Sequence[Rows]:
        return (self._keys, self._values, *(part for part in self._scales if part.count))


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
