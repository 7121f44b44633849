"""What a model that answers is asked and tells: how an answer begins and ends, and the answers themselves."""

from dataclasses import dataclass, field

from marlin_cli.engine.beams import Beams
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.scheduling import Piece
from marlin_cli.engine.speculation import Speculated, Speculation
from marlin_cli.engine.stopping import check_stops
from marlin_cli.errors import UsageError
from marlin_cli.models.byt5_ids import bytes_of_ids
from marlin_cli.text import quoted


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
        if not isinstance(self.prefix, bytes):
            raise UsageError(f"prefix is bytes, found {type(self.prefix).__name__} {quoted(self.prefix)}; call .encode()")
        check_stops(self.stop)


@dataclass(frozen=True)
class Answer:
    """One answer to one input."""

    stream: int  # which input
    rank: int  # 0 for the best
    ids: tuple[int, ...]  # prefix included, the end and what ended it left out
    score: float  # log-probability of the ids after the prefix, the end included, over their number (of beams to the penalty)
    stop_reason: str  # end: one of the model's own; stop: a stop sequence; length: max_length reached
    speculated: Speculated | None = field(default=None, compare=False)  # of an answer that was drafted ahead

    @property
    def data(self) -> bytes:
        """The bytes; special ids are left out."""
        return bytes_of_ids(self.ids)


@dataclass(frozen=True)
class AnswerRequest:
    """What one input asks for, of a scheduler of answers.

    Raises:
        UsageError: settings that do not go together.
    """

    prompt: bytes
    limits: AnswerLimits = field(default_factory=AnswerLimits)
    sampling: Sampling = field(default_factory=Sampling)
    beams: Beams | None = None  # several answers, of which nothing is told before the end
    sentinels: bool = False  # `<extra_id_N>` stands for that special id, in the input and in what is told of the answer
    memory_bits: int | None = None  # of the keys and values that the decoder reads of the input: 4, 8, 16, or the scheduler's
    logprobs: int | None = None  # how many of the likeliest ids are told beside each drawn one; None: nothing is told
    speculation: Speculation = field(default_factory=Speculation)  # how the answer is drafted ahead, which changes none of it

    def __post_init__(self) -> None:
        if self.logprobs is not None and self.logprobs < 0:
            raise UsageError(f"logprobs must be 0 or more, found {self.logprobs}")
        if self.beams is None:
            return
        if self.sampling.temperature:
            raise UsageError("beams and a temperature do not go together; choose one")
        if self.limits.stop:
            raise UsageError("stop sequences do not go with beams; use the end id, or no beams")
        if self.logprobs is not None:
            raise UsageError("logprobs do not go with beams, whose ids are not known one by one")
        if self.speculation.most and not self.speculation.adapts:
            raise UsageError("speculation does not go with beams, of which no id is known before the end; leave it off")


@dataclass(frozen=True)
class AnswerPiece(Piece):
    """A `Piece` of an answer, of which the prefix is part; `stop_reason` is end, stop, length or not_finite.

    Attributes:
        answers: with the last piece, best first; none where the predictions are not finite. A beam search has one piece, with
            the bytes of the best.
    """

    answers: tuple[Answer, ...] = ()
