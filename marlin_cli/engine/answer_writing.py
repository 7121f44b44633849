"""How the answers to one input come about: an id after the other of a single one, or by beams; and what is told of them."""

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from marlin_cli.engine.answer_requests import Answer, AnswerLimits
from marlin_cli.engine.beams import Beams, BeamSearch
from marlin_cli.engine.scheduling import NOT_FINITE, Cost
from marlin_cli.engine.stopping import StopMatcher
from marlin_cli.models.byt5_ids import FIRST_BYTE, FIRST_SPECIAL, bytes_with_sentinels, ids_of_bytes


class OneAnswer:
    """The only answer to an input, greedy or drawn.

    Args:
        stream: the input's number.
        ends: ids of which any ends an answer.
    """

    def __init__(self, stream: int, limits: AnswerLimits, ends: tuple[int, ...]) -> None:
        self._stream, self._limits, self._ends = stream, limits, ends
        self._prefix = ids_of_bytes(limits.prefix)
        self._stop = [ids_of_bytes(each) for each in limits.stop]
        self._own: list[int] = []
        self._total = 0.0  # log-probability

    @property
    def forbidden(self) -> tuple[int, ...]:
        """Ids that may not come next."""
        return self.forbidden_behind(0)

    def forbidden_behind(self, ids: int) -> tuple[int, ...]:
        """Ids that may not come behind so many more."""
        return self._ends if len(self._own) + ids < self._limits.min_length else ()

    @property
    def left(self) -> int:
        """Ids that may come yet."""
        return self._limits.max_length - len(self._own)

    def take(self, value: int, cost: float) -> tuple[bool, Answer | None]:
        """Append an id of this cost; whether it is part of the answer, and the answer if it has ended."""
        self._total -= cost
        if not math.isfinite(cost):
            return False, self._answer(NOT_FINITE, 0)
        if value in self._ends:
            return False, self._answer("end", 0)
        self._own.append(value)
        cut = next((len(each) for each in self._stop if self._own[-len(each) :] == each), 0)
        reason = "stop" if cut else "length" if len(self._own) >= self._limits.max_length else None
        return True, None if reason is None else self._answer(reason, cut)

    def empty(self) -> Answer:
        """The answer of no ids after the prefix."""
        return self._answer("length", 0)

    def _answer(self, reason: str, cut: int) -> Answer:
        ids = (*self._prefix, *self._own[: len(self._own) - cut])
        # As of beams, whose length penalty is 1 unless told otherwise.
        return Answer(self._stream, 0, ids, self._total / max(1, len(self._own) + (reason == "end")), reason)


class SearchedAnswers:
    """The answers to an input that beams find. See `OneAnswer`."""

    def __init__(self, stream: int, limits: AnswerLimits, beams: Beams, ends: tuple[int, ...]) -> None:
        self._stream, self._limits, self._ends, self._steps = stream, limits, ends, 0
        self._search = BeamSearch(beams, limits.max_length)

    @property
    def done(self) -> bool:
        return self._search.done

    def take(self, log_probabilities: npt.NDArray[np.float32]) -> tuple[list[int], list[int]]:
        """Take log-probabilities [beams, vocab] of the next id; the beams to go on from, and the id of each."""
        if self._steps < self._limits.min_length:
            log_probabilities = log_probabilities.copy()
            log_probabilities[:, list(self._ends)] = -np.inf
        self._steps += 1
        return self._search.step(log_probabilities, frozenset(self._ends))

    def answers(self) -> tuple[Answer, ...]:
        """The best ones, best first."""
        prefix = ids_of_bytes(self._limits.prefix)
        found = []
        for rank, each in enumerate(self._search.answers):
            ended = bool(each.ids) and each.ids[-1] in self._ends
            ids = (*prefix, *each.ids[: len(each.ids) - ended])
            found.append(Answer(self._stream, rank, ids, float(each.score), "end" if ended else "length"))
        return tuple(found)


class Telling:
    """The bytes of an answer as they are free to go, the prefix first, and the costs of their ids.

    Args:
        sentinels: texts stand for ids that are no bytes, which else leave nothing.
    """

    def __init__(self, limits: AnswerLimits, *, sentinels: bool) -> None:
        self._lead, self._matcher, self._sentinels = limits.prefix, StopMatcher(limits.stop), sentinels
        self._costs: deque[Cost | None] = deque()  # of each byte that is held back
        self._pushed = False

    def push(self, value: int, cost: Cost | None) -> tuple[bytes, tuple[Cost, ...]]:
        """What is free to go after an id."""
        self._pushed = True
        if FIRST_BYTE <= value < FIRST_SPECIAL:
            self._costs.append(cost)
            data, _ = self._matcher.push(value - FIRST_BYTE)
            return self._led(data), self._costs_of(len(data))
        # No stop sequence goes on over a special id.
        held = self._matcher.flush()
        costs = self._costs_of(len(held))
        text = bytes_with_sentinels([value]) if self._sentinels else b""
        return self._led(held + text), (*costs, *([cost] if text and cost is not None else []))

    def end(self, answers: Sequence[Answer]) -> tuple[bytes, tuple[Cost, ...]]:
        """What is left when the answers are there; all of the best one if nothing was pushed, as of beams."""
        if not self._pushed and answers:
            return (bytes_with_sentinels(answers[0].ids) if self._sentinels else answers[0].data), ()
        data = self._matcher.flush()
        return self._led(data), self._costs_of(len(data))

    def _led(self, data: bytes) -> bytes:
        lead, self._lead = self._lead, b""
        return lead + data

    def _costs_of(self, count: int) -> tuple[Cost, ...]:
        found = [self._costs.popleft() for _ in range(count)]
        return tuple(cost for cost in found if cost is not None)
