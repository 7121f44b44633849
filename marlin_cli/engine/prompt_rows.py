"""Prompts of unequal length as rows of the global stage: the shorter ones begin later, behind filler patches."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from marlin_cli.engine.states import units_of
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig


class LaidOut(NamedTuple):
    """Prompts of equal phase."""

    patches: mx.array  # [streams, most, patch_size] the whole patches of each, behind its filler
    rest: mx.array  # [streams, n] the ids of the open patch
    before: mx.array  # [streams] the id before it
    filler: list[int]  # [streams] filler patches


def lay_out(prompts: Sequence[bytes], config: MegaByteConfig) -> LaidOut:
    """Cut prompts into whole patches and what is left."""
    units = units_of(config)
    counts = [units.whole(len(prompt)) for prompt in prompts]
    most, ends = max(counts), [count * config.patch_size for count in counts]
    whole = np.zeros((len(prompts), most * config.patch_size), dtype=np.int32)
    for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
        whole[row, whole.shape[1] - end :] = np.frombuffer(prompt[:end], dtype=np.uint8)
    rest = np.array([list(prompt[end:]) for prompt, end in zip(prompts, ends, strict=True)], dtype=np.int32)
    before = [prompt[end - 1] if end else config.bos_byte for prompt, end in zip(prompts, ends, strict=True)]
    return LaidOut(
        mx.array(whole.reshape(len(prompts), most, config.patch_size)),
        mx.array(rest.reshape(len(prompts), -1)),
        mx.array(before),
        [most - count for count in counts],
    )


def global_rows(network: MegaByte, patches: mx.array, padding: mx.array | None, read: int | None) -> mx.array:
    """What the global stage reads: [streams, n, dim].

    Args:
        patches: see `LaidOut`.
        padding: [streams] filler patches, if any.
        read: patches of a single prompt that have been read already, the leading row with them; None if not even that has.
    """
    first: int | mx.array = (read or 0) if padding is None else -padding
    rows = network.token_rows(0, patches[:, read or 0 :], first, None)
    if read is not None:
        return rows
    lead = network.leading_row(0, patches.shape[0], None, None)
    shifted = mx.concatenate([lead, rows], axis=1)
    if padding is None:
        return shifted
    # A filler patch stands where nothing is read; the leading row follows the filler of each stream.
    where, at = mx.arange(shifted.shape[1])[None, :, None], padding[:, None, None]
    return mx.where(where == at, lead, mx.where(where < at, mx.zeros_like(shifted), shifted))
