"""Texts that run side by side through a network of characters, padded where it needs that."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from marlin_cli.models.canine import CanineConfig
from marlin_cli.models.canine_ids import characters_of, padded_to
from marlin_cli.models.la_canine import LaCanineConfig


@dataclass(frozen=True)
class TextBatch:
    """Texts that run side by side.

    Attributes:
        ids: [texts, total] code points, marks included where the network has them.
        lengths: [texts] real ids of each; None where all are.
        types: [texts, total] kinds of text; None: all 0.
        size_bytes: of the corpus that went into them.
    """

    ids: mx.array
    lengths: mx.array | None
    types: mx.array | None
    size_bytes: int


def batch_of(texts: Sequence[bytes], config: CanineConfig | LaCanineConfig, total: int = 0) -> TextBatch:
    """These texts, of which there is at least one, padded to `total` positions, or to the longest where it is longer.

    Raises:
        InputError: one of them is no UTF-8.
    """
    rows = [config.input_of(characters_of(text).ids)[0] for text in texts]
    counts = np.array([len(row) for row in rows])
    length = config.length_of(max(total, int(counts.max())))
    lengths = None if counts.min() == length else mx.array(counts)
    return TextBatch(padded_to(rows, length, config.padding), lengths, None, sum(map(len, texts)))
