"""What the attention of a layer asks of what is remembered of earlier rows; `marlin_cli.engine` has it."""

from typing import Protocol

import mlx.core as mx


class LayerCache(Protocol):
    """What one layer remembers of the rows it has seen."""

    @property
    def offset(self) -> int | mx.array:
        """Rows seen so far: the position of the next one; [batch] where sequences differ."""

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None) -> mx.array:
        """Append keys and values, and attend over all rows so far. Shapes as in `ops.attention`."""
