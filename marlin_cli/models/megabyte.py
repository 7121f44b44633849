"""MegaByte (arXiv 2305.07185): a global transformer over patches of bytes, a local one over the bytes of each patch.

Three layouts are run as their weights need them; each stage works on *rows*, a leading row and then one per token:

- `prefix`, marlin's own: the leading row of a local patch is the projected global state, bytes follow.
- `paper`: the global state is cut into one slice a byte, projected, and added to the byte before it.
- `megabyte_pytorch` (lucidrains/MEGABYTE-pytorch 0.3.6, two stages or more): start vectors lead, the state is
  added from the first byte on, and the first byte of a patch is predicted by the last row of the patch before.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeAlias

import mlx.core as mx
import mlx.nn as nn

from marlin_cli.config import MOST_ENTRIES
from marlin_cli.errors import ConfigError
from marlin_cli.models.limits import Limits, check_limits
from marlin_cli.ops import Linear, attention, delay_one_row, patch_embed

Layout = Literal["prefix", "paper", "megabyte_pytorch"]
Positions = Literal["learned", "rope", "learned+rope", "none"]


# Config

# A network is drafted before its weights are compared with it, so no number may be larger than any of a real model.
STAGE_LIMITS: Limits = {
    "length": (1, 1 << 30), "layers": (1, 1 << 8), "dim": (1, 1 << 17), "heads": (1, 1 << 12), "ffn_dim": (1, 1 << 19),
    "head_dim": (1, 1 << 17), "kv_heads": (1, 1 << 12),
}  # fmt: skip
LIMITS: Limits = {
    "patch_size": (1, 1 << 16), "max_bytes": (1, 1 << 30), "vocab_size": (1, 1 << 20), "byte_dim": (1, 1 << 17),
    "attention_window": (1, 1 << 30), "bos_byte": (0, 1 << 20),
    "norm_eps": (1e-30, 1.0), "attention_scale": (1e-6, 1e3), "rope_theta": (1e-3, 1e12),
    # Of the stages under their names here, so that an error names what config.json has.
    **{f"{part}_{name}": STAGE_LIMITS[name] for part in ("global", "local")
       for name in ("layers", "dim", "heads", "ffn_dim", "head_dim", "kv_heads")},
}  # fmt: skip
WIDEST_ROW = 1 << 24  # numbers in a patch's embeddings, or in what a stage gives the next


@dataclass(frozen=True)
class StageConfig:
    """One transformer of the hierarchy, coarse to fine."""

    length: int  # tokens in one sequence of this stage
    layers: int
    dim: int
    heads: int
    ffn_dim: int
    positions: Positions = "none"
    head_dim: int | None = None  # dim / heads unless given
    kv_heads: int | None = None  # heads unless given

    def __post_init__(self) -> None:
        check_limits(self, STAGE_LIMITS)

    @property
    def learned(self) -> bool:
        """Does the stage have a table of learned positions?"""
        return self.positions.startswith("learned")

    @property
    def rope(self) -> bool:
        """Does its attention rotate queries and keys?"""
        return self.positions.endswith("rope")

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.dim // self.heads


@dataclass(frozen=True)
class MegaByteConfig:
    """Shape and options of a MegaByte.

    Raises:
        ConfigError: sizes that are not positive or do not fit together.
    """

    model_type: Literal["megabyte"] = "megabyte"
    layout: Layout = "prefix"
    patch_size: int = 8  # bytes in a patch
    max_bytes: int = 8192  # longest context, in bytes
    vocab_size: int = 256  # bytes, and any special ids from 256 on
    byte_dim: int | None = None  # width of a byte's embedding inside a patch; global_dim / patch_size unless given

    global_layers: int = 12
    global_dim: int = 1024
    global_heads: int = 16
    global_ffn_dim: int | None = None  # from the kind of feed-forward unless given
    global_head_dim: int | None = None
    global_kv_heads: int | None = None
    global_positions: Positions = "rope"

    # Stages between global and local (megabyte_pytorch alone).
    middle: tuple[StageConfig, ...] = field(default=(), metadata={MOST_ENTRIES: 16})

    local_layers: int = 4
    local_dim: int = 512
    local_heads: int = 8
    local_ffn_dim: int | None = None
    local_head_dim: int | None = None
    local_kv_heads: int | None = None
    local_positions: Positions = "learned"

    ffn: Literal["swiglu", "gelu", "gelu_tanh", "relu", "silu"] = "swiglu"
    ffn_bias: bool = False
    norm: Literal["rmsnorm", "layernorm", "variance"] = "rmsnorm"  # variance: x * weight / sqrt(var(x) + eps)
    norm_eps: float = 1e-5
    qk_norm: bool = False  # normalise the queries and keys of each head
    attention_scale: float | None = None  # head_dim ** -0.5 unless given
    attention_window: int | None = None  # global attention sees at most this many patches back
    rope_theta: float = 10000.0
    rope_interleaved: bool = False  # rotate pairs (0, 1), (2, 3) .. instead of the two halves of a head
    token_shift: bool = False  # half of the channels come from the row before
    start_tokens: bool = True  # paper: learned pads lead; off, the byte `bos_byte` does
    bos_byte: int = 255

    def __post_init__(self) -> None:
        check_limits(self, LIMITS)
        if self.vocab_size < 256:
            raise ConfigError(f"vocab_size must hold every byte (256 or more), found {self.vocab_size}")
        if not 0 <= self.bos_byte < self.vocab_size:
            raise ConfigError(f"bos_byte must be an id below vocab_size, found {self.bos_byte}")
        if self.max_bytes % self.patch_size:
            raise ConfigError(f"max_bytes {self.max_bytes} is not a multiple of patch_size {self.patch_size}")
        if self.byte_dim is None and self.global_dim % self.patch_size:
            raise ConfigError(f"global_dim {self.global_dim} is not a multiple of patch_size {self.patch_size};"
                              " give byte_dim")  # fmt: skip
        if self.middle and self.layout != "megabyte_pytorch":
            raise ConfigError(f"layout {self.layout!r} has two stages; `middle` belongs to megabyte_pytorch")
        if self.layout == "paper" and self.byte_width * self.patch_size != self.global_dim:
            raise ConfigError("layout 'paper' has no patch projection: byte_dim x patch_size must be global_dim")
        if not self.start_tokens and self.layout != "paper":
            raise ConfigError(f"layout {self.layout!r} needs start_tokens")
        if self.patch_size % math.prod(stage.length for stage in self.middle):
            raise ConfigError("the lengths of the middle stages do not divide patch_size")
        widest = max(self.patch_size * max(self.byte_width, self.local_dim), *(s.length * s.dim for s in self.stages[1:]))
        if widest > WIDEST_ROW:
            raise ConfigError(f"patches and widths ask for rows of {widest:,} numbers, more than {WIDEST_ROW:,}")
        for stage in self.stages:
            if stage.head_dim is None and stage.dim % stage.heads:
                raise ConfigError(f"{stage.heads} heads do not divide a width of {stage.dim}; give the head_dim")
            if stage.kv_heads is not None and stage.heads % stage.kv_heads:
                raise ConfigError(f"{stage.kv_heads} kv_heads do not divide {stage.heads} heads")
            if stage.rope and stage.width_of_head % 2:
                raise ConfigError(f"rope needs an even head_dim, found {stage.width_of_head}")
            if self.token_shift and stage.dim % 2:
                raise ConfigError(f"token_shift needs an even width, found {stage.dim}")

    @property
    def byte_width(self) -> int:
        """Width of a byte's embedding inside a patch."""
        return self.byte_dim or self.global_dim // self.patch_size

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        """All stages, coarse to fine."""
        local_length = self.patch_size // math.prod(stage.length for stage in self.middle)
        first = StageConfig(
            self.max_bytes // self.patch_size, self.global_layers, self.global_dim, self.global_heads,
            self.global_ffn_dim or default_ffn_dim(self.ffn, self.global_dim),
            self.global_positions, self.global_head_dim, self.global_kv_heads,
        )  # fmt: skip
        last = StageConfig(
            local_length, self.local_layers, self.local_dim, self.local_heads,
            self.local_ffn_dim or default_ffn_dim(self.ffn, self.local_dim),
            self.local_positions, self.local_head_dim, self.local_kv_heads,
        )  # fmt: skip
        return (first, *self.middle, last)

    @property
    def blocks(self) -> list[str]:
        """The path of every transformer block."""
        names = ["global", *(f"middle.{index}" for index in range(len(self.middle))), "local"]
        stages = zip(names, self.stages, strict=True)
        return [f"{name}.layers.{layer}" for name, stage in stages for layer in range(stage.layers)]

    def bytes_per_token(self, stage: int) -> int:
        """Bytes that one token of stage number `stage` stands for: the patch size for 0, one for the last."""
        return math.prod(later.length for later in self.stages[stage + 1 :])


