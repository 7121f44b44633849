"""Answers of ByT5: inputs as ids in, bytes out as they are decoded, for one input or many of unequal lengths."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from marlin_cli.engine.beams import Beams, BeamSearch
from marlin_cli.engine.encoder_decoder import AnswerState
from marlin_cli.engine.finite import not_finite
from marlin_cli.engine.sampling import Noise, Sampling, draw, without
from marlin_cli.errors import UsageError
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.byt5_ids import bytes_of_ids, ids_of_bytes


@dataclass(frozen=True)
class AnswerLimits:
    """How an answer begins and ends. Numbers count ids after the prefix: bytes, special ids and the end.

    Raises:
        UsageError: numbers that contradict each other, or an empty stop sequence.
    """

    max_length: int = 256
    min_length: int = 0  # none of the model's ends before so many ids
    prefix: bytes = b""  # what every answer begins with; part of the answer
    stop: tuple[bytes, ...] = ()  # byte sequences that end an answer; they are not part of it

    def __post_init__(self) -> None:
        if not 0 <= self.min_length <= self.max_length:
            raise UsageError(f"min_length {self.min_length} must be from 0 to max_length ({self.max_length})")
        if any(not sequence for sequence in self.stop):
            raise UsageError("a stop sequence is empty; give at least one byte")


@dataclass(frozen=True)
class Answer:
    """One answer to one input."""

    stream: int  # which input
    rank: int  # 0 for the best
    ids: tuple[int, ...]  # prefix included, the end and what ended it left out
    score: float  # log-probability of the ids after the prefix, the end included; of beams, over length ** penalty
    stop_reason: str  # end: one of the model's own; stop: a stop sequence; length: max_length reached

    @property
    def data(self) -> bytes:
        """The bytes; special ids are left out."""
        return bytes_of_ids(self.ids)


def answer(
    network: ByT5,
    sources: Sequence[Sequence[int]],
    limits: AnswerLimits,
    sampling: Sampling | None = None,
    *,
    memory_bits: int = 16,
) -> Iterator[list[tuple[int, int | Answer]]]:
    """Decode one answer to each input, all side by side: greedy, or as `sampling` says.

    Yields:
        After each step what is new: (input, id), or (input, answer) for one that has ended. An input has the same
        answer alone and in a batch.

    Raises:
        CheckpointError: predictions that are not finite.
    """
    sampling = sampling or Sampling()
    prefix = ids_of_bytes(limits.prefix)
    ends = network.config.answer_ends
    if not sources:
        return
    state = AnswerState(network, sources, memory_bits=memory_bits)
    for value in prefix:
        state.push(mx.full((len(sources),), value, dtype=mx.int32))
    streams = list(range(len(sources)))
    written: list[list[int]] = [[] for _ in streams]
    scores = [0.0] * len(streams)
    noise = Noise(sampling.seed, network.config.vocab_size)
    if limits.max_length == 0:
        yield [(stream, Answer(stream, 0, tuple(prefix), 0.0, "length")) for stream in streams]
        return
    while True:
        forbidden = ends if len(written[streams[0]]) < limits.min_length else ()
        values, costs = draw(state.logits, [forbidden], [sampling], noise.take(1) if sampling.temperature else None)
        news: list[tuple[int, int | Answer]] = []
        going = []
        for row, (stream, value, cost) in enumerate(zip(streams, values, costs, strict=True)):
            if not math.isfinite(cost):
                raise not_finite()
            scores[stream] -= cost
            own = written[stream]
            reason, cut = None, 0
            if value in ends:
                reason = "end"
            else:
                own.append(value)
                news.append((stream, value))
                cut = _stopped(own, limits.stop)
                reason = "stop" if cut else "length" if len(own) >= limits.max_length else None
            if reason is None:
                going.append(row)
            else:
                ids_left = (*prefix, *own[: len(own) - cut])
                news.append((stream, Answer(stream, 0, ids_left, scores[stream], reason)))
        yield news
        if not going:
            return
        if len(going) < len(streams):
            streams = [streams[row] for row in going]
            state.keep(going, going)
        state.push(mx.array([values[row] for row in going], dtype=mx.int32))


def answer_with_beams(
    network: ByT5,
    sources: Sequence[Sequence[int]],
    limits: AnswerLimits,
    beams: Beams,
    *,
    memory_bits: int = 16,
) -> list[list[Answer]]:
    """The best answers to each input, best first, by beam search over all inputs side by side.

    Raises:
        UsageError: stop sequences, which beams do not take.
        CheckpointError: predictions that are not finite.
    """
    if limits.stop:
        raise UsageError("stop sequences do not go with beams; use the end id, or no beams")
    if not sources:
        return []
    prefix, ends = ids_of_bytes(limits.prefix), network.config.answer_ends
    searches = [BeamSearch(beams, limits.max_length) for _ in sources]
    open_streams = [stream for stream, search in enumerate(searches) if not search.done]
    state = AnswerState(network, sources, answers=beams.count, memory_bits=memory_bits)
    for value in prefix:
        state.push(mx.full((len(sources) * beams.count,), value, dtype=mx.int32))
    step = 0
    while open_streams:
        logits = state.logits - mx.logsumexp(state.logits, axis=-1, keepdims=True)
        if step < limits.min_length:
            logits = without(logits, ends)
        step += 1
        table = np.array(logits).reshape(len(open_streams), beams.count, -1)
        if np.isnan(table).any():
            raise not_finite()
        rows, ids, places = [], [], []
        for place, stream in enumerate(open_streams):
            parents, values = searches[stream].step(table[place], frozenset(ends))
            if not searches[stream].done:
                rows += [place * beams.count + parent for parent in parents]
                ids += values
                places.append(place)
        if not places:
            break
        state.keep(rows, None if len(places) == len(open_streams) else places)
        open_streams = [open_streams[place] for place in places]
        state.push(mx.array(ids, dtype=mx.int32))
    return [
        [
            Answer(stream, rank, (*prefix, *each.ids[: len(each.ids) - ended]), float(each.score), "end" if ended else "length")
            for rank, each in enumerate(search.answers)
            for ended in [bool(each.ids) and each.ids[-1] in ends]
        ]
        for stream, search in enumerate(searches)
    ]


def _stopped(ids: Sequence[int], sequences: tuple[bytes, ...]) -> int:
    """How many ids at the end are a stop sequence; 0 for none."""
    return next((len(each) for each in sequences if list(ids[-len(each) :]) == ids_of_bytes(each)), 0)
