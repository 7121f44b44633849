"""What ranks hold of a model and how fast they decode with it, on paper: streams on each, or a model that all share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from marlin_cli.errors import UsageError
from marlin_cli.models import ARCHITECTURES, Share, decoding_of
from marlin_cli.prediction.arithmetic import Costs
from marlin_cli.prediction.sizes import part_of_weight
from marlin_cli.text import quoted

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Link:
    """How long a sum over two ranks takes; over more a ring has each rank wait for all others in turn, a tree for its depth."""

    seconds: float  # of a sum of nothing
    bytes_per_second: float
    tree: bool = False

    def sum_seconds(self, nbytes: float, ranks: int) -> float:
        """Seconds of one sum over so many ranks."""
        turns = math.log2(ranks) if self.tree else ranks - 1
        return self.seconds * turns + 2 * (ranks - 1) / ranks * nbytes / self.bytes_per_second


def parse_link(text: str) -> Link:
    """`US,GB/S`, and `,tree` behind them where ranks do not sum in a ring, as an option gives it.

    Raises:
        UsageError: not two numbers above 0.
    """
    numbers, tree = text.removesuffix(",tree"), text.endswith(",tree")
    try:
        microseconds, gigabytes = map(float, numbers.split(","))
    except ValueError:
        expected = "expected microseconds and GB/s of a sum over two ranks, such as 300,1 or 2,100,tree"
        raise UsageError(f"--link {quoted(text)}: {expected}") from None
    if not (0 < microseconds < math.inf and 0 < gigabytes < math.inf):
        raise UsageError(f"--link {quoted(text)}: both numbers must be above 0")
    return Link(microseconds / 1e6, gigabytes * 1e9, tree)


@dataclass(frozen=True)
class RanksPlan:
    """One way to use ranks, at one context.

    Attributes:
        memory_bytes: of weights, and of the caches of one stream, a rank.
        seconds_per_byte: of a stream.
        bytes_per_second: of all ranks: where each has the model, with a stream on each, else of one stream.
    """

    memory_bytes: float
    seconds_per_byte: float
    bytes_per_second: float


def by_streams(costs: Costs, weight_bytes: Mapping[str, float], seconds: Mapping[str, float], ranks: int) -> RanksPlan:
    """Each rank has the model.

    Args:
        weight_bytes: by part, embeddings among them.
        seconds: a byte takes, by part and level of the cache.
    """
    taken = sum(seconds.values())
    return RanksPlan(sum(weight_bytes.values()) + sum(costs.cache_bytes.values()), taken, ranks / taken)


def by_split(
    costs: Costs, weight_bytes: Mapping[str, float], seconds: Mapping[str, float], held: "Held", config: Any, link: Link
) -> RanksPlan:
    """The ranks share the global part; see `by_streams` for the arguments."""
    stack = decoding_of(config).stacks(config)[0]
    weights = {part: size * (held.weights if part == held.part else 1) for part, size in weight_bytes.items()}
    caches = {level: size * (held.cache if level == stack.level else 1) for level, size in costs.cache_bytes.items()}
    shares = {held.part: held.weights, f"{stack.level} cache": held.cache}
    sums = 2 * stack.layers
    waiting = sums * link.sum_seconds(config.global_dim * FLOAT_BYTES, held.ranks) / stack.row_bytes
    taken = sum(value * shares.get(name, 1) for name, value in seconds.items()) + waiting
    return RanksPlan(sum(weights.values()) + sum(caches.values()), taken, 1 / taken)


@dataclass(frozen=True)
class Held:
    """What a rank holds of a model that ranks share.

    Attributes:
        part: that is shared.
        weights: share of the part's weights.
        cache: share of its keys and values.
    """

    ranks: int
    part: str
    weights: float
    cache: float


def held_by_one(config: Any, weights: Mapping[str, mx.array], ranks: int, where: str) -> Held:
    """What one of so many ranks holds.

    Raises:
        UsageError: so many cannot share it.
    """
    split = ARCHITECTURES[config.model_type].split
    assert split is not None
    cuts = Share(split, 0, ranks, None).cuts(config, weights, where)
    of_part = {path: array for path, array in weights.items() if part_of_weight(path) == split.part}
    whole = sum(array.size for array in of_part.values())
    held = sum(math.prod(_length(cuts.get(path, ()), axis, size) for axis, size in enumerate(array.shape))
               for path, array in of_part.items())  # fmt: skip
    kv_heads = split.heads(config)[1]
    return Held(ranks, split.part, held / whole, max(1, kv_heads // ranks) / kv_heads)


def _length(cut: tuple[slice, ...], axis: int, size: int) -> int:
    return len(range(*cut[axis].indices(size))) if axis < len(cut) else size
