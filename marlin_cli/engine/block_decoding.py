"""Cached decoding of networks whose memory does not grow, as blocks of bytes hand it on (Block-Recurrent Transformers)."""

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.patch_caches import ROWS_AT_ONCE
from marlin_cli.errors import UsageError
from marlin_cli.models import Network
from marlin_cli.models.block_recurrent import BlockRecurrent


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


class MemoryReader(Network, Protocol):
    """A network that takes a byte at a step."""

    def led(self, ids: mx.array) -> mx.array:
        """What it reads of ids [n, total] of texts from their beginning: with whatever comes before them."""

    def decode(self, ids: mx.array, memory: Any) -> mx.array:
        """Hidden rows [n, rows, width] of ids [n, rows], which follow those in the memory, one a layer."""

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden rows as float32 logits [..., vocab]."""


def block_rows(network: BlockRecurrent, streams: int, bits: CacheBits) -> "MemoryRows":
    """What a Block-Recurrent Transformer remembers of so many texts that have no ids yet.

    Raises:
        UsageError: bits of keys and values, which do not grow and keep their own type.
    """
    if bits != CacheBits():
        raise UsageError("--kv-bits: what this model remembers does not grow, and keeps its own type; leave it out")
    return MemoryRows(network, network.new_memory())


class MemoryRows:
    """What a network remembers of a batch of texts, a memory a layer; an `engine.byte_decoding.Rows`."""

    def __init__(self, network: MemoryReader, memory: Sequence[Memory]) -> None:
        self._network, self._memory = network, memory

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
