"""SpaceByte (arXiv 2404.14408, kjslag/spacebyte): a transformer of patches between two of bytes.

A byte between words begins a patch. Bytes pass the initial blocks; the rows of those that begin a patch are made wider and pass
the global blocks, and what these come to is added to the same bytes; then all pass the final blocks. What a patch says reaches
its other bytes through the attention of the final blocks alone.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from marlin_cli.models.layer_cache import LayerCache
from marlin_cli.models.megabyte_config import StageConfig
from marlin_cli.models.megabyte_layers import Attention, FeedForward, make_norm
from marlin_cli.models.spacebyte_config import SpaceByteConfig
from marlin_cli.models.spacebyte_patches import Before, Begun, patches_begun
from marlin_cli.models.unequal_patches import at_rows, patches_of
from marlin_cli.ops import Linear

Caches = Sequence[LayerCache] | None

# What is predicted where a text has no room for another patch: the id that ends it, for sure.
SURE = 1e4


class Block(nn.Module):
    def __init__(self, config: SpaceByteConfig, stage: StageConfig, window: int | None) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, stage.dim)
        self.attention = Attention(config, stage, window)
        self.ffn_norm = make_norm(config, stage.dim)
        self.ffn = FeedForward(config, stage)

    def __call__(self, x: mx.array, cache: LayerCache | None = None) -> mx.array:
        x = x + self.attention(self.attention_norm(x), cache)
        return x + self.ffn(self.ffn_norm(x))


class Stack(nn.Module):
    def __init__(self, config: SpaceByteConfig, stage: StageConfig, layers: int, window: int | None) -> None:
        super().__init__()
        self.layers = [Block(config, stage, window) for _ in range(layers)]

    def __call__(self, x: mx.array, caches: Caches = None) -> mx.array:
        for index, layer in enumerate(self.layers):
            x = layer(x, None if caches is None else caches[index])
        return x


class SpaceByte(nn.Module):
    """The network: ids in, logits of the ids after them out. What is remembered stands in `marlin_cli.engine`."""

    def __init__(self, config: SpaceByteConfig) -> None:
        super().__init__()
        self.config = config
        local, patches = config.local_stage, config.global_stage
        self.byte_embedding = nn.Embedding(config.vocab_size, local.dim)
        self.local_positions = nn.Embedding(config.ids, local.dim)
        self.initial = Stack(config, local, config.initial_layers, config.local_window)
        self.global_positions = nn.Embedding(config.max_patches, patches.dim)
        self["global"] = Stack(config, patches, config.global_layers, config.global_window)
        self.final = Stack(config, local, config.final_layers, config.local_window)
        self.norm = make_norm(config, local.dim)
        self.output = Linear(local.dim, config.vocab_size, bias=False)

    def __call__(self, ids: mx.array) -> mx.array:
        """Logits [n, rows, vocab] float32 of what follows each of ids [n, rows] of texts from their beginning.

        A text that has no room for a patch ends there, as the authors' code has it.
        """
        begun = self.begun(ids)
        return self.ended(self.head(self.decode(ids, begun)), begun.beyond)

    def predictions(self, windows: mx.array, run: Callable[[mx.array], mx.array] | None = None) -> mx.array:
        """Logits [n, length, vocab] float32 of bytes [n, length]: row i is of byte i given those before it.

        Bytes that have no room for their patch are predicted without one; the authors' code leaves them out of its loss.
        """
        ids = windows.astype(mx.int32)
        decode = run or (lambda led: self.head(self.decode(led, self.begun(led))))
        return decode(self.led(ids[:, : max(0, ids.shape[1] - 1)]))[:, : ids.shape[1]]

    def led(self, ids: mx.array) -> mx.array:
        """Ids [n, total] of texts with the mark before them."""
        return mx.pad(ids, [(0, 0), (1, 0)], constant_values=self.config.start_id)

    def begun(self, ids: mx.array, before: Before | None = None) -> Begun:
        """Where patches begin among ids [n, rows]; without `before`, of texts from their beginning."""
        return patches_begun(np.array(ids).astype(np.int64), self.config, before or Before.nothing(ids.shape[0]))

    def embedded(self, ids: mx.array, first_row: int = 0) -> mx.array:
        """Rows [n, rows, local_dim] of ids [n, rows], the first of which stands at `first_row`."""
        return self.byte_embedding(ids) + self.local_positions.weight[first_row : first_row + ids.shape[1]]

    def rows_of_patches(self, x: mx.array, places: mx.array, numbers: mx.array) -> mx.array:
        """What the global blocks read of the bytes at `places` [n, count] of rows x, as patches of these numbers [n, count]."""
        wider = self.config.global_dim - self.config.local_dim
        return mx.pad(at_rows(x, places), [(0, 0), (0, 0), (wider, 0)]) + self.global_positions(
            mx.minimum(numbers, self.config.max_patches - 1)  # of filler
        )

    def with_patches(self, x: mx.array, patches: mx.array, first: mx.array) -> mx.array:
        """Rows x [n, rows, local_dim] to which patches [n, count, global_dim] have been added where they begin (`first`)."""
        own = mx.maximum(mx.cumsum(first.astype(mx.int32), axis=1) - 1, 0)
        added = at_rows(patches[..., -self.config.local_dim :], own)
        return x + mx.where(first[..., None], added, mx.zeros_like(added))

    def decode(self, ids: mx.array, begun: Begun) -> mx.array:
        """Hidden rows [n, rows, local_dim] of ids [n, rows] of texts from their beginning."""
        x = self.initial(self.embedded(ids))
        places = patches_of(begun.first).last
        y = self["global"](self.rows_of_patches(x, places, mx.arange(places.shape[1])[None]))
        return self.norm(self.final(self.with_patches(x, y, mx.array(begun.first))))

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden rows as float32 logits [..., vocab] of the next id."""
        return self.output(hidden).astype(mx.float32)

    def ended(self, logits: mx.array, beyond: np.ndarray) -> mx.array:
        """Logits [.., vocab] that say where texts have ended, `beyond` [..], that they have."""
        if not beyond.any():
            return logits
        sure = mx.where(mx.arange(self.config.vocab_size) == self.config.start_id, SURE, -SURE)
        return mx.where(mx.array(beyond)[..., None], sure, logits)
