"""The memory that decoding a stream takes, from a model's shape: rows of caches as they are stored, and what is held beside."""

import math
from typing import Any

from marlin_cli.models import CachedStack, decoding_of
from marlin_cli.prediction.arithmetic import cache_bytes

FLOAT_BYTES = 4


def stream_bytes(config: Any, context_bytes: int, cache_bits: int = 16, float_bits: int = 16) -> float:
    """Bytes that one stream holds at the end of a context, on average over contexts about as long; weights are not among them.

    Args:
        cache_bits: of the keys and values of the whole context.
        float_bits: of those of finer stages, and of activations.
    """
    decoding = decoding_of(config)
    first, *finer = decoding.stacks(config)
    stored = decoding.stored_rows
    total = cache_bytes(
        first.layers, first.kv_heads, stored(first.kept(math.ceil(context_bytes / first.row_bytes))), first.head_dim, cache_bits
    )
    for stack in finer:
        rows = stored(_rows_held(stack, context_bytes))
        total += cache_bytes(stack.layers, stack.kv_heads, rows, stack.head_dim, float_bits)
    return total + decoding.open_bytes(config) * float_bits / (8 * FLOAT_BYTES)


def _rows_held(stack: CachedStack, context_bytes: int) -> int:
    """Rows of a finer stage: of a sequence all, of a window those since it was cut, when there were twice as many."""
    if stack.sequence_rows is not None:
        return stack.sequence_rows
    rows = math.ceil(context_bytes / stack.row_bytes)
    return rows if stack.window is None or rows < 2 * (stack.window + 1) else 3 * stack.window // 2
