"""Cached decoding of networks whose memory does not grow, as blocks of bytes hand it on (Block-Recurrent Transformers)."""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from marlin_cli.engine.cache import CacheBits
from marlin_cli.errors import UsageError
from marlin_cli.models import Network

# Rows that are read at once: bounds what a layer has between two products.
ROWS_AT_ONCE = 2048


class Memory(Protocol):
    """What a layer remembers of a batch."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    @property
    def arrays(self) -> list[mx.array]:
        """All that is held."""

    def keep(self, streams: mx.array) -> None:
        """Keep these members of the batch."""


class BlockReader(Network, Protocol):
    """A network that takes a byte at a step, and knows itself what its layers remember."""

    def led(self, ids: mx.array) -> mx.array:
        """What it reads of ids [n, total] of texts from their beginning: with whatever comes before them."""

    def new_memory(self) -> Sequence[Memory]:
        """What the layers remember of texts of which nothing has been read."""

    def decode(self, ids: mx.array, memory: Sequence[Memory]) -> mx.array:
        """Hidden rows [n, rows, width] of ids [n, rows], which follow those in the memory."""

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden rows as float32 logits [..., vocab]."""


class BlockRows:
    """What such a network remembers of a batch of texts; an `engine.byte_decoding.Rows`.

    Raises:
        UsageError: bits of keys and values, which do not grow and keep their own type.
    """

    def __init__(self, network: BlockReader, streams: int, bits: CacheBits) -> None:
        if bits != CacheBits():
            raise UsageError("--kv-bits: what this model remembers does not grow, and keeps its own type; leave it out")
        self._network, self._memory = network, network.new_memory()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(each.nbytes for each in self._memory)

    def read(self, ids: mx.array) -> mx.array:
        """Append ids [n, rows], one row at least: logits [n, vocab] of what follows."""
        step = max(1, ROWS_AT_ONCE // ids.shape[0])
        for start in range(0, ids.shape[1], step):
            hidden = self._network.decode(ids[:, start : start + step], self._memory)
            # What is remembered would else be a graph as long as the text.
            mx.eval(hidden, [each.arrays for each in self._memory])
        return self._network.head(hidden[:, -1])

    def keep(self, streams: Sequence[int]) -> None:
        """Keep these members of the batch, in this order."""
        for each in self._memory:
            each.keep(mx.array(list(streams)))
