"""Answers of ByT5: inputs as ids in, ids out as they are decoded, for one input or many of unequal lengths.

Where the kernels take rows of inputs that stand at places of their own, an input enters when another's answer has ended;
elsewhere, as on GPUs, all go in step.
"""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from marlin_cli.engine.answer_requests import Answer, AnswerLimits, AnswerRequest
from marlin_cli.engine.answer_scheduler import AnsweringScheduler, Written
from marlin_cli.engine.answer_streams import GraphStreams
from marlin_cli.engine.answer_writing import OneAnswer, SearchedAnswers
from marlin_cli.engine.beams import Beams
from marlin_cli.engine.encoder_decoder import AnswerState
from marlin_cli.engine.finite import not_finite
from marlin_cli.engine.fused_answers import fuse_answers
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.engine.scheduling import NOT_FINITE, SchedulerLimits
from marlin_cli.engine.speculation import Speculation, check_verified
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.byt5_ids import ids_of_bytes

# Nobody waits for one answer more than for another, so inputs are read in large parts.
ALL_AT_ONCE = SchedulerLimits(slice_rows=1024)

# After each step what is new: (input, id), or (input, answers) for one that has ended.
Steps = Iterator[list[tuple[int, int | tuple[Answer, ...]]]]


def answer(
    network: ByT5,
    sources: Sequence[Sequence[int]],
    limits: AnswerLimits,
    sampling: Sampling | None = None,
    *,
    memory_bits: int = 16,
    speculation: Speculation | None = None,
) -> Iterator[list[tuple[int, int | Answer]]]:
    """Decode one answer to each input, many side by side: greedy, or as `sampling` says.

    Args:
        speculation: how answers are drafted ahead, which changes none of them.

    Yields:
        After each step what is new: (input, id), or (input, answer) for one that has ended. An input has the same
        answer alone and in a batch.

    Raises:
        UsageError: drafts that nothing verifies.
        CheckpointError: predictions that are not finite.
    """
    wanted = speculation or Speculation()
    request = AnswerRequest(b"", limits, sampling or Sampling(), memory_bits=memory_bits, speculation=wanted)
    for news in _steps(network, sources, request):
        yield [(stream, new[0] if isinstance(new, tuple) else new) for stream, new in news]


def answer_with_beams(
    network: ByT5,
    sources: Sequence[Sequence[int]],
    limits: AnswerLimits,
    beams: Beams,
    *,
    memory_bits: int = 16,
) -> list[list[Answer]]:
    """The best answers to each input, best first, by beam search over many inputs side by side.

    Raises:
        UsageError: stop sequences, which beams do not take.
        CheckpointError: predictions that are not finite.
    """
    request = AnswerRequest(b"", limits, beams=beams, memory_bits=memory_bits)
    found = {stream: new for news in _steps(network, sources, request) for stream, new in news if isinstance(new, tuple)}
    return [list(found[stream]) for stream in range(len(sources))]


def _steps(network: ByT5, sources: Sequence[Sequence[int]], request: AnswerRequest) -> Steps:
    if not sources:
        return
    streams = fuse_answers(network)
    if streams is not None:
        scheduler = AnsweringScheduler(network, ALL_AT_ONCE, streams)
        for ids in sources:
            scheduler.admit_ids(ids, request)
        yield from _scheduled(scheduler)
    elif request.beams is None:
        check_verified(request.speculation, GraphStreams.no_drafts)
        yield from _in_step(network, sources, request)
    else:
        yield from _searched_in_step(network, sources, request, request.beams)


def _scheduled(scheduler: AnsweringScheduler) -> Steps:
    while scheduler.running or scheduler.waiting:
        news: list[tuple[int, int | tuple[Answer, ...]]] = []
        for new in scheduler.news():
            if isinstance(new, Written):
                news.append((new.stream, new.id))
            elif new.reason == NOT_FINITE:
                raise not_finite()
            else:
                news.append((new.stream, new.answers))
        if news:
            yield news


def _in_step(network: ByT5, sources: Sequence[Sequence[int]], request: AnswerRequest) -> Steps:
    limits, sampling = request.limits, request.sampling
    state = AnswerState(network, sources, memory_bits=request.memory_bits or 16)
    going = [(stream, OneAnswer(stream, limits, network.config.answer_ends)) for stream in range(len(sources))]
    if limits.max_length == 0:
        yield [(stream, (writing.empty(),)) for stream, writing in going]
        return
    for value in ids_of_bytes(limits.prefix):
        state.push([value] * len(sources))
    noise = Noise(sampling.seed, network.config.vocab_size)
    written = 0
    while going:
        values, costs = state.draw(going[0][1].forbidden, sampling, noise, limits.max_length - written)
        written += 1
        news: list[tuple[int, int | tuple[Answer, ...]]] = []
        rows = []
        for row, ((stream, writing), value, cost) in enumerate(zip(going, values, costs, strict=True)):
            is_part, found = writing.take(value, cost)
            if is_part:
                news.append((stream, value))
            if found is None:
                rows.append(row)
            elif found.stop_reason == NOT_FINITE:
                raise not_finite()
            else:
                news.append((stream, (found,)))
        yield news
        if len(rows) < len(going):
            going = [going[row] for row in rows]
            if going:
                state.keep(rows, rows)
        if going:
            state.push([values[row] for row in rows])


def _searched_in_step(network: ByT5, sources: Sequence[Sequence[int]], request: AnswerRequest, beams: Beams) -> Steps:
    limits, count = request.limits, beams.count
    state = AnswerState(network, sources, answers=count, memory_bits=request.memory_bits or 16)
    going = [(stream, SearchedAnswers(stream, limits, beams, network.config.answer_ends)) for stream in range(len(sources))]
    if limits.max_length == 0:
        yield [(stream, searching.answers()) for stream, searching in going]
        return
    for value in ids_of_bytes(limits.prefix):
        state.push([value] * len(sources) * count)
    while going:
        logits = state.logits - mx.logsumexp(state.logits, axis=-1, keepdims=True)
        table = np.array(logits).reshape(len(going), count, -1)
        if np.isnan(table).any():
            raise not_finite()
        rows, ids, places = [], [], []
        for place, (_, searching) in enumerate(going):
            parents, values = searching.take(table[place])
            if not searching.done:
                rows += [place * count + parent for parent in parents]
                ids += values
                places.append(place)
        yield [(stream, searching.answers()) for stream, searching in going if searching.done]
        if places:
            state.keep(rows, None if len(places) == len(going) else places)
            state.push(ids)
        going = [going[place] for place in places]
