"""The scheduler of a model that answers: inputs enter in slices, and between two of them all answers grow by an id.

What an input needs at most is set aside when it gets a place, so that nothing that runs is ever stopped for another.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.engine.answer_requests import Answer, AnswerLimits, AnswerPiece, AnswerRequest
from marlin_cli.engine.answer_streams import AnswerStreams, Encoding, GraphStreams, Held, Source
from marlin_cli.engine.answer_writing import OneAnswer, SearchedAnswers, Telling
from marlin_cli.engine.cache import check_cache_bits
from marlin_cli.engine.drafts import TextDrafts, as_text, common_length
from marlin_cli.engine.encoder_decoder import check_answers
from marlin_cli.engine.fused_answers import fuse_answers
from marlin_cli.engine.fused_byt5 import SELF_CACHE_ROWS
from marlin_cli.engine.sampling import Sampling, draw
from marlin_cli.engine.scheduling import NOT_FINITE, Cost, SchedulerLimits
from marlin_cli.engine.speculation import Drafting, Prices, Speculated, check_verified
from marlin_cli.engine.split import agreed
from marlin_cli.engine.stream_scheduler import cost_of
from marlin_cli.engine.streams import ROWS_READ_ALONE, Floats, StreamNoise
from marlin_cli.errors import UsageError
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.byt5_ids import FIRST_BYTE, ids_of_bytes, ids_with_sentinels


@dataclass(frozen=True)
class Written:
    """An id that has just become part of an answer."""

    stream: int
    id: int
    cost: Cost | None  # if the request asks for it


@dataclass(frozen=True)
class Ended:
    """The answers to an input, best first, of which none goes on."""

    stream: int
    answers: tuple[Answer, ...]
    reason: str


News = Written | Ended


@dataclass
class _Stream:
    number: int
    request: AnswerRequest
    source: Source
    writing: OneAnswer | SearchedAnswers
    needs: int  # bytes of caches at most
    noise: StreamNoise
    held: Held | None = None
    next: list[int] = field(default_factory=list)  # what the answers read at the next step, those of the first one first
    drafting: Drafting | None = None  # of a single answer
    drafted: list[int] = field(default_factory=list)  # what is read behind `next`, if it is right


class AnsweringScheduler:
    """A `Scheduler` of answers; see `engine.scheduling`.

    Args:
        streams: how the network reads and writes; as is best here unless given.
        memory_bits: of keys and values that the decoder reads of an input whose request says nothing of them.

    Raises:
        UsageError: the network has no decoder.
    """

    def __init__(
        self,
        network: ByT5,
        limits: SchedulerLimits | None = None,
        streams: AnswerStreams[Any] | None = None,
        *,
        memory_bits: int = 16,
    ) -> None:
        check_answers(network)
        self._network, self._limits, self._bits = network, limits or SchedulerLimits(), memory_bits
        self._answers: AnswerStreams[Any] = streams or fuse_answers(network) or GraphStreams(network)
        self._count = 0
        self._over: list[Ended] = []  # at once, with nothing to read
        self._waiting: deque[_Stream] = deque()
        self._entering: list[_Stream] = []
        self._encoding: Encoding[Any] | None = None
        self._decoding: list[_Stream] = []
        self._telling: dict[int, Telling] = {}
        self._prices = Prices()

    @property
    def running(self) -> int:
        return len(self._entering) + len(self._decoding)

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._over)

    @property
    def cache_bytes(self) -> int:
        return sum(stream.held.nbytes for stream in self._decoding if stream.held is not None)

    def admit(self, request: AnswerRequest) -> int:
        config = self._network.config
        if len(request.prompt) > config.max_bytes:
            raise UsageError(f"{len(request.prompt):,} bytes do not fit the model's max_bytes of {config.max_bytes:,}")
        sentinels = request.sentinels
        ids = ids_with_sentinels(request.prompt, config.vocab_size) if sentinels else ids_of_bytes(request.prompt)
        return self.admit_ids([*ids, config.end_id], request)

    def admit_ids(self, ids: Sequence[int], request: AnswerRequest) -> int:
        """As `admit`, of an input that is given as ids, its end among them; the request's prompt is not read."""
        config, limits, sampling, beams = self._network.config, request.limits, request.sampling, request.beams
        bits = self._bits if request.memory_bits is None else request.memory_bits
        if bits != 16:
            check_cache_bits(bits, bits, config.head_dim)
        check_verified(request.speculation, self._answers.no_drafts)
        number, ends = self._count, config.answer_ends
        source = Source(ids, 1 if beams is None else beams.count, bits)
        needs, most = self._most_bytes(source, limits), self._limits.cache_bytes
        if most is not None and needs > most:
            raise UsageError(
                f"an input of {len(ids):,} ids with answers of up to {limits.max_length:,} may need {needs:,} bytes of cache,"
                f" more than all there is ({most:,}); ask for less, or allow more"
            )
        one = OneAnswer(number, limits, ends)
        if limits.max_length == 0:
            self._over.append(Ended(number, (one.empty(),) if beams is None else (), "length"))
        else:
            writing = one if beams is None else SearchedAnswers(number, limits, beams, ends)
            noise = StreamNoise(sampling.seed, config.vocab_size)
            drafting = None if beams is not None or self._answers.no_drafts else drafting_of(request, ids)
            self._waiting.append(_Stream(number, request, source, writing, needs, noise, drafting=drafting))
        self._telling[number] = Telling(limits, sentinels=request.sentinels)
        self._count += 1
        return number

    def advance(self) -> list[AnswerPiece]:
        pieces = []
        for new in self.news():
            telling = self._telling[new.stream]
            if isinstance(new, Written):
                data, costs = telling.push(new.id, new.cost)
                if data:
                    pieces.append(AnswerPiece(new.stream, data, None, costs))
            else:
                data, costs = telling.end(new.answers)
                told = speculated_of(new.answers)
                pieces.append(AnswerPiece(new.stream, data, new.reason, costs, speculated=told, answers=new.answers))
                del self._telling[new.stream]
        return pieces

    def news(self) -> list[News]:
        """What `advance` tells, by ids: who asks for the one does not ask for the other."""
        news: list[News] = [*self._over]
        self._over = []
        self._read()
        if self._decoding:
            news += self._write()
        return agreed(self._network, news, ends=not all(isinstance(each, Written) for each in news))

    def release(self, stream: int) -> None:
        self._telling.pop(stream, None)
        self._over = [each for each in self._over if each.stream != stream]
        self._waiting = deque(each for each in self._waiting if each.number != stream)
        self._decoding = [each for each in self._decoding if each.number != stream]
        places = [place for place, each in enumerate(self._entering) if each.number != stream]
        if len(places) < len(self._entering):
            self._entering = [self._entering[place] for place in places]
            if places and self._encoding is not None:
                self._encoding.keep(places)
            else:
                self._encoding = None

    def _read(self) -> None:
        """A slice of the inputs that enter."""
        if self._encoding is None:
            self._enter()
        rows = self._limits.slice_rows
        if self._encoding is None or not self._encoding.advance(rows if self._decoding else max(rows, ROWS_READ_ALONE)):
            return
        for stream, held in zip(self._entering, self._encoding.held(), strict=True):
            first = [self._network.config.start_id, *ids_of_bytes(stream.request.limits.prefix)]
            stream.held, stream.next = held, first * stream.source.answers
        self._decoding += self._entering
        self._entering, self._encoding = [], None

    def _enter(self) -> None:
        """Give places to those that wait, in their order: to one, or to as many as one slice reads."""
        taken, rows = sum(each.needs for each in self._decoding), 0
        most = self._limits.cache_bytes
        while self._waiting and self.running < self._limits.max_streams:
            first = self._waiting[0]
            rows, taken = rows + len(first.source.ids), taken + first.needs
            if (self._entering and rows > self._limits.slice_rows) or (most is not None and taken > most):
                break
            self._entering.append(self._waiting.popleft())
        if self._entering:
            self._encoding = self._answers.read([each.source for each in self._entering])

    def _write(self) -> list[News]:
        """An id for every answer, and those that were drafted right."""
        began = time.process_time()
        for stream in self._decoding:
            if stream.drafting is not None and isinstance(stream.writing, OneAnswer):
                stream.drafted = stream.drafting.draft(1, 0, stream.writing.left - 1, self._prices)
        drafted = sum(len(stream.drafted) for stream in self._decoding)
        push = self._answers.push_all if drafted else self._answers.push
        logits = push([each.held for each in self._decoding], [[*each.next, *each.drafted] for each in self._decoding])
        seconds, streams = time.process_time() - began, len(self._decoding)
        news: list[News] = []
        drawing: list[tuple[int, _Stream, OneAnswer]] = []  # their first rows, and who draws there
        row = 0
        for stream in self._decoding:
            if isinstance(stream.writing, OneAnswer):
                row += len(stream.next) - 1 if drafted else 0
                drawing.append((row, stream, stream.writing))
                row += 1 + len(stream.drafted)
            else:
                each = len(stream.next) // stream.source.answers if drafted else 1
                last = list(range(row + each - 1, row + each * stream.source.answers, each))
                news += self._searched(stream, stream.writing, logits[mx.array(last)])
                row = last[-1] + 1
        news += self._drawn(logits, drawing)
        gone = {new.stream for new in news if isinstance(new, Ended)}
        self._decoding = [stream for stream in self._decoding if stream.number not in gone]
        if drafted:
            self._prices.drafted(seconds, 0.0, streams, drafted)
        else:
            self._prices.plain(seconds, 0.0, streams)
        return news

    def _drawn(self, logits: mx.array, drawing: Sequence[tuple[int, _Stream, OneAnswer]]) -> list[News]:
        if not drawing:
            return []
        rows: list[int] = []
        forbidden: list[tuple[int, ...]] = []
        settings: list[Sampling] = []
        noises: list[Floats] = []
        for row, stream, writing in drawing:
            sampling, count = stream.request.sampling, 1 + len(stream.drafted)
            rows += range(row, row + count)
            forbidden += [writing.forbidden_behind(ids) for ids in range(count)]
            # The noise has the seed in it: settings that are equal but for that may be drawn together.
            settings += [replace(sampling, seed=0)] * count
            blank = np.zeros((count, logits.shape[1]), dtype=np.float32)
            noises.append(stream.noise.take(count) if sampling.temperature else blank)
        some = logits if rows == list(range(len(logits))) else logits[mx.array(rows)]
        values, costs = draw(some, forbidden, settings, mx.array(np.concatenate(noises)))
        table = np.array(some) if any(stream.request.logprobs is not None for _, stream, _ in drawing) else None
        news: list[News] = []
        start = 0
        for (_, stream, writing), noise in zip(drawing, noises, strict=True):
            drafted, end = stream.drafted, start + 1 + len(stream.drafted)
            right = common_length(values[start:end], drafted)
            if right < len(drafted) and stream.held is not None:
                self._answers.forget(stream.held, len(drafted) - right)
                if stream.request.sampling.temperature:
                    stream.noise.give_back(noise[1 + right :])
            drawn = values[start : start + 1 + right]
            stream.next, stream.drafted = drawn[-1:], []
            if stream.drafting is not None:
                stream.drafting.push(drawn)
            news += self._taken(stream, writing, drawn, costs[start:end], None if table is None else table[start:end])
            start = end
        return news

    @staticmethod
    def _taken(
        stream: _Stream, writing: OneAnswer, ids: Sequence[int], costs: Sequence[float], table: Floats | None
    ) -> list[News]:
        """What comes of ids of an answer, up to its end; of each the cost, and the logits that it was drawn from."""
        news: list[News] = []
        wanted = stream.request.logprobs
        for place, value in enumerate(ids):
            told = None if wanted is None or table is None else cost_of(table[place], value, wanted)
            is_part, answer = writing.take(value, costs[place])
            if is_part:
                news.append(Written(stream.number, value, told))
            if answer is not None:
                told_of = replace(answer, speculated=None if stream.drafting is None else stream.drafting.told)
                found = () if answer.stop_reason == NOT_FINITE else (told_of,)
                return [*news, Ended(stream.number, found, answer.stop_reason)]
        return news

    @staticmethod
    def _searched(stream: _Stream, writing: SearchedAnswers, logits: mx.array) -> list[News]:
        table: npt.NDArray[np.float32] = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        if np.isnan(table).any():
            return [Ended(stream.number, (), NOT_FINITE)]
        parents, stream.next = writing.take(table)
        if writing.done:
            answers = writing.answers()
            return [Ended(stream.number, answers, answers[0].stop_reason if answers else "length")]
        assert stream.held is not None
        stream.held.keep(parents)
        return []

    def _most_bytes(self, source: Source, limits: AnswerLimits) -> int:
        """Bytes of the caches that answers to an input may come to hold."""
        config = self._network.config
        states = -(-len(source.ids) // self._network.ids_in_state)
        rows = -(-(len(limits.prefix) + limits.max_length) // SELF_CACHE_ROWS) * SELF_CACHE_ROWS
        number = self._answers.number_bytes
        plain = config.head_dim * number
        packed = {16: plain, 8: config.head_dim + config.head_dim // 32, 4: config.head_dim // 2 + config.head_dim // 16}
        a_layer = 2 * config.heads * (states * packed[source.memory_bits] + source.answers * rows * plain)
        return config.decoder_layers * a_layer


def drafting_of(request: AnswerRequest, ids: Sequence[int]) -> Drafting | None:
    """What drafts an answer ahead, if that is asked for: out of the prediction, or of the input, which corrections copy."""
    if not request.speculation.most:
        return None
    source = as_text([value for value in ids if value >= FIRST_BYTE], FIRST_BYTE)
    prediction = request.speculation.prediction
    drafts = TextDrafts(prediction or source, source if prediction else b"", resumes=True)
    drafts.push(request.limits.prefix)
    return Drafting(request.speculation, drafts, FIRST_BYTE)


def speculated_of(answers: Sequence[Answer]) -> Speculated | None:
    """What came of the drafts of the only answer, if it had any."""
    return answers[0].speculated if answers else None
