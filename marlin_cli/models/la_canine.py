"""LA-CANINE (arXiv 2305.18893, wtpsplit): CANINE that finds the ends of sentences, with an adapter for each language.

A network holds one language's adapters, or none. Beside them it differs from CANINE: no marks, a molecule for every
four characters and none left out, and padding that is row 0 of every hash table (an id of -1) and no character.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from marlin_cli.errors import ConfigError, UsageError
from marlin_cli.models.canine import Attention, Block, CharacterShape, Deep, Downsampling, Embedding, States, Upsampling
from marlin_cli.models.canine_ids import Ids
from marlin_cli.models.limits import check_limits
from marlin_cli.ops import Linear, activation
from marlin_cli.text import quoted

PADDING = -1

# Config


@dataclass(frozen=True)
class LaCanineConfig(CharacterShape):
    """Shape and options of an LA-CANINE.

    Raises:
        ConfigError: sizes that are not positive or do not fit together.
    """

    model_type: Literal["la_canine"] = "la_canine"
    rows: int = 1  # scores of a character: the end of a sentence, then of punctuation that may have been there
    adapter_dim: int = 0  # width of the adapters; 0 for none
    language: str = ""  # whose adapters these are; empty for none, or for the mean of all
    lookahead: int | None = None  # molecules after its own that a character sees in the first layer; all if None

    marks: ClassVar[bool] = False
    padding: ClassVar[int] = PADDING
    head: ClassVar[str] = "sentence"
    kinds_of_head: ClassVar[tuple[str, ...]] = ("sentence",)
    pooler: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits(self, {"rows": (1, 1 << 16), "adapter_dim": (0, self.d_model), "lookahead": (0, 1 << 20)})
        if self.language and not self.adapter_dim:
            raise ConfigError(f"language is {quoted(self.language)}, and adapter_dim says that there are no adapters")

    @property
    def longest(self) -> int:
        """Positions that have an embedding, in whole molecules."""
        return super().longest // self.downsample_factor * self.downsample_factor

    def input_of(self, first: Ids, second: Ids | None = None) -> tuple[Ids, Ids]:
        """Ids and types, both [positions], of a text, which has no marks.

        Raises:
            UsageError: there is a second one.
        """
        if second is not None:
            raise UsageError("an LA-CANINE reads one text at a time; what was asked for needs a network that reads pairs")
        return first, np.zeros_like(first)

    def length_of(self, positions: int) -> int:
        """Whole molecules."""
        return -(-positions // self.downsample_factor) * self.downsample_factor


# Attention


@dataclass(frozen=True)
class Lookahead:
    """How far a row sees: to the end of the block of `size` rows that stands `blocks` after its own."""

    blocks: int
    size: int


class BoundedAttention(Attention):
    """Attention that sees no further than `lookahead`; with a width, in disjoint blocks of so many rows too."""

    def __init__(self, config: CharacterShape, width: int | None, lookahead: Lookahead) -> None:
        super().__init__(config.d_model, config.heads, None)
        self.reach, self.lookahead = width, lookahead

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, lengths: mx.array | None) -> mx.array:
        rows = queries.shape[2]
        step = rows if self.reach is None else self.reach
        parts = []
        for start in range(0, rows, step):
            end = min(rows, start + step)
            # Counted within the block, as the reference does.
            positions = mx.arange(end - start)
            seen = (
                positions[None] < (positions // self.lookahead.size + self.lookahead.blocks + 1)[:, None] * self.lookahead.size
            )
            if lengths is not None:
                seen = seen & (positions + start < lengths[:, None, None, None])
            # Added, not cut out: a row that sees nothing real sees everything alike.
            mask = mx.where(seen, 0, mx.finfo(queries.dtype).min).astype(queries.dtype)
            part = slice(start, end)
            parts.append(
                mx.fast.scaled_dot_product_attention(
                    queries[:, :, part], keys[:, :, part], values[:, :, part], scale=1.0, mask=mask
                )
            )
        return mx.concatenate(parts, axis=2)


# Block


class Adapter(nn.Module):
    """A bottleneck after a layer's feed-forward, which a language has of its own."""

    def __init__(self, config: LaCanineConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.down_proj = Linear(config.d_model, config.adapter_dim)
        self.up_proj = Linear(config.adapter_dim, config.d_model)

    def __call__(self, x: mx.array) -> mx.array:
        return self.up_proj(activation(self.down_proj(x), self.activation))


class AdaptedBlock(Block):
    """CANINE's layer, and the adapter behind the same norm once more."""

    def __init__(self, config: LaCanineConfig, width: int | None = None, lookahead: Lookahead | None = None) -> None:
        super().__init__(config, width)
        if lookahead is not None:
            self.attention = BoundedAttention(config, width, lookahead)
        if config.adapter_dim:
            self.adapter = Adapter(config)

    def __call__(self, x: mx.array, lengths: mx.array | None) -> mx.array:
        x = super().__call__(x, lengths)
        return self.adapted(x) if "adapter" in self else x

    def adapted(self, x: mx.array) -> mx.array:
        """The third part, where there is an adapter."""
        return self.ffn_norm(x + self.adapter(x))


class Local(nn.Module):
    """What runs over characters, before and after the deep layers."""

    def __init__(self, config: LaCanineConfig) -> None:
        super().__init__()
        factor, ahead = config.downsample_factor, config.lookahead
        self.first = AdaptedBlock(config, config.block_characters, None if ahead is None else Lookahead(ahead, factor))
        self.down = Downsampling(config)
        self.up = Upsampling(config)
        self.last = AdaptedBlock(config, None, None if ahead is None else Lookahead(0, factor))


# Model


class LaCanine(nn.Module):
    """The network: ids in, scores of every character out, of which the first is that of a sentence's end."""

    mark_leads = False

    def __init__(self, config: LaCanineConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.local = Local(config)
        ahead = None if config.lookahead is None else Lookahead(0, 1)
        self.layers = [AdaptedBlock(config, None, ahead) for _ in range(config.layers)]
        self.output = Linear(config.d_model, config.rows)

    def __call__(self, ids: mx.array, lengths: mx.array | None = None, types: mx.array | None = None) -> mx.array:
        """Scores [n, total, rows] float32, before a sigmoid, of ids [n, total].

        Args:
            ids: code points, total a multiple of `downsample_factor`, filled up with `PADDING`.
            lengths: [n] real ids of each input; all of them if None.
            types: kinds of text make no difference here.
        """
        return self.scores(self.deep(ids, lengths), lengths, self.states)

    def encode(self, ids: mx.array, lengths: mx.array | None = None, types: mx.array | None = None) -> mx.array:
        """The characters' states [n, total, d_model]; arguments as of a call."""
        return self.states(self.deep(ids, lengths), lengths)

    def deep(self, ids: mx.array, lengths: mx.array | None = None, types: mx.array | None = None) -> Deep:
        """Everything up to the last of the deep layers; arguments as of a call."""
        characters = self.local.first(self.embedding(ids, None), lengths)
        down = self.local.down
        molecules = self.molecules(characters, down(down.windows(characters)))
        counts = None if lengths is None else self.molecule_lengths(lengths, molecules.shape[1])
        for layer in self.layers:
            molecules = layer(molecules, counts)
        return Deep(characters, molecules)

    def scores(self, deep: Deep, lengths: mx.array | None, states: States) -> mx.array:
        """See a call; `states(deep, lengths)` runs what is left of the network."""
        return self.output(states(deep, lengths)).astype(mx.float32)

    def states(self, deep: Deep, lengths: mx.array | None = None) -> mx.array:
        """The characters' states [n, total, d_model]; those of padding mean nothing."""
        up = self.local.up
        windows = up.windows(deep.characters, self.repeated(deep.molecules, deep.characters.shape[1]))
        return self.local.last(up(windows), lengths)

    def molecules(self, characters: mx.array, convolved: mx.array) -> mx.array:
        """What the deep layers read, [n, total / factor, d_model]."""
        return self.local.down.norm(convolved)

    def molecule_lengths(self, lengths: mx.array, most: int) -> mx.array:
        """How many of `most` molecules the deep layers see, of so many real characters: [n]."""
        return -(-lengths // self.config.downsample_factor)

    def repeated(self, molecules: mx.array, total: int) -> mx.array:
        """A molecule for each of `total` characters: [n, total, d_model]."""
        return mx.repeat(molecules, self.config.downsample_factor, axis=1)
