"""What the layers of Block-Recurrent Transformers remember of a batch: of one size, however long its texts are."""

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class OpenStates:
    """States of the open block."""

    vectors: mx.array  # [n, vectors, d_model]
    normed: mx.array  # the same, as layers read them
    keys: mx.array  # [n, kv_heads, vectors, head_dim]
    values: mx.array

    def keep(self, streams: mx.array) -> "OpenStates":
        """Those of these members of the batch."""
        return OpenStates(self.vectors[streams], self.normed[streams], self.keys[streams], self.values[streams])


class LayerMemory:
    """What a layer of lucidrains' equations remembers: keys and values of the open block and of the one before, and its states.

    Attributes:
        rows: bytes of the open block so far.
        vectors: states [n, vectors, d_model] that the open block finds; None until a block has written some.
        states: the same, as the open block reads them; None until it does.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.vectors: mx.array | None = None
        self.states: OpenStates | None = None
        # Of the open block as they come, which states read; and of both blocks as they are attended to.
        self._raw: mx.array | None = None
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    @property
    def raw_keys(self) -> mx.array:
        """The keys [n, 1, rows, head_dim] of the open block, neither normed nor turned."""
        assert self._raw is not None
        return self._raw

    @property
    def block_values(self) -> mx.array:
        """The values of the open block."""
        assert self._values is not None
        return self._values[:, :, -self.rows :]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """All that is held."""
        held = [self._raw, self._keys, self._values, self.vectors]
        if self.states is not None:
            held += [self.states.normed, self.states.keys, self.states.values]
        return [each for each in held if each is not None]

    def append(self, raw: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add rows to the open block: all keys and values that they see, or might if they were the last ones."""
        self.rows += raw.shape[2]
        self._raw, self._keys, self._values = (
            new if old is None else mx.concatenate([old, new], axis=2)
            for old, new in ((self._raw, raw), (self._keys, keys), (self._values, values))
        )
        return self._keys, self._values

    def close_block(self, keys: mx.array) -> None:
        """The open block is whole and becomes the one before, with these keys."""
        self._values, self._keys, self._raw, self.rows = mx.contiguous(self.block_values), keys, None, 0

    def keep(self, streams: mx.array) -> None:
        """Keep these members of the batch."""
        self._raw, self._keys, self._values, self.vectors = (
            None if each is None else each[streams] for each in (self._raw, self._keys, self._values, self.vectors)
        )
        if self.states is not None:
            self.states = self.states.keep(streams)


class WindowMemory:
    """What a layer of meliad's equations remembers: keys and values of the block before and of the open one, and its states.

    A text begins behind a block whose keys and values are zeros, which attention counts.

    Attributes:
        rows: bytes of the open block so far.
        vectors, states: as a `LayerMemory` has them.
        keys, values: [n, heads, block_bytes + rows, head_dim], empty before the first byte.
    """

    def __init__(self, block_bytes: int) -> None:
        self.rows = 0
        self.vectors: mx.array | None = None
        self.states: OpenStates | None = None
        self.keys = self.values = mx.zeros((0,))
        self._block_bytes = block_bytes

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """All that is held."""
        held = [self.keys, self.values, *([] if self.vectors is None else [self.vectors])]
        return held if self.states is None else [*held, self.states.normed, self.states.keys, self.states.values]

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Add rows [n, heads, rows, head_dim] to the open block."""
        if not self.keys.size:
            count, heads, _, head_dim = keys.shape
            self.keys = self.values = mx.zeros((count, heads, self._block_bytes, head_dim), keys.dtype)
        self.rows += keys.shape[2]
        self.keys = mx.concatenate([self.keys, keys], axis=2)
        self.values = mx.concatenate([self.values, values], axis=2)

    def close_block(self) -> None:
        """The open block is whole and becomes the one before."""
        self.keys, self.values = (mx.contiguous(each[:, :, -self.rows :]) for each in (self.keys, self.values))
        self.rows = 0

    def keep(self, streams: mx.array) -> None:
        """Keep these members of the batch."""
        if self.keys.size:
            self.keys, self.values = self.keys[streams], self.values[streams]
        self.vectors = None if self.vectors is None else self.vectors[streams]
        self.states = None if self.states is None else self.states.keep(streams)
