"""Inputs with their answers as one padded array each: what a network that answers takes of a corpus at once."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class PairBatch:
    """Pairs that run side by side, teacher-forced.

    Attributes:
        source: [pairs, total] ids of the inputs and their ends.
        lengths: [pairs] real ids of each input; None where all are.
        target: [pairs, rows] ids that the decoder reads, the start first.
        rows: [pairs] real rows of the decoder for each pair, which predict the answer's bytes and its end.
        size_bytes: of the corpus that went into them.
    """

    source: mx.array
    lengths: mx.array | None
    target: mx.array
    rows: npt.NDArray[np.int64]
    size_bytes: int

    @property
    def places(self) -> npt.NDArray[np.int64]:
        """Where the real rows of the decoder stand among all [pairs x rows], pair after pair."""
        return np.flatnonzero(np.arange(self.target.shape[1]) < self.rows[:, None])
