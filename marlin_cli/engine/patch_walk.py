"""A patch of several streams, from its condition to its ids: every stage below the global one, which begins anew with it."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.engine.fused import FusedStages
from marlin_cli.engine.sampling import Draws
from marlin_cli.models.megabyte import MegaByte


class PatchWalk:
    """Walks through a patch when it is made.

    Args:
        condition: [streams, slots, dim] of the patch.
        before: [streams] the ids before it.
        given: by stream, the ids that stand in it already; at most one beyond its end.
        draws: how the ids after them are drawn.
        places: how many ids each stream has in the end: those of the patch at most, and in megabyte_pytorch the one after it,
            which the end of a patch predicts.

    Attributes:
        ids: [streams, places] those that were given among them, -1 where the model gave no numbers.
        logits: [streams, places, vocab] that they were drawn from, if they are asked for.
    """

    def __init__(
        self,
        network: MegaByte,
        fused: FusedStages,
        condition: mx.array,
        before: mx.array,
        given: Sequence[Sequence[int]],
        draws: Draws,
        places: int,
        *,
        with_logits: bool = False,
    ) -> None:
        self._network, self._fused, self._before, self._draws = network, fused, before, draws
        self._stages = network.config.stages
        self._ahead = 1 if network.config.layout == "megabyte_pytorch" else 0
        streams = len(given)
        self._known = np.array([len(own) for own in given])  # ids of each stream so far, and so at first
        self._given = self._known.copy()
        self.ids: npt.NDArray[np.int32] = np.zeros((streams, places), dtype=np.int32)
        for row, own in enumerate(given):
            self.ids[row, : len(own)] = own[:places]
        self.logits: npt.NDArray[np.float32] | None = None
        if with_logits:
            self.logits = np.zeros((streams, places, network.config.vocab_size), dtype=np.float32)
        self._sequence(1, condition, 0)

    @property
    def _places(self) -> int:
        return self.ids.shape[1]

    def _sequence(self, number: int, condition: mx.array, start: int) -> None:
        """A sequence of stage `number`, whose first id stands at place `start`."""
        if number == len(self._stages) - 1:
            return self._decode(condition, start)
        network, width = self._network, self._network.config.bytes_per_token(number)
        cache = self._fused.new_cache(number, len(self.ids), [])
        rows = network.leading_row(number, len(self.ids), condition, self._before)
        for token in range(self._stages[number].length):
            self._sequence(number + 1, network.to_next(number, cache.run(rows)[:, -1]), start + token * width)
            end = start + (token + 1) * width
            if end >= self._places:
                return
            rows = network.token_rows(number, mx.array(np.maximum(self.ids[:, None, end - width : end], 0)), token, condition)

    def _decode(self, condition: mx.array, start: int) -> None:
        """A sequence of the last stage: the kernels draw it in one call."""
        network, last = self._network, len(self._stages) - 1
        end = min(self._places, start + self._stages[last].length + self._ahead)
        lead = network.leading_row(last, len(self.ids), condition, self._before)[:, 0]
        noise = [
            each[have - given :] if each.size else each
            for each, have, given in zip(self._draws.noise, self._known, self._given, strict=True)
        ]
        known = np.clip(self._known - start, 0, end - start)
        found, logits = self._fused.decode_sequence(
            lead, network.additions(condition), mx.array(self.ids[:, start:end]), known.tolist(), end - start,
            self._draws._replace(noise=noise), with_logits=self.logits is not None,
        )  # fmt: skip
        self.ids[:, start:end] = np.array(found)
        if self.logits is not None:
            for row, have in enumerate(known):
                self.logits[row, start + have : end] = np.array(logits)[row, have:]
        self._known = np.maximum(self._known, end)
