"""MegaByte (arXiv 2305.07185): a global transformer over patches of bytes, a local one over the bytes of each patch.

Three layouts are run as their weights need them; each stage works on *rows*, a leading row and then one per token:

- `prefix`, marlin's own: the leading row of a local patch is the projected global state, bytes follow.
- `paper`: the global state is cut into one slice a byte, projected, and added to the byte before it.
- `megabyte_pytorch` (lucidrains/MEGABYTE-pytorch 0.3.6, two stages or more): start vectors lead, the state is
  added from the first byte on, and the first byte of a patch is predicted by the last row of the patch before.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import mlx.core as mx
import mlx.nn as nn

from marlin_cli.models.megabyte_config import MegaByteConfig, StageConfig
from marlin_cli.models.megabyte_layers import Stack
from marlin_cli.ops import Linear, patch_embed

# The number of a stage and its rows [batch, n, dim_s] to hidden rows of the same shape.
RunStage: TypeAlias = Callable[[int, mx.array], mx.array]


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
        rows = self._rows_of_stage(0, ids.reshape(batch, patches, patch), None, None)
        hidden = self.stages[0].stack(rows) if run_stage is None else run_stage(0, rows)
        condition = self.to_next(0, hidden.reshape(-1, hidden.shape[-1]))
        return self.sequences_of(ids.reshape(-1, patch), condition, self._last_ids_before(ids), run_stage)

    def sequences_of(
        self, patches: mx.array, condition: mx.array, previous: mx.array, run_stage: RunStage | None = None
    ) -> LastSequences:
        """What the last stage reads for patches [n, patch_size] of which the global stage has given the conditions.

        Args:
            condition: [n, slots, dim_1].
            previous: [n] the id before each patch, see `leading_row`.
        """
        tokens = patches.reshape(patches.shape[0], self.config.stages[1].length, -1)
        for number, stage in enumerate(self.stages[1:-1], start=1):
            rows = self._rows_of_stage(number, tokens, condition, previous)
            hidden = stage.stack(rows) if run_stage is None else run_stage(number, rows)
            condition = self.to_next(number, hidden.reshape(-1, hidden.shape[-1]))
            tokens = tokens.reshape(hidden.shape[0] * hidden.shape[1], self.config.stages[number + 1].length, -1)
        return LastSequences(tokens[..., 0], condition, previous)

    def in_patches(self, rows: mx.array, patches: int) -> mx.array:
        """What the last stage's rows [sequences, rows, ...] say of the ids of patches: [patches, patch_size, ...].

        In megabyte_pytorch these are the ids after the first one, and the first one of the patch that follows.
        """
        rows = rows[:, 1:] if self.config.layout == "megabyte_pytorch" else rows
        return rows.reshape(patches, -1, *rows.shape[2:])

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
