"""Drafted patches of several streams against the model: one pass of the stages below the global one over all of them.

Patches stand one after the other, each with the condition that the global stage has given for it if those before it are right.
What a stream would have drawn is drawn at every place, with its own noise, and its draft is right as far as that is the same.
"""

from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.engine.drafts import common_length
from marlin_cli.engine.fused import FusedStages
from marlin_cli.engine.sampling import draw
from marlin_cli.engine.streams import Ask, Floats
from marlin_cli.models.megabyte_config import MegaByteConfig

Ids = npt.NDArray[np.int32]


class DraftedPatches(NamedTuple):
    """What a stream may go on with.

    Attributes:
        patches: [n, patch_size], of which the first begins with ids that are known.
        given: how many.
        before: the id before them.
        row: of the first patch's condition, whose followers' stand behind it.
    """

    patches: Ids
    given: int
    before: int
    row: int


class Outcome(NamedTuple):
    """What became of the drafted patches of a stream.

    Attributes:
        ids: that were drawn, the last of which no draft needs to have had; -1 where the model gave no numbers.
        logits: [ids, vocab] that they were drawn from, if they are asked for.
        text: the known ids and those drawn, from the beginning of the first patch.
        whole: how many patches of it are over.
        open: the ids of the text behind them.
        is_open: do they begin a patch, or are they what is known of the next one wherever one ends?
    """

    ids: list[int]
    logits: Floats | None
    text: list[int]
    whole: int
    open: list[int]
    is_open: bool


def verified(
    config: MegaByteConfig,
    fused: FusedStages,
    condition: mx.array,
    drafts: Mapping[int, DraftedPatches],
    asks: Mapping[int, Ask],
) -> dict[int, Outcome]:
    """What became of drafts, by stream.

    Args:
        condition: [rows, slots, dim], in which each draft has those of its patches.
    """
    rows = [draft.row + patch for draft in drafts.values() for patch in range(len(draft.patches))]
    patches = np.concatenate([draft.patches for draft in drafts.values()])
    before = np.concatenate([[draft.before, *draft.patches[:-1, -1]] for draft in drafts.values()])
    own = condition if rows == list(range(condition.shape[0])) else condition[mx.array(rows)]
    logits = fused.predictions_of_patches(mx.array(patches), own, mx.array(before.astype(np.int32)))
    logits = logits.reshape(-1, logits.shape[-1])
    found, start = {}, 0
    for number, draft in drafts.items():
        end = start + draft.patches.size
        found[number] = _outcome(config, logits[start:end], draft, asks[number])
        start = end
    return found


def _outcome(config: MegaByteConfig, logits: mx.array, draft: DraftedPatches, ask: Ask) -> Outcome:
    """What became of one draft, of logits [ids, vocab] for every place of it behind those that are known."""
    noise = ask.noise.take(len(logits)) if ask.settings.temperature else None
    values, costs = draw(logits, [()], [ask.settings], None if noise is None else mx.array(noise))
    drawn = [value if np.isfinite(cost) else -1 for value, cost in zip(values, costs, strict=True)]
    known = draft.patches.reshape(-1).tolist()
    count = min(len(drawn), common_length(drawn, known[draft.given :]) + 1)
    if noise is not None:
        ask.noise.give_back(noise[count:])
    ids = drawn[:count]
    text = [*known[: draft.given], *(max(value, 0) for value in ids)]
    # In megabyte_pytorch a patch is over when the id after it is drawn, too: it knows as many as `given` of the next one.
    whole = (len(text) - draft.given) // config.patch_size
    told = np.array(logits[:count]) if ask.with_logits else None
    behind = text[whole * config.patch_size :]
    return Outcome(ids, told, text, whole, behind, len(behind) > draft.given)
