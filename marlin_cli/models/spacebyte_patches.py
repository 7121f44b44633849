"""Which bytes begin a patch of a SpaceByte. No weights.

By the rule `utf8` a byte does that is no letter, no digit and no byte within a character of UTF-8, where the one before it is
one of these; and the mark of a beginning. By `periodic` every so many bytes do.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from marlin_cli.models.spacebyte_config import SpaceByteConfig

Flags = npt.NDArray[np.bool_]  # [texts, rows]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Before:
    """What came before some ids of texts.

    Attributes:
        rows: ids of each.
        between_words: [texts], was the last one no part of a word?
        patches: [texts], patches that have begun, those beyond the model's most among them.
    """

    rows: int
    between_words: npt.NDArray[np.bool_]
    patches: Counts

    @staticmethod
    def nothing(texts: int) -> "Before":
        """Texts begin."""
        return Before(0, np.zeros(texts, np.bool_), np.zeros(texts, np.int64))

    def of(self, texts: list[int]) -> "Before":
        """Of these texts, in this order."""
        return Before(self.rows, self.between_words[texts], self.patches[texts])


@dataclass(frozen=True)
class Begun:
    """Patches that begin among some ids of texts.

    Attributes:
        first: which ids begin a patch that the model has room for.
        beyond: which ids come after the last one that it has room for: their text has ended.
        after: what the next ids have before them.
    """

    first: Flags
    beyond: Flags
    after: Before


def between_words(ids: npt.NDArray[np.int64]) -> Flags:
    """Which ids are no letter, no digit, and no byte within a character of UTF-8."""
    letter = ((ids | 32) >= ord("a")) & ((ids | 32) <= ord("z")) & (ids < 128)
    digit = (ids >= ord("0")) & (ids <= ord("9"))
    within = (ids >= 0x80) & (ids < 0xC0)
    found: Flags = ~(letter | digit | within)
    return found


def patches_begun(ids: npt.NDArray[np.int64], config: SpaceByteConfig, before: Before) -> Begun:
    """Where patches begin among ids [texts, rows], which follow those `before`."""
    rows = ids.shape[1]
    between = between_words(ids)
    if config.patch_rule == "periodic":
        first = np.broadcast_to((before.rows + np.arange(rows)) % config.patch_bytes == 0, ids.shape).copy()
    else:
        first = between & ~np.concatenate([before.between_words[:, None], between[:, :-1]], axis=1)
        first |= ids == config.start_id
    through = before.patches[:, None] + first.cumsum(axis=1)
    beyond = through > config.max_patches
    last = between[:, -1] if rows else before.between_words
    patches = through[:, -1] if rows else before.patches
    return Begun(first & ~beyond, beyond, Before(before.rows + rows, last, patches))
