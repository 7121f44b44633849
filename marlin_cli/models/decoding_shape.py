"""What decoding one stream of bytes is made of, by a network's shape: the arithmetic of costs and times asks no more."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CachedStack:
    """Layers that keep keys and values.

    Attributes:
        level: of the cache that their rows count as.
        row_bytes: bytes that a row stands for.
        sequence_rows: rows of a sequence, after which the next begins anew; None: the rows of the whole context are kept,
            in as few bits as `--kv-bits` says.
        window: rows back that attention sees; None: all. A finer stack without `sequence_rows` keeps so many of its own.
        kept: (rows of a context) -> those that are kept, and read, at its end; of the first stack alone.
        cycle: rows after which some of those that are kept are dropped; until then each adds one.
    """

    level: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    row_bytes: int = 1
    sequence_rows: int | None = None
    window: int | None = None
    kept: Callable[[int], int] = lambda rows: rows
    cycle: int = 1

    def most_kept(self, rows: int) -> int:
        """The most rows that are kept on the way through a context of so many."""
        return max(self.kept(rows), self.kept(rows // self.cycle * self.cycle))


# Rows by which the storage of most caches grows.
ROWS_PER_STEP = 256


def _each_byte(config: Any) -> Mapping[str, int]:
    return {}


@dataclass(frozen=True)
class DecodingShape:
    """See `models.architecture.Architecture.decoding`.

    Attributes:
        stacks: (config) -> the stacks that keep keys and values, coarse to fine; the first keeps the whole context.
        part_bytes: (config) -> bytes from one pass through a part of the network to the next; 1 where it is not named.
        layer_bytes: (path of a layer, config) -> the same of a linear layer.
        miniature: (config) -> a model with a little more context, which takes all the time that decoding takes beside products
            and attention to many rows: the same model, as narrow as its layout lets it be. None: the time of a byte is not
            predicted.
        by_operations: is it decoded an operation at a time, and not by kernels that take it whole? Then the miniature has its
            own widths, on which norms, activations and caches depend, and its products alone are made narrow.
        beside_bytes: (config) -> bytes in float32 that a stream may hold beside the rows of its first stack.
        open_bytes: (config) -> bytes in float32 that a stream holds on average beside the rows of all its stacks.
        stored_rows: (rows) -> those that there is storage for.
    """

    stacks: Callable[[Any], tuple[CachedStack, ...]]
    part_bytes: Callable[[Any], Mapping[str, int]] = _each_byte
    layer_bytes: Callable[[str, Any], int] = lambda path, config: 1
    miniature: Callable[[Any], Any] | None = None
    by_operations: bool = False
    beside_bytes: Callable[[Any], int] = lambda config: 0
    open_bytes: Callable[[Any], int] = lambda config: 0
    stored_rows: Callable[[int], int] = lambda rows: -(-rows // ROWS_PER_STEP) * ROWS_PER_STEP
