"""A network over ranks: each holds some heads of every attention and some channels of every feed-forward of shared blocks.

What makes heads and channels (q_proj, k_proj, v_proj, gate_proj, up_proj) is cut by rows, what takes them back to the stream
(o_proj, down_proj) by columns, and its products are summed: two sums a block. All else is whole on every rank. Ranks that are
more than the heads of keys and values hold one of these together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import mlx.core as mx

from marlin_cli.errors import UsageError
from marlin_cli.models.architecture import Architecture, Network, Split
from marlin_cli.models.layers import set_modules
from marlin_cli.ops import Linear
from marlin_cli.ops.summed import summed
from marlin_cli.ranks import Ranks
from marlin_cli.text import with_article

# What of an array a rank holds, by axis.
Cut: TypeAlias = tuple[slice, ...]

MAKE_QUERIES, MAKE_KEYS = ("attention.q_proj",), ("attention.k_proj", "attention.v_proj")
MAKE_CHANNELS = ("ffn.gate_proj", "ffn.up_proj")
TAKE_BACK = ("attention.o_proj", "ffn.down_proj")


@dataclass(frozen=True)
class Share:
    """What one rank holds of a network.

    Attributes:
        ranks: that share it; None on paper.
    """

    split: Split
    rank: int
    size: int
    ranks: Ranks | None

    def cuts(self, config: Any, weights: Mapping[str, mx.array], where: str) -> dict[str, Cut]:
        """What this rank holds of those weights that it does not hold whole, by their names.

        Raises:
            UsageError: heads, channels or groups that so many ranks cannot share evenly; those that can are named.
        """
        self._check(config, weights, where)
        _, kv_heads = self.split.heads(config)
        parts = min(kv_heads, self.size)
        makes = dict.fromkeys((*MAKE_QUERIES, *MAKE_CHANNELS), (self.rank, self.size))
        makes |= dict.fromkeys(MAKE_KEYS, (self.rank * parts // self.size, parts))
        found: dict[str, Cut] = {}
        for block in self.split.blocks(config):
            for name, (part, of) in makes.items():
                for array in ("weight", "scales", "biases", "bias"):
                    path = f"{block}.{name}.{array}"
                    if path in weights and weights[path].ndim:
                        found[path] = (_share(weights[path].shape[0], part, of),)
            for name in TAKE_BACK:
                for array in ("weight", "scales", "biases"):
                    path = f"{block}.{name}.{array}"
                    if path in weights and weights[path].ndim == 2:
                        found[path] = (slice(None), _share(weights[path].shape[1], self.rank, self.size))
        for path in self.split.by_head:
            if path in weights and weights[path].ndim == 2:
                found[path] = (slice(None), _share(weights[path].shape[1], self.rank, self.size))
        return found

    def narrow(self, network: Network) -> None:
        """Make room for this rank's part alone: the shared blocks get fewer heads and channels."""
        narrower: list[tuple[str, Any]] = []
        modules = dict(network.named_modules())
        for block in self.split.blocks(network.config):
            attention = modules[f"{block}.attention"]
            kv_heads = getattr(attention, "kv_heads", attention.heads)
            attention.heads //= self.size
            if hasattr(attention, "kv_heads"):
                attention.kv_heads = max(1, kv_heads // self.size)
            parts = dict.fromkeys((*MAKE_QUERIES, *MAKE_CHANNELS, *TAKE_BACK), self.size)
            parts |= dict.fromkeys(MAKE_KEYS, min(kv_heads, self.size))
            for name, count in parts.items():
                whole = modules.get(f"{block}.{name}")
                if whole is not None:
                    rows, columns = whole.weight.shape
                    rows, columns = (rows, columns // count) if name in TAKE_BACK else (rows // count, columns)
                    narrower.append((f"{block}.{name}", Linear(columns, rows, bias="bias" in whole)))
        set_modules(network, narrower)
        for path in self.split.by_head:
            holder, _, name = path.rpartition(".")
            if holder in modules:
                weight = modules[holder][name]
                modules[holder][name] = weight[..., : weight.shape[-1] // self.size]

    def join(self, network: Any) -> None:
        """Let the parts of a narrowed network, which has its weights, make one network with those of the other ranks."""
        assert self.ranks is not None
        modules = dict(network.named_modules())
        paths = [f"{block}.{name}" for block in self.split.blocks(network.config) for name in TAKE_BACK]
        set_modules(network, [(path, summed(modules[path], self.ranks)) for path in paths])
        network.share = self

    def _check(self, config: Any, weights: Mapping[str, mx.array], where: str) -> None:
        counted = _counted(self.split, config, weights)
        heads, kv_heads = self.split.heads(config)

        def refusal(size: int) -> str | None:
            if heads % size == 0 and kv_heads % size and size % kv_heads:
                return f"{kv_heads} heads of keys and values"
            return next((what for what, count in counted.items() if count % size), None)

        problem = refusal(self.size)
        if problem is None:
            return
        fitting = [str(size) for size in range(2, heads + 1) if refusal(size) is None]
        mend = f"start {' or '.join(fitting)} ranks" if fitting else "no number of ranks does; leave --split out"
        raise UsageError(f"--split {self.split.part}: {where} has {problem}, which {self.size} ranks cannot share; {mend}")


def share_among(ranks: Ranks, architecture: Architecture, where: str) -> Share:
    """What this rank holds of a network that `ranks` share.

    Raises:
        UsageError: no part of such a network can be shared.
    """
    if architecture.split is None:
        raise UsageError(f"--split: {where} is {with_article(architecture.title)}, of which each rank holds all; leave it out")
    return Share(architecture.split, ranks.rank, ranks.size, ranks)


def share_of(network: Network) -> Share | None:
    """What this rank holds of a network that ranks share; None of one that is whole."""
    found: Share | None = getattr(network, "share", None)
    return found


def _share(count: int, part: int, parts: int) -> slice:
    return slice(count * part // parts, count * (part + 1) // parts)


def _counted(split: Split, config: Any, weights: Mapping[str, mx.array]) -> dict[str, int]:
    """What ranks must divide, by its description."""
    counted = {f"{split.heads(config)[0]} heads": split.heads(config)[0]}
    for block in split.blocks(config):
        up = weights.get(f"{block}.ffn.up_proj.weight")
        if up is not None and up.ndim:
            counted[f"{up.shape[0]} channels in a feed-forward"] = up.shape[0]
        for name in TAKE_BACK:
            scales = weights.get(f"{block}.{name}.scales")
            if scales is not None and scales.ndim == 2:
                kind = name.rpartition(".")[2]
                counted[f"{scales.shape[1]} packed groups in a row of {kind}"] = scales.shape[1]
    return counted
