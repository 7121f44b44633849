"""Texts that run side by side through a network of characters, padded where it needs that."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from marlin_cli.models.canine import CanineConfig
from marlin_cli.models.canine_ids import characters_of, padded_to, settled_length
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


def alone(text: bytes, config: CanineConfig | LaCanineConfig) -> mx.array:
    """The ids [1, positions] of a text by itself, without the last few characters where these would need filler.

    Raises:
        InputError: it is no UTF-8.
    """
    ids, _ = config.input_of(characters_of(text).ids)
    filler = config.length_of(len(ids)) - len(ids)
    return mx.array(ids[: len(ids) - (config.downsample_factor - filler) % config.downsample_factor][None])


def batch_of(texts: Sequence[bytes], config: CanineConfig | LaCanineConfig, *, settled: bool = False) -> TextBatch:
    """These texts, of which there is at least one, padded to the longest.

    Args:
        settled: padded so far that more padding would change no state, or as far as the network reads.

    Raises:
        InputError: one of them is no UTF-8.
    """
    rows = [config.input_of(characters_of(text).ids)[0] for text in texts]
    counts = np.array([len(row) for row in rows])
    longest = int(counts.max())
    wanted = min(settled_length(longest, config.downsample_factor), config.longest) if settled else longest
    length = config.length_of(max(longest, wanted))
    lengths = None if counts.min() == length else mx.array(counts)
    return TextBatch(padded_to(rows, length, config.padding), lengths, None, sum(map(len, texts)))
