"""What a model that continues bytes costs, from its shape alone: attention, cache, bytes read a byte generated. Nothing is run.

Leading rows of the stages are left out, as in the formulas that people know: (T/P)^2 + T x P against T^2.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from marlin_cli.errors import UsageError
from marlin_cli.models import decoding_of

# Bits of a number as it is kept, its share of the scale included: float32, 16-bit floats, mxfp8 and nvfp4.
STORED_BITS = {32: 32.0, 16: 16.0, 8: 8.25, 4: 4.5}


@dataclass(frozen=True)
class Costs:
    """Of one byte generated at the end of a context, by part; what runs once in a patch counts by its share."""

    context_bytes: int
    attention_pairs: int  # of a query and a key, over the whole context, causality left out
    flat_attention_pairs: int  # of a transformer whose tokens are bytes
    cache_bytes: dict[str, float]  # by level; of a MegaByte global, and local: all finer stages
    flat_cache_bytes: float  # 16-bit keys and values of the first stack's layers and heads, a row a byte
    read_bytes: dict[str, float]  # a byte generated: weights of each part, and each level of the cache

    @property
    def read_bytes_total(self) -> float:
        """Bytes that must be read for each byte generated."""
        return sum(self.read_bytes.values())

    def seconds_per_byte(self, bytes_per_second: float) -> float:
        """Time of a byte generated where reading memory is all that takes time."""
        return self.read_bytes_total / bytes_per_second


def attention_pairs(config: Any, context_bytes: int) -> int:
    """Pairs of rows over all stages: of a MegaByte with patches of P among T bytes, (T/P)^2 + (T/P) x P^2."""
    first, *finer = decoding_of(config).stacks(config)
    rows = math.ceil(context_bytes / first.row_bytes)
    total, sequences = rows * first.kept(rows), rows
    for stack in finer:
        if stack.sequence_rows is None:  # a window of a stack beside the first
            length = math.ceil(context_bytes / stack.row_bytes)
            total += length * min(length, stack.window or length)
            continue
        total += sequences * stack.sequence_rows**2
        sequences *= stack.sequence_rows
    return total


def cache_bytes(layers: int, heads: int, rows: int, head_dim: int, bits: int = 16) -> float:
    """Keys and values of one stack of layers.

    Raises:
        UsageError: bits that no cache has.
    """
    return 2 * layers * heads * rows * head_dim * stored_bits(bits) / 8


def stored_bits(bits: int) -> float:
    """Bits of a number and its share of the scale.

    Raises:
        UsageError: a width that is not known.
    """
    if bits not in STORED_BITS:
        raise UsageError(f"{bits} bits: known are {', '.join(map(str, sorted(STORED_BITS)))}")
    return STORED_BITS[bits]


def costs_of(
    config: Any, weight_bytes: Mapping[str, float], context_bytes: int, cache_bits: int = 16, local_bits: int = 16
) -> Costs:
    """The costs at a context.

    Args:
        weight_bytes: by part, as `sizes.bytes_by_part` has it; embeddings are looked up, a row a byte, and not counted.
        cache_bits: of the keys and values of the whole context.
        local_bits: of those of finer stages, which are never packed: 16, or 32 where activations are float32.

    Raises:
        UsageError: a context beyond the model's, bits that no cache has, or an architecture whose arithmetic is not known.
    """
    if not 1 <= context_bytes <= config.max_bytes:
        raise UsageError(f"--context {context_bytes}: the model's context is 1 to {config.max_bytes} bytes")
    decoding = decoding_of(config)
    stacks = decoding.stacks(config)
    first = stacks[0]
    rows = first.kept(math.ceil(context_bytes / first.row_bytes))
    seen = rows if first.window is None else min(rows, first.window)
    caches = dict.fromkeys((stack.level for stack in stacks), 0.0)
    caches[first.level] = cache_bytes(first.layers, first.kv_heads, rows, first.head_dim, cache_bits)
    # A row of a sequence reads the rows before it: half of them on the way through. Of a window it reads all.
    seen_of = dict.fromkeys(caches, 0.0)
    for stack in stacks[1:]:
        rows_of = stack.sequence_rows or min(math.ceil(context_bytes / stack.row_bytes), stack.window or context_bytes)
        size = cache_bytes(stack.layers, stack.kv_heads, rows_of, stack.head_dim, local_bits)
        caches[stack.level] += size
        seen_of[stack.level] += size / (1 if stack.sequence_rows is None else 2)
    every = decoding.part_bytes(config)
    read: dict[str, float] = {part: size / every.get(part, 1) for part, size in weight_bytes.items() if part != "embeddings"}
    read |= {f"{level} cache": size for level, size in seen_of.items()}
    read[f"{first.level} cache"] = caches[first.level] * seen / rows / first.row_bytes
    return Costs(
        context_bytes=context_bytes,
        attention_pairs=attention_pairs(config, context_bytes),
        flat_attention_pairs=context_bytes**2,
        cache_bytes=caches,
        flat_cache_bytes=cache_bytes(first.layers, first.kv_heads, context_bytes, first.head_dim),
        read_bytes=read,
    )
