"""`marlin generate` over ranks: rank 0 reads and writes, all decode. Each has the model, or a part of it (`--split`)."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from marlin_cli.answering_model import AnsweringModel
from marlin_cli.checkpoints import sketch
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.continuing_model import ContinuingModel
from marlin_cli.engine.answer_requests import Answer, AnswerLimits, AnswerPiece, AnswerRequest
from marlin_cli.engine.beams import Beams
from marlin_cli.engine.finite import not_finite
from marlin_cli.engine.routing import dismiss, follow, over_ranks
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.schedulers import scheduler_of
from marlin_cli.engine.scheduling import NOT_FINITE, Piece, Request, Scheduler, SchedulerLimits
from marlin_cli.engine.stopping import Stopping
from marlin_cli.ranks import Ranks
from marlin_cli.version import __version__


def check_alike(ranks: Ranks, model: str, **settings: Any) -> None:
    """See that all ranks have the same model and were started with the same settings, as far as these change what it writes.

    Raises:
        DistributedError: they were not.
        CheckpointError: the model cannot be read.
    """
    if ranks.size > 1:
        ranks.check_alike(version=__version__, model=sketch(locate_model(model)), settings=repr(settings))


@contextlib.contextmanager
def leading(model: Any, ranks: Ranks, batch_size: int) -> Iterator[Any]:
    """The model as rank 0 writes of it: itself where it is alone, else one whose streams run over all ranks.

    When the block is done, the other ranks are told that all is.
    """
    if ranks.size == 1:
        yield model
        return
    scheduler = over_ranks(_scheduler_of(model, batch_size), ranks, model.network, batch_size)
    yield (LeadingAnswers if isinstance(model, AnsweringModel) else LeadingModel)(model, scheduler)
    dismiss(ranks)


def follow_along(model: Any, ranks: Ranks, batch_size: int) -> None:
    """What all other ranks do."""
    follow(_scheduler_of(model, batch_size), ranks, model.network)


def _scheduler_of(model: Any, batch_size: int) -> Scheduler[Any]:
    limits = SchedulerLimits(max_streams=batch_size)
    return scheduler_of(model.network, limits, getattr(model, "cache_bits", None))


def _pieces(scheduler: Scheduler[Any], requests: Sequence[Any]) -> Iterator[Piece]:
    """The pieces of requests, whose numbers are their places among them.

    Raises:
        CheckpointError: predictions that are not finite.
    """
    numbers = {scheduler.admit(request): stream for stream, request in enumerate(requests)}
    try:
        while numbers:
            for piece in scheduler.advance():
                stream = numbers[piece.stream]
                if piece.stop_reason == NOT_FINITE:
                    raise not_finite()
                if piece.stop_reason is not None:
                    del numbers[piece.stream]
                yield dataclasses.replace(piece, stream=stream)
    finally:
        for number in numbers:
            scheduler.release(number)


class LeadingModel:
    """A model that continues bytes, whose streams run over ranks; a `ContinuingModel` for who writes."""

    def __init__(self, model: ContinuingModel, scheduler: Scheduler[Any]) -> None:
        self._scheduler, self.config, self.device = scheduler, model.config, model.device

    def pieces(
        self, prompts: Sequence[bytes], stopping: Stopping, sampling: Sampling, *, sentinels: bool = False
    ) -> Iterator[Piece]:
        """See `ContinuingModel.pieces`."""
        return _pieces(self._scheduler, [Request(prompt, stopping, sampling, sentinels) for prompt in prompts])


class LeadingAnswers:
    """A model that answers, whose inputs go to all ranks; an `AnsweringModel` for who writes."""

    def __init__(self, model: AnsweringModel, scheduler: Scheduler[Any]) -> None:
        self._scheduler, self.config, self.device, self._memory_bits = scheduler, model.config, model.device, model.kv_bits

    def pieces(
        self, prompts: Sequence[bytes], limits: AnswerLimits, sampling: Sampling, *, sentinels: bool = False
    ) -> Iterator[Piece]:
        """See `AnsweringModel.pieces`."""
        return _pieces(self._scheduler, self._requests(prompts, limits, sampling, None, sentinels))

    def answers(
        self, inputs: Sequence[bytes], limits: AnswerLimits, sampling: Sampling, beams: Beams | None, *, sentinels: bool = False
    ) -> list[list[Answer]]:
        """See `AnsweringModel.answers`."""
        found: dict[int, list[Answer]] = {}
        for piece in _pieces(self._scheduler, self._requests(inputs, limits, sampling, beams, sentinels)):
            if isinstance(piece, AnswerPiece) and piece.stop_reason is not None:
                found[piece.stream] = [dataclasses.replace(each, stream=piece.stream) for each in piece.answers]
        return [found[stream] for stream in range(len(inputs))]

    def _requests(
        self, inputs: Sequence[bytes], limits: AnswerLimits, sampling: Sampling, beams: Beams | None, sentinels: bool
    ) -> list[AnswerRequest]:
        bits = self._memory_bits
        return [AnswerRequest(each, limits, sampling, beams, sentinels, memory_bits=bits) for each in inputs]