def default_ffn_dim(ffn: str, dim: int) -> int:
    """4 x dim; for a gated feed-forward two thirds of that, rounded up to a multiple of 64."""
    return -(-8 * dim // 3 // 64) * 64 if ffn == "swiglu" else 4 * dim


# Caches, as the layers see them; `marlin_cli.engine` has them.


# The number of a stage and its rows [batch, n, dim_s] to hidden rows of the same shape.
RunStage: TypeAlias = Callable[[int, mx.array], mx.array]


class LayerCache(Protocol):
    """What one layer remembers of the rows it has seen."""

    @property
    def offset(self) -> int | mx.array:
        """Rows seen so far: the position of the next one; [batch] where sequences differ."""

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None) -> mx.array:
        """Append keys and values, and attend over all rows so far. Shapes as in `ops.attention`."""

    def delay(self, slot: int, rows: mx.array) -> mx.array:
        """`rows` [batch, n, channels] one row later, with what `slot` remembers first."""


# Attention


class VarianceNorm(nn.Module):
    """x * weight / sqrt(var(x) + eps): not centred, unlike LayerNorm (kjslag/spacebyte, transformer.py)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((dim,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        wide = x.astype(mx.float32)
        scaled = wide * mx.rsqrt(wide.var(axis=-1, keepdims=True) + self.eps)
        return (scaled * self.weight).astype(x.dtype)


def make_norm(config: MegaByteConfig, dim: int) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(dim, eps=config.norm_eps, bias=False)
    return (nn.RMSNorm if config.norm == "rmsnorm" else VarianceNorm)(dim, eps=config.norm_eps)


class Attention(nn.Module):
    def __init__(self, config: MegaByteConfig, stage: StageConfig, window: int | None) -> None:
        super().__init__()
        self.heads, self.head_dim = stage.heads, stage.width_of_head
        self.kv_heads = stage.kv_heads or stage.heads
        self.scale = self.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.window = window
        self.rope_theta = config.rope_theta if stage.rope else None
        self.rope_interleaved = config.rope_interleaved
        self.q_proj = Linear(stage.dim, self.heads * self.head_dim, bias=False)
        self.k_proj = Linear(stage.dim, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = Linear(stage.dim, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = Linear(self.heads * self.head_dim, stage.dim, bias=False)
        if config.qk_norm:
            self.q_norm = make_norm(config, self.head_dim)
            self.k_norm = make_norm(config, self.head_dim)

    def __call__(self, x: mx.array, cache: LayerCache | None) -> mx.array:
        batch, rows, _ = x.shape
        queries = self.q_proj(x).reshape(batch, rows, self.heads, self.head_dim)
        keys = self.k_proj(x).reshape(batch, rows, self.kv_heads, self.head_dim)
        values = self.v_proj(x).reshape(batch, rows, self.kv_heads, self.head_dim).swapaxes(1, 2)
        if "q_norm" in self:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = queries.swapaxes(1, 2), keys.swapaxes(1, 2)
        if self.rope_theta is not None:
            offset = 0 if cache is None else cache.offset
            queries, keys = self._rotated(queries, offset), self._rotated(keys, offset)
        if cache is None:
            out = attention(queries, keys, values, self.scale, window=self.window)
        else:
            out = cache.attend(queries, keys, values, self.scale, self.window)
        return self.o_proj(out.swapaxes(1, 2).reshape(batch, rows, -1))

    def _rotated(self, x: mx.array, offset: int | mx.array) -> mx.array:
        return mx.fast.rope(
            x,
            self.head_dim,
            traditional=self.rope_interleaved,
            base=self.rope_theta,
            scale=1.0,
            offset=offset,
        )


# Feed-forward


class FeedForward(nn.Module):
    def __init__(self, config: MegaByteConfig, stage: StageConfig) -> None:
        super().__init__()
        self.kind = config.ffn
        if self.kind == "swiglu":
            self.gate_proj = Linear(stage.dim, stage.ffn_dim, bias=config.ffn_bias)
        self.up_proj = Linear(stage.dim, stage.ffn_dim, bias=config.ffn_bias)
        self.down_proj = Linear(stage.ffn_dim, stage.dim, bias=config.ffn_bias)

    def __call__(self, x: mx.array) -> mx.array:
        if self.kind == "swiglu":
            return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))
        activation = {"gelu": nn.gelu, "gelu_tanh": nn.gelu_approx, "relu": nn.relu, "silu": nn.silu}[self.kind]
        return self.down_proj(activation(self.up_proj(x)))


# Block


class Block(nn.Module):
    def __init__(self, config: MegaByteConfig, stage: StageConfig, window: int | None) -> None:
        super().__init__()
        self.token_shift = config.token_shift
        self.attention_norm = make_norm(config, stage.dim)
        self.attention = Attention(config, stage, window)
        self.ffn_norm = make_norm(config, stage.dim)
        self.ffn = FeedForward(config, stage)

    def __call__(self, x: mx.array, cache: LayerCache | None = None) -> mx.array:
        x = x + self.attention(self.attention_norm(self._shifted(0, x, cache)), cache)
        return x + self.ffn(self.ffn_norm(self._shifted(1, x, cache)))

    def _shifted(self, slot: int, x: mx.array, cache: LayerCache | None) -> mx.array:
        """The upper half of the channels one row late (token shift, as RWKV has it)."""
        if not self.token_shift:
            return x
        kept, moved = mx.split(x, 2, axis=-1)
        delayed = delay_one_row(moved) if cache is None else cache.delay(slot, moved)
        return mx.concatenate([kept, delayed], axis=-1)


class Stack(nn.Module):
    def __init__(
        self,
        config: MegaByteConfig,
        stage: StageConfig,
        *,
        window: int | None = None,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        self.layers = [Block(config, stage, window) for _ in range(stage.layers)]
        if final_norm:
            self.norm = make_norm(config, stage.dim)

    def __call__(self, x: mx.array, caches: Sequence[LayerCache] | None = None) -> mx.array:
        for index, layer in enumerate(self.layers):
            x = layer(x, None if caches is None else caches[index])
        return self.norm(x) if "norm" in self else x


class MiddleStage(Stack):
    """A stage between global and local, with its own embedding of patches (megabyte_pytorch)."""

    def __init__(self, config: MegaByteConfig, stage: StageConfig, token_bytes: int, following: StageConfig) -> None:
        super().__init__(config, stage)
        self.byte_embedding = nn.Embedding(config.vocab_size, config.local_dim)
        self.patch_norm = nn.LayerNorm(token_bytes * config.local_dim)
        self.patch_projection = Linear(token_bytes * config.local_dim, stage.dim)
        self.projected_norm = nn.LayerNorm(stage.dim)
        self.start = mx.zeros((stage.dim,))
        if stage.learned:
            self.positions = nn.Embedding(stage.length, stage.dim)
        self.to_next = Linear(stage.dim, following.length * following.dim)


# Model


class Stage(NamedTuple):
    """The parts of one stage under one set of names; a part that a layout lacks is None."""

    config: StageConfig
    stack: Stack
    byte_embedding: nn.Embedding
    patch_norm: nn.LayerNorm | None
    patch_projection: Linear | None
    projected_norm: nn.LayerNorm | None
    start: mx.array | None
    positions: nn.Embedding | None
    to_next: Linear | None


class LastSequences(NamedTuple):
    """What the last stage reads: its sequences, in the order of the ids."""

    tokens: mx.array  # [sequences, length] ids
    condition: mx.array  # [sequences, slots, dim]
    previous: mx.array  # [patches] the id before each patch, see `MegaByte.leading_row`


class MegaByte(nn.Module):
    """The network: bytes in, logits out. Decoding loops and caches stand in `marlin_cli.engine`.

    Sizes in the docstrings: `dim_s` the width of stage s, `length_s` its tokens in a sequence, and `slots` the
    vectors that condition one sequence of a stage (1 for the prefix layout, `length_s` for the others).
    """

    def __init__(self, config: MegaByteConfig) -> None:
        super().__init__()
        self.config = config
        stages = config.stages
        first, last = stages[0], stages[-1]
        lucid, paper = config.layout == "megabyte_pytorch", config.layout == "paper"
        self.byte_embedding = nn.Embedding(config.vocab_size, config.byte_width)
        patch_width = config.patch_size * config.byte_width
        if not paper:
            self.patch_projection = Linear(patch_width, first.dim, bias=lucid)
        if lucid:
            self.patch_norm = nn.LayerNorm(patch_width)
            self.projected_norm = nn.LayerNorm(first.dim)
        if config.start_tokens:
            self.global_start = mx.zeros((first.dim,))
        if first.learned:
            shape = (config.max_bytes, config.byte_width) if paper else (first.length, first.dim)
            self.global_positions = nn.Embedding(*shape)
        self["global"] = Stack(config, first, window=config.attention_window, final_norm=not paper)
        if paper:
            self.global_to_local = Linear(config.byte_width, last.dim)
        else:
            following = stages[1].length * stages[1].dim if lucid else last.dim
            self.global_to_local = Linear(first.dim, following, bias=lucid)
        self.middle = [
            MiddleStage(config, stage, config.bytes_per_token(index), stages[index + 1])
            for index, stage in enumerate(stages[1:-1], start=1)
        ]
        self.local_byte_embedding = nn.Embedding(config.vocab_size, last.dim)
        if config.start_tokens and config.layout != "prefix":
            self.local_start = mx.zeros((last.dim,))
        if last.learned:
            self.local_positions = nn.Embedding(last.length, last.dim)
        self.local = Stack(config, last)
        self.output = Linear(last.dim, config.vocab_size, bias=lucid)

    @property
    def stages(self) -> list[Stage]:
        """The stages, coarse to fine."""
        configs = self.config.stages
        first = Stage(
            configs[0], self["global"], self.byte_embedding, self.get("patch_norm"),
            self.get("patch_projection"), self.get("projected_norm"), self.get("global_start"),
            self.get("global_positions"), self.global_to_local,
        )  # fmt: skip
        middle = [
            Stage(config, part, part.byte_embedding, part.patch_norm, part.patch_projection,
                  part.projected_norm, part.start, part.get("positions"), part.to_next)
            for config, part in zip(configs[1:-1], self.middle, strict=True)
        ]  # fmt: skip
        last = Stage(
            configs[-1], self.local, self.local_byte_embedding, None, None, None,
            self.get("local_start"), self.get("local_positions"), None,
        )  # fmt: skip
        return [first, *middle, last]

    def __call__(self, ids: mx.array, run_stage: RunStage | None = None) -> mx.array:
        """Logits [batch, total, vocab] of ids [batch, total]: row i predicts id i from the ids before it.

        Memory grows with total: the caller bounds it by `config.max_bytes` or a window.

        Args:
            run_stage: takes rows through the layers of a stage in the network's stead.
        """
        batch, total = ids.shape
        if total == 0:
            return mx.zeros((batch, 0, self.config.vocab_size))
        last = len(self.config.stages) - 1
        tokens, condition, previous = self.last_sequences(ids, run_stage)
        rows = self._rows_of_stage(last, tokens[..., None], condition, previous)
        hidden = self.local(rows) if run_stage is None else run_stage(last, rows)
        return self.in_order(self.head(hidden), batch, total)

    def last_sequences(self, ids: mx.array, run_stage: RunStage | None = None) -> LastSequences:
        """What the last stage reads for ids [batch, total], of which there is at least one; the last patch is filled up."""
        batch, total = ids.shape
        patch = self.config.patch_size
        patches = -(-total // patch)
        ids = mx.pad(ids, [(0, 0), (0, patches * patch - total)])
        tokens = ids.reshape(batch, patches, patch)
        previous = self._last_ids_before(ids)
        condition = None
        for number, stage in enumerate(self.stages[:-1]):
            rows = self._rows_of_stage(number, tokens, condition, previous)
            hidden = stage.stack(rows) if run_stage is None else run_stage(number, rows)
            length = self.config.stages[number + 1].length
            condition = self.to_next(number, hidden.reshape(-1, hidden.shape[-1]))
            tokens = tokens.reshape(hidden.shape[0] * hidden.shape[1], length, -1)
        assert condition is not None
        return LastSequences(tokens[..., 0], condition, previous)

    def in_order(self, rows: mx.array, batch: int, total: int) -> mx.array:
        """What the last stage's rows [sequences, rows, ...] say of each id: [batch, total, ...]."""
        if self.config.layout == "megabyte_pytorch":
            # The last row of a sequence predicts the first id of the next, whose own leading row predicts nothing.
            per_window = rows.shape[0] // batch
            start = rows[::per_window, :1]
            following = rows[:, 1:].reshape(batch, -1, *rows.shape[2:])
            rows = mx.concatenate([start, following[:, :-1]], axis=1)
        return rows.reshape(batch, -1, *rows.shape[2:])[:, :total]

    def _rows_of_stage(self, number: int, tokens: mx.array, condition: mx.array | None, previous: mx.array | None) -> mx.array:
        """The rows of sequences of stage `number`, of tokens [n, length, bytes of a token]."""
        # The last token only predicts beyond the end, which the last stage of megabyte_pytorch does use: there it
        # predicts the next patch's first byte.
        ends = self.config.layout == "megabyte_pytorch" and number == len(self.config.stages) - 1
        lead = self.leading_row(number, tokens.shape[0], condition, previous)
        rows = self.token_rows(number, tokens[:, : tokens.shape[1] - (not ends)], 0, condition)
        return mx.concatenate([lead, rows], axis=1)

    def logits_of_nothing(self, batch: int) -> mx.array:
        """What megabyte_pytorch predicts for the first byte of an empty prompt: [batch, vocab].

        Its `forward_empty` adds conditions to the leading rows, which its training does not; `__call__` is as
        trained, and generation from nothing is as it generates.
        """
        condition: mx.array | None = None
        for number, stage in enumerate(self.stages):
            row = self.leading_row(number, batch, None, None)
            hidden = stage.stack(row if condition is None else row + condition[:, :1])[:, -1]
            if stage.to_next is not None:
                condition = self.to_next(number, hidden)
        return self.head(hidden)

    def leading_row(self, number: int, batch: int, condition: mx.array | None, previous: mx.array | None) -> mx.array:
        """The row before all tokens of a sequence of stage `number`: [batch, 1, dim_s].

        Args:
            condition: [batch, slots, dim_s] from the stage before; None for the first stage.
            previous: [batch] the id before the sequence (`bos_byte` at the start); read by the paper's layout
                without start tokens alone.
        """
        stage = self.stages[number]
        layout = self.config.layout
        if layout == "prefix":
            row = stage.start if condition is None else condition
            assert row is not None
            row = mx.broadcast_to(row, (batch, 1, stage.config.dim))
            return row if stage.positions is None else row + stage.positions.weight[0]
        if stage.start is not None:
            row = mx.broadcast_to(stage.start, (batch, 1, stage.config.dim))
        elif number == 0:
            blank = mx.full((batch, 1, self.config.patch_size), self.config.bos_byte)
            row = self._embedded(stage, blank, 0)
        else:
            assert previous is not None
            row = self._embedded(stage, previous[:, None, None], 0)
        if layout == "paper" and condition is not None:
            row = row + condition[:, :1]
        return row

    def token_rows(self, number: int, tokens: mx.array, first: int | mx.array, condition: mx.array | None) -> mx.array:
        """Rows of consecutive tokens of a sequence of stage `number`: [batch, n, dim_s].

        Args:
            tokens: [batch, n, bytes per token] ids.
            first: index of the first of them in its sequence; [batch] where sequences differ.
            condition: [batch, slots, dim_s], or None for the first stage.
        """
        stage = self.stages[number]
        # In megabyte_pytorch the leading row has no position and no condition; elsewhere it took index 0 of both.
        index = first if self.config.layout == "megabyte_pytorch" else first + 1
        rows = self._embedded(stage, tokens, index)
        if condition is not None and self.config.layout != "prefix":
            assert isinstance(index, int)
            rows = rows + condition[:, index : index + rows.shape[1]]
        return rows

    def additions(self, condition: mx.array) -> mx.array:
        """What `token_rows` of the last stage adds to the embedding of each token: [batch or 1, tokens, dim_s].

        Args:
            condition: [batch, slots, dim_s].
        """
        stage = self.stages[-1]
        first = 0 if self.config.layout == "megabyte_pytorch" else 1
        tokens = stage.config.length - first
        added = mx.zeros((1, tokens, stage.config.dim))
        if stage.positions is not None:
            added = added + stage.positions.weight[None, first : first + tokens]
        if self.config.layout != "prefix":
            added = added + condition[:, first : first + tokens]
        return added

    def to_next(self, number: int, hidden: mx.array) -> mx.array:
        """Hidden rows [n, dim_s] of stage `number` as the conditions [n, slots, dim_(s+1)] of the next one."""
        stage = self.stages[number]
        assert stage.to_next is not None
        following = self.config.stages[number + 1]
        if self.config.layout == "paper":
            hidden = hidden.reshape(-1, following.length, self.config.byte_width)
        return stage.to_next(hidden).reshape(hidden.shape[0], -1, following.dim)

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden rows of the last stage as float32 logits [..., vocab]."""
        return self.output(hidden).astype(mx.float32)

    def _embedded(self, stage: Stage, tokens: mx.array, index: int | mx.array) -> mx.array:
        """Embeddings of tokens [batch, n, bytes per token] with learned positions from `index` on."""
        batch, count, width = tokens.shape
        per_byte = self.config.layout == "paper" and stage.to_next is not None
        if stage.positions is not None:
            where = mx.arange(count) + (index[:, None] if isinstance(index, mx.array) else index)
            where = mx.maximum(where, 0)  # filler rows of a left-padded batch stand before position 0
        rows = patch_embed(tokens, stage.byte_embedding.weight)
        if stage.positions is not None and per_byte:
            rows = rows + patch_embed(where[..., None] * width + mx.arange(width), stage.positions.weight)
        for part in (stage.patch_norm, stage.patch_projection, stage.projected_norm):
            empty_norm = count == 0 and part is not stage.patch_projection  # which MLX's CUDA backend fails to launch
            if part is not None and not empty_norm:
                rows = part(rows)
        if stage.positions is not None and not per_byte:
            rows = rows + stage.positions(where)
        return rows

    def _last_ids_before(self, ids: mx.array) -> mx.array:
        """For each patch of ids [batch, total] the id before it, `bos_byte` at the start: [batch x patches]."""
        start = mx.full((ids.shape[0], 1), self.config.bos_byte, dtype=ids.dtype)
        shifted = mx.concatenate([start, ids[:, :-1]], axis=1)
        return shifted[:, :: self.config.patch_size].reshape(-1)
