"""CANINE (arXiv 2103.06874): an encoder of characters, most of whose layers run over four characters at a time.

Checkpoints are those of transformers' CANINE, post-norm BERT layers throughout: one over characters in blocks, a
convolution down to *molecules*, the deep layers over these, a convolution back, and one more layer over characters.
The reference's habits are kept since weights were tuned under them: the last molecule gives its place to the mark at
the start, and the molecules' lengths are counted as if it did not, so the last real one of a padded input is unseen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeAlias, get_args

import mlx.core as mx
import mlx.nn as nn

from marlin_cli.errors import ConfigError
from marlin_cli.models.canine_ids import PAD, Ids, with_marks
from marlin_cli.models.limits import Limits, check_limits
from marlin_cli.ops import Linear, activation
from marlin_cli.ops.long_attention import cross_attention
from marlin_cli.ops.reference import Activation
from marlin_cli.text import quoted

# Config

Head = Literal["none", "sequence", "token", "answer", "choice"]

# Hash function i takes ((id + 1) * PRIMES[i]) modulo the number of buckets.
PRIMES = (31, 43, 59, 61, 73, 97, 103, 113, 137, 149, 157, 173, 181, 193, 211, 223)

# A network is drafted before its weights are compared with it, so no number may be larger than any of a real model.
LIMITS: Limits = {
    "d_model": (1, 1 << 15), "ffn_dim": (1, 1 << 17), "heads": (1, 1 << 12), "layers": (1, 1 << 8),
    "max_characters": (1, 1 << 24), "types": (1, 1 << 16), "downsample_factor": (1, 1 << 8), "upsample_width": (1, 1 << 8),
    "hash_functions": (1, len(PRIMES)), "hash_buckets": (1, 1 << 22), "block_characters": (1, 1 << 20),
    "norm_eps": (1e-30, 1.0),
}  # fmt: skip


@dataclass(frozen=True)
class CharacterShape:
    """Sizes that CANINE and its relatives share; the defaults are those of google/canine-s."""

    d_model: int = 768  # width of characters and molecules between layers
    ffn_dim: int = 3072
    heads: int = 12
    layers: int = 12  # over molecules; over characters there are two more
    activation: Activation = "gelu"
    norm_eps: float = 1e-12
    max_characters: int = 16384  # longest input, marks and padding included
    types: int = 16  # kinds of text that an input may consist of
    downsample_factor: int = 4  # characters in a molecule
    upsample_width: int = 4  # characters that the convolution back reads at once
    hash_functions: int = 8  # tables of embeddings, each of d_model / hash_functions columns
    hash_buckets: int = 16384  # rows of each, and of the table of positions
    block_characters: int = 128  # the first layer sees disjoint blocks of so many

    marks: ClassVar[bool] = True  # do CANINE's marks stand around a text?
    padding: ClassVar[int] = PAD  # the id of padding

    def __post_init__(self) -> None:
        check_limits(self, LIMITS)
        for name in ("heads", "hash_functions"):
            if self.d_model % getattr(self, name):
                raise ConfigError(f"d_model must be a multiple of {name} ({getattr(self, name)}), found {self.d_model}")

    @property
    def blocks(self) -> list[str]:
        """The path of every transformer block."""
        return ["local.first", "local.last", *(f"layers.{layer}" for layer in range(self.layers))]

    @property
    def longest(self) -> int:
        """Positions that have an embedding."""
        return min(self.max_characters, self.hash_buckets)

    def length_of(self, positions: int) -> int:
        """Positions that an input with so many real ones has at least."""
        return positions


@dataclass(frozen=True)
class CanineConfig(CharacterShape):
    """Shape and options of a CANINE.

    Raises:
        ConfigError: sizes that are not positive or do not fit together.
    """

    model_type: Literal["canine"] = "canine"
    pooler: bool = True  # is there a layer that makes one vector of an input?
    head: Head = "none"
    labels: tuple[str, ...] = ()  # of the rows of the head, for sequence and token
    problem: Literal["one_label", "several_labels", "regression"] = "one_label"  # what scores of sequences mean
    second_type: int = 1  # the type of the second text of a pair; transformers from 5 on prepares pairs with 0

    kinds_of_head: ClassVar[tuple[str, ...]] = get_args(Head)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.second_type < self.types:
            raise ConfigError(f"second_type must be below types ({self.types}), found {quoted(self.second_type)}")
        if bool(self.labels) != (self.head in ("sequence", "token")):
            raise ConfigError(f"labels go with the heads sequence and token, found {len(self.labels)} with {self.head}")
        if self.head in ("sequence", "choice") and not self.pooler:
            raise ConfigError(f"the head {self.head} needs the pooler")

    @property
    def head_rows(self) -> int:
        """Scores that the head gives each input or character."""
        return {"none": 0, "sequence": len(self.labels), "token": len(self.labels), "answer": 2, "choice": 1}[self.head]

    @property
    def scores_texts(self) -> bool:
        """Does the head read the vector of a text, not its states?"""
        return self.head in ("sequence", "choice")

    def input_of(self, first: Ids, second: Ids | None = None) -> tuple[Ids, Ids]:
        """Ids and types, both [positions], of a text or a pair of texts, with their marks."""
        return with_marks(first, second, self.second_type)


# Attention


def attention_in_blocks(queries: mx.array, keys: mx.array, values: mx.array, width: int, lengths: mx.array | None) -> mx.array:
    """Attention of rows [n, heads, rows, head_dim], without a scale, in which `width` rows see each other and no more.

    As in transformers, rows of a block without anything real see all of its filler alike: real rows nearby read them.
    """
    n, heads, rows, head_dim = queries.shape
    if rows <= width:
        return cross_attention(queries, keys, values, lengths)
    blocks = -(-rows // width)
    missing = blocks * width - rows

    def cut(x: mx.array) -> mx.array:
        padded = mx.pad(x, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else x
        return padded.reshape(n, heads, blocks, width, head_dim).swapaxes(1, 2).reshape(n * blocks, heads, width, head_dim)

    queries, keys, values = cut(queries), cut(keys), cut(values)
    real = None
    if lengths is not None or missing:
        starts = mx.arange(blocks) * width
        there = mx.minimum(rows - starts, width)
        counts = mx.full((n, 1), rows) if lengths is None else lengths[:, None]
        real = mx.clip(counts - starts, 0, there)
        queries = mx.where((real > 0).reshape(-1, 1, 1, 1), queries, 0)
        real = mx.where(real > 0, real, there).reshape(-1)
    attended = cross_attention(queries, keys, values, real).reshape(n, blocks, heads, width, head_dim)
    return attended.swapaxes(1, 2).reshape(n, heads, blocks * width, head_dim)[:, :, :rows]


class Attention(nn.Module):
    def __init__(self, d_model: int, heads: int, width: int | None) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.q_proj = Linear(d_model, d_model)
        self.k_proj = Linear(d_model, d_model)
        self.v_proj = Linear(d_model, d_model)
        self.o_proj = Linear(d_model, d_model)

    def __call__(self, x: mx.array, lengths: mx.array | None) -> mx.array:
        queries, keys, values = (self._split(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        attended = self.attend(queries * queries.shape[-1] ** -0.5, keys, values, lengths)
        return self.o_proj(attended.swapaxes(1, 2).flatten(-2))

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, lengths: mx.array | None) -> mx.array:
        """Read with scaled queries [n, heads, rows, head_dim]: the same shape."""
        if self.width is None:
            return cross_attention(queries, keys, values, lengths)
        return attention_in_blocks(queries, keys, values, self.width, lengths)

    def _split(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:-1], self.heads, -1).swapaxes(1, 2)


# Feed-forward


class FeedForward(nn.Module):
    def __init__(self, d_model: int, ffn_dim: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.up_proj = Linear(d_model, ffn_dim)
        self.down_proj = Linear(ffn_dim, d_model)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(activation(self.up_proj(x), self.activation))


# Block


class Block(nn.Module):
    """A layer of BERT; `width` is that of the blocks in which it sees rows, None for all of them."""

    def __init__(self, config: CharacterShape, width: int | None = None) -> None:
        super().__init__()
        self.attention = Attention(config.d_model, config.heads, width)
        self.attention_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.ffn = FeedForward(config.d_model, config.ffn_dim, config.activation)
        self.ffn_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)

    def __call__(self, x: mx.array, lengths: mx.array | None) -> mx.array:
        return self.fed(self.attended(x, lengths))

    def attended(self, x: mx.array, lengths: mx.array | None) -> mx.array:
        """The first half: attention is added, and a norm follows the sum."""
        return self.attention_norm(x + self.attention(x, lengths))

    def fed(self, x: mx.array) -> mx.array:
        """The second half, likewise."""
        return self.ffn_norm(x + self.ffn(x))


class Embedding(nn.Module):
    """A row of each hash table side by side, plus the type's and the position's."""

    def __init__(self, config: CharacterShape) -> None:
        super().__init__()
        columns = config.d_model // config.hash_functions
        self.tables = [nn.Embedding(config.hash_buckets, columns) for _ in range(config.hash_functions)]
        self.types = nn.Embedding(config.types, config.d_model)
        self.positions = nn.Embedding(config.hash_buckets, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)

    def __call__(self, ids: mx.array, types: mx.array | None) -> mx.array:
        buckets = self.positions.weight.shape[0]
        rows = [
            table(((ids + 1) * prime) % buckets) for table, prime in zip(self.tables, PRIMES, strict=False)
        ]  # an id of -1 is row 0 of every table
        hashed = mx.concatenate(rows, axis=-1)
        kinds = self.types.weight[0] if types is None else self.types(types)
        return self.norm(hashed + kinds + self.positions.weight[: ids.shape[1]])


class Downsampling(nn.Module):
    """A convolution with as long a step as its kernel: a product over the rows of each molecule side by side."""

    def __init__(self, config: CharacterShape) -> None:
        super().__init__()
        self.factor, self.activation = config.downsample_factor, config.activation
        self.conv = Linear(config.downsample_factor * config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)

    def windows(self, x: mx.array) -> mx.array:
        """Rows [n, total // factor, factor * d_model] of characters [n, total, d_model]; the last ones may be left out."""
        n, total, d_model = x.shape
        whole = total // self.factor
        return x[:, : whole * self.factor].reshape(n, whole, self.factor * d_model)

    def __call__(self, windows: mx.array) -> mx.array:
        """Molecules [n, windows, d_model], not yet through the norm."""
        return activation(self.conv(windows), self.activation)


class Upsampling(nn.Module):
    """A convolution over characters and their molecules, side by side: a product over unfolded windows."""

    def __init__(self, config: CharacterShape) -> None:
        super().__init__()
        self.kernel, self.activation = config.upsample_width, config.activation
        self.conv = Linear(config.upsample_width * 2 * config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)

    def windows(self, characters: mx.array, molecules: mx.array) -> mx.array:
        """What stands around each character, of rows [n, total, d_model] of both: [n, total, kernel * 2 * d_model]."""
        total = characters.shape[1]
        before = (self.kernel - 1) // 2
        both = mx.pad(mx.concatenate([characters, molecules], axis=-1), [(0, 0), (before, self.kernel - 1 - before), (0, 0)])
        return mx.concatenate([both[:, shift : shift + total] for shift in range(self.kernel)], axis=-1)

    def __call__(self, windows: mx.array) -> mx.array:
        """Rows [n, total, d_model]."""
        return self.norm(activation(self.conv(windows), self.activation))


class Local(nn.Module):
    """What runs over characters, before and after the deep layers."""

    def __init__(self, config: CharacterShape) -> None:
        super().__init__()
        self.first = Block(config, config.block_characters)
        self.down = Downsampling(config)
        self.up = Upsampling(config)
        self.last = Block(config)


class Deep(NamedTuple):
    """An input after the deep layers."""

    characters: mx.array  # [n, total, d_model], of the first layer
    molecules: mx.array  # [n, total // factor, d_model]


States: TypeAlias = Callable[[Deep, "mx.array | None"], mx.array]  # as `Canine.states`


# Model


class Canine(nn.Module):
    """The network: ids in; states, one vector an input, or a head's scores out."""

    mark_leads = True  # the mark at the start takes a molecule's place, before all others

    def __init__(self, config: CanineConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.local = Local(config)
        self.layers = [Block(config) for _ in range(config.layers)]
        # No `ops.Linear`: packing it would save nothing, and the margins of all labels pass through it.
        if config.pooler:
            self.pooler = nn.Linear(config.d_model, config.d_model)
        if config.head_rows:
            self.output = Linear(config.d_model, config.head_rows)

    def __call__(self, ids: mx.array, lengths: mx.array | None = None, types: mx.array | None = None) -> mx.array:
        """The head's scores, float32: [n, rows] of an input (sequence, choice), else [n, total, rows] of its characters.

        Args:
            ids: [n, total] code points, marks included, total at least `downsample_factor`.
            lengths: [n] real ids of each input; the rest, at its end, is padding. All of them if None.
            types: [n, total] kinds of text; 0 if None.
        """
        return self.scores(self.deep(ids, lengths, types), lengths, self.states)

    def encode(self, ids: mx.array, lengths: mx.array | None = None, types: mx.array | None = None) -> mx.array:
        """The characters' states [n, total, d_model]; arguments as of a call."""
        return self.states(self.deep(ids, lengths, types), lengths)

    def deep(self, ids: mx.array, lengths: mx.array | None = None, types: mx.array | None = None) -> Deep:
        """Everything up to the last of the deep layers; arguments as of a call."""
        characters = self.local.first(self.embedding(ids, types), lengths)
        down = self.local.down
        molecules = self.molecules(characters, down(down.windows(characters)))
        counts = None if lengths is None else self.molecule_lengths(lengths, molecules.shape[1])
        for layer in self.layers:
            molecules = layer(molecules, counts)
        return Deep(characters, molecules)

    def molecules(self, characters: mx.array, convolved: mx.array) -> mx.array:
        """What the deep layers read, [n, total // factor, d_model]: the mark at the start, then all molecules but the last."""
        return self.local.down.norm(mx.concatenate([characters[:, :1], convolved[:, :-1]], axis=1))

    def molecule_lengths(self, lengths: mx.array, most: int) -> mx.array:
        """How many of `most` molecules the deep layers see, of so many real characters: [n]."""
        return mx.minimum(-(-lengths // self.config.downsample_factor), most)

    def pooled(self, deep: Deep) -> mx.array:
        """One vector an input: [n, d_model]."""
        return mx.tanh(self.pooler(deep.molecules[:, 0]))

    def scores(self, deep: Deep, lengths: mx.array | None, states: States) -> mx.array:
        """See a call; `states(deep, lengths)` runs what is left of the network where the head reads characters."""
        return self.output(self.pooled(deep) if self.config.scores_texts else states(deep, lengths)).astype(mx.float32)

    def states(self, deep: Deep, lengths: mx.array | None = None) -> mx.array:
        """The characters' states [n, total, d_model]; those of padding mean nothing."""
        up = self.local.up
        windows = up.windows(deep.characters, self.repeated(deep.molecules, deep.characters.shape[1]))
        return self.local.last(up(windows), lengths)

    def repeated(self, molecules: mx.array, total: int) -> mx.array:
        """A molecule for each of `total` characters: [n, total, d_model]."""
        factor = self.config.downsample_factor
        # The last one also stands for the characters of the molecule that was left out, and for those after it.
        rest = mx.repeat(molecules[:, -1:], factor + total % factor, axis=1)
        return mx.concatenate([mx.repeat(molecules[:, 1:], factor, axis=1), rest], axis=1)
