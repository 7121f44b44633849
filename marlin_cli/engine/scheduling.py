"""What a scheduler of streams is asked, and what it tells: requests in, pieces out. The schedulers themselves stand elsewhere.

A scheduler belongs to one thread, which owns the network, its streams and their caches; others talk to that thread by queues.
The bytes of a request never depend on its neighbours, as far as the products of a row do not (`MARLIN_ROWS=exact`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.speculation import Speculated, Speculation
from marlin_cli.engine.stopping import Stopping
from marlin_cli.errors import UsageError


@dataclass(frozen=True)
class Request:
    """What one stream that continues bytes asks for."""

    prompt: bytes
    stopping: Stopping = field(default_factory=Stopping)
    sampling: Sampling = field(default_factory=Sampling)
    sentinels: bool = False  # texts stand for ids that are no bytes, in the prompt and in what follows
    logprobs: int | None = None  # how many of the likeliest ids are told beside each drawn one; None: nothing is told
    speculation: Speculation = field(default_factory=Speculation)  # how it is drafted ahead, which changes no byte

    def __post_init__(self) -> None:
        if self.logprobs is not None and self.logprobs < 0:
            raise UsageError(f"logprobs must be 0 or more, found {self.logprobs}")


@dataclass(frozen=True)
class Cost:
    """What an id that was drawn costs: the model's own log-probabilities, in nats, before temperature and filters."""

    id: int
    log_probability: float
    likeliest: tuple[tuple[int, float], ...] = ()  # the likeliest ids and their log-probabilities, likeliest first


@dataclass(frozen=True)
class Piece:
    """Bytes of one stream, decoded just now; with the last piece comes the reason why it ended.

    Attributes:
        stop_reason: length: max_bytes reached; stop: a stop sequence; context: no room; special (a model that answers: end):
            an id of the model's own; not_finite: the model gives no numbers here, its weights are damaged or overflow.
        costs: of each id of which `data` has bytes, in their order, if the request asks for them.
        known: ids of the prompt that were known and not read.
        speculated: with the last piece of a stream that was drafted ahead, what came of that.
    """

    stream: int
    data: bytes
    stop_reason: str | None = None
    costs: tuple[Cost, ...] = ()
    known: int = 0
    speculated: Speculated | None = None


# The model's predictions were no numbers: `Piece.stop_reason` of a stream that cannot go on, whose neighbours do.
NOT_FINITE = "not_finite"


@dataclass(frozen=True)
class SchedulerLimits:
    """What streams may take together, and how long one may keep the others waiting.

    Raises:
        UsageError: a number below 1.
    """

    max_streams: int = 64  # that run at once; others wait for their turn, in their order
    cache_bytes: int | None = None  # what the caches of all that run may grow to; None: no bound
    slice_rows: int = 64  # rows of prompts that are read at most between two steps of the streams that run

    def __post_init__(self) -> None:
        for name in ("max_streams", "cache_bytes", "slice_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, found {value}")


AnyRequest = TypeVar("AnyRequest", contravariant=True)


class Scheduler(Protocol[AnyRequest]):
    """Streams that come and go, of which all that stand together take each step together.

    While `running` or `waiting` is above 0 there is something to `advance`. A stream is gone after its last piece.
    """

    @property
    def running(self) -> int:
        """Streams that have a place: their prompts are read, or they are decoded."""

    @property
    def waiting(self) -> int:
        """Streams that wait for a place."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of the caches in use."""

    def admit(self, request: AnyRequest) -> int:
        """Take a request; it waits if there is no room for it now.

        Returns:
            The number of its stream, which no other stream of this scheduler ever has.

        Raises:
            UsageError: it can never fit, the model's context or the bound of the caches being what they are.
        """

    def advance(self) -> Sequence[Piece]:
        """One quantum: a slice of a prompt that enters, and a patch (or byte) of all streams that stand together.

        Returns:
            What it set free, the pieces of a stream in their order; nothing if no stream got that far.
        """

    def release(self, stream: int) -> None:
        """Forget a stream, wherever it is; what it held is free at once. One that is gone is not missed."""
