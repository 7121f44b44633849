"""What a MegaByte costs, from its shape alone: attention, cache, bytes read a byte generated. Nothing is run or measured.

Leading rows of the stages are left out, as in the formulas that people know: (T/P)^2 + T x P against T^2.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from marlin_cli.errors import UsageError
from marlin_cli.models.megabyte_config import MegaByteConfig

# Bits of a number as it is kept, its share of the scale included: float32, 16-bit floats, mxfp8 and nvfp4.
STORED_BITS = {32: 32.0, 16: 16.0, 8: 8.25, 4: 4.5}


@dataclass(frozen=True)
class Costs:
    """Of one byte generated at the end of a context, by part; the global model runs once in a patch."""

    context_bytes: int
    attention_pairs: int  # of a query and a key, over the whole context, causality left out
    flat_attention_pairs: int  # of a transformer whose tokens are bytes
    cache_bytes: dict[str, float]  # global, and local: all finer stages
    flat_cache_bytes: float  # 16-bit keys and values of the global model's layers and heads, a row a byte
    read_bytes: dict[str, float]  # a byte generated: weights of each part, and each level of the cache

    @property
    def read_bytes_total(self) -> float:
        """Bytes that must be read for each byte generated."""
        return sum(self.read_bytes.values())

    def seconds_per_byte(self, bytes_per_second: float) -> float:
        """Time of a byte generated where reading memory is all that takes time."""
        return self.read_bytes_total / bytes_per_second


def attention_pairs(config: MegaByteConfig, context_bytes: int) -> int:
    """Pairs of rows over all stages: with patches of P among T bytes, (T/P)^2 + (T/P) x P^2."""
    patches = math.ceil(context_bytes / config.patch_size)
    total, sequences = patches**2, patches
    for stage in config.stages[1:]:
        total += sequences * stage.length**2
        sequences *= stage.length
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
    config: MegaByteConfig, weight_bytes: Mapping[str, float], context_bytes: int, cache_bits: int = 16, local_bits: int = 16
) -> Costs:
    """The costs at a context.

    Args:
        weight_bytes: by part, as `sizes.bytes_by_part` has it; embeddings are looked up, a row a byte, and not counted.
        cache_bits: of the global keys and values.
        local_bits: of those of the finer stages, which are never packed: 16, or 32 where activations are float32.

    Raises:
        UsageError: a context beyond the model's, or bits that no cache has.
    """
    if not 1 <= context_bytes <= config.max_bytes:
        raise UsageError(f"--context {context_bytes}: the model's context is 1 to {config.max_bytes} bytes")
    first, *finer = config.stages
    patches = math.ceil(context_bytes / config.patch_size)
    seen = patches if config.attention_window is None else min(patches, config.attention_window)
    heads = first.kv_heads or first.heads
    caches = {
        "global": cache_bytes(first.layers, heads, patches, first.width_of_head, cache_bits),
        "local": sum(
            cache_bytes(stage.layers, stage.kv_heads or stage.heads, stage.length, stage.width_of_head, local_bits)
            for stage in finer
        ),
    }
    # A row of a sequence reads the rows before it: half of them on the way through.
    read: dict[str, float] = {part: size for part, size in weight_bytes.items() if part != "embeddings"}
    read["global"] = read.get("global", 0.0) / config.patch_size
    if "middle" in read:  # of several stages in the middle, all as often as the finest: a bound
        read["middle"] /= config.stages[-1].length
    read["global cache"] = caches["global"] * seen / patches / config.patch_size
    read["local cache"] = caches["local"] / 2
    return Costs(
        context_bytes=context_bytes,
        attention_pairs=attention_pairs(config, context_bytes),
        flat_attention_pairs=context_bytes**2,
        cache_bytes=caches,
        flat_cache_bytes=cache_bytes(first.layers, heads, context_bytes, first.width_of_head),
        read_bytes=read,
    )
