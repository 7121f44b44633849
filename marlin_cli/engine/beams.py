"""Beam search for one input: log-probabilities in, the ids of its beams out. Equals that of transformers 5."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from marlin_cli.errors import UsageError

# What transformers adds to the score of a beam that may not be chosen; finite, so that order among such is kept.
BARRED = np.float32(-1e9)

# Powers beyond it would leave the range of numbers at lengths that occur.
LARGEST_PENALTY = 16


@dataclass(frozen=True)
class Beams:
    """Settings of a beam search, with the meanings of transformers' `generate`.

    Raises:
        UsageError: a number below 1, more answers than beams, or a penalty beyond all sense.
    """

    count: int = 4
    answers: int = 1  # the n best
    length_penalty: float = 1.0  # a score is the log-probability over length ** penalty
    early_stopping: bool | Literal["never"] = False  # True: stop at `count` finished; never: only when none can improve

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"beams must be at least 1, found {self.count}")
        if not abs(self.length_penalty) <= LARGEST_PENALTY:
            raise UsageError(
                f"length_penalty must be from -{LARGEST_PENALTY} to {LARGEST_PENALTY}, found {self.length_penalty}"
            )
        if not 1 <= self.answers <= self.count:
            raise UsageError(f"{self.answers} answers need as many beams, found {self.count}")


class Hypothesis(NamedTuple):
    """The ids after the prefix, the end among them where there is one, and the score."""

    ids: tuple[int, ...]
    score: np.float32
    finished: bool


class BeamSearch:
    """The beams of one input.

    Args:
        most: ids after the prefix at most.
    """

    def __init__(self, settings: Beams, most: int) -> None:
        self._settings, self._most = settings, most
        self._length = 0
        # All beams are equal at first: only the first one counts.
        self._scores = np.where(np.arange(settings.count) > 0, BARRED, np.float32(0)).astype(np.float32)
        self.running: list[tuple[int, ...]] = [()] * settings.count
        self._best = [Hypothesis((), BARRED, False)] * settings.count
        self._may_improve = True
        self.done = most == 0

    @property
    def answers(self) -> list[Hypothesis]:
        """The best finished ones, best first."""
        return [each for each in self._best if each.finished][: self._settings.answers]

    def step(self, log_probabilities: npt.NDArray[np.float32], ends: frozenset[int]) -> tuple[list[int], list[int]]:
        """Take log-probabilities [beams, vocab] of the next id; the beams to go on from, and the id of each.

        Args:
            ends: ids that finish an answer.
        """
        count = self._settings.count
        totals = (log_probabilities + self._scores[:, None]).reshape(-1)
        # One end a beam at most: among twice as many there are `count` that go on.
        order = np.argsort(-totals, kind="stable")[: max(2, 1 + len(ends)) * count]
        beams, ids = np.divmod(order, log_probabilities.shape[1])
        candidates = [(*self.running[beam], int(value)) for beam, value in zip(beams, ids, strict=True)]
        self._length += 1
        full = self._length >= self._most
        hits = np.array([full or int(value) in ends for value in ids])
        self._update_best(candidates, totals[order], hits)
        going = np.argsort(-(totals[order] + hits.astype(np.float32) * BARRED), kind="stable")[:count]
        self._scores = (totals[order] + hits.astype(np.float32) * BARRED)[going]
        self.running = [candidates[index] for index in going]
        self._check_improvement()
        all_finished = all(each.finished for each in self._best)
        self.done = not self._may_improve or (all_finished and self._settings.early_stopping is True) or bool(hits.all())
        return [int(beams[index]) for index in going], [int(ids[index]) for index in going]

    def _update_best(
        self, candidates: list[tuple[int, ...]], totals: npt.NDArray[np.float32], hits: npt.NDArray[np.bool_]
    ) -> None:
        settings = self._settings
        scores = totals / np.float32(self._length**settings.length_penalty)
        if settings.early_stopping is True and all(each.finished for each in self._best):
            scores = scores + BARRED
        finished = hits & (np.arange(len(candidates)) < settings.count)
        merged = [
            *self._best,
            *(
                Hypothesis(ids, np.float32(score + (np.float32(0) if end else BARRED)), bool(end))
                for ids, score, end in zip(candidates, scores, finished, strict=True)
            ),
        ]
        self._best = sorted(merged, key=lambda each: -each.score)[: settings.count]

    def _check_improvement(self) -> None:
        settings = self._settings
        longest = self._most if settings.early_stopping == "never" and settings.length_penalty > 0 else self._length
        possible = self._scores[0] / np.float32(longest**settings.length_penalty)
        worst = min(each.score for each in self._best)
        self._may_improve = any(possible > (worst if each.finished else BARRED) for each in self._best)
