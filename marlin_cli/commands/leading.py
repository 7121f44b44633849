"""`marlin generate` over ranks: rank 0 reads and writes, all decode. Each has the model, or a part of it (`--split`)."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from marlin_cli.answering_model import AnsweringModel
from marlin_cli.checkpoints import sketch
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.continuing_model import ContinuingModel
from marlin_cli.engine.answer_requests import AnswerLimits, AnswerRequest
from marlin_cli.engine.generation import pieces_of
from marlin_cli.engine.routing import dismiss, follow, over_ranks
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.schedulers import scheduler_of
from marlin_cli.engine.scheduling import Piece, Request, Scheduler, SchedulerLimits
from marlin_cli.engine.speculation import Speculation
from marlin_cli.engine.states import PromptKeeper
from marlin_cli.engine.stopping import Stopping
from marlin_cli.ranks import Ranks
from marlin_cli.version import __version__

# Rows of prompts that are read between two steps of what is decoded: nobody waits for one more than for another.
SLICE_ROWS = 256


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
    limits = SchedulerLimits(max_streams=batch_size, slice_rows=SLICE_ROWS)
    return scheduler_of(model.network, limits, getattr(model, "cache_bits", None))


def _pieces(scheduler: Scheduler[Any], requests: Sequence[Any]) -> Iterator[Piece]:
    """The pieces of requests, whose numbers are their places among them.

    Raises:
        CheckpointError: predictions that are not finite.
    """
    yield from pieces_of(scheduler, {scheduler.admit(request): place for place, request in enumerate(requests)})


class LeadingModel:
    """A model that continues bytes, whose streams run over ranks; a `ContinuingModel` for who writes."""

    def __init__(self, model: ContinuingModel, scheduler: Scheduler[Any]) -> None:
        self._scheduler, self.config, self.device = scheduler, model.config, model.device

    def pieces(
        self,
        prompts: Sequence[bytes],
        stopping: Stopping,
        sampling: Sampling,
        *,
        sentinels: bool = False,
        keeper: PromptKeeper | None = None,
        speculation: Speculation | None = None,
    ) -> Iterator[Piece]:
        """See `ContinuingModel.pieces`; prompts that several ranks read have no keeper."""
        assert keeper is None
        wanted = speculation or Speculation()
        requests = [Request(prompt, stopping, sampling, sentinels, speculation=wanted) for prompt in prompts]
        return _pieces(self._scheduler, requests)


class LeadingAnswers:
    """A model that answers, whose inputs go to all ranks; an `AnsweringModel` for who writes."""

    def __init__(self, model: AnsweringModel, scheduler: Scheduler[Any]) -> None:
        self.scheduler, self.config, self.device, self.kv_bits = scheduler, model.config, model.device, model.kv_bits

    def pieces(
        self,
        prompts: Sequence[bytes],
        limits: AnswerLimits,
        sampling: Sampling,
        *,
        sentinels: bool = False,
        speculation: Speculation | None = None,
    ) -> Iterator[Piece]:
        """See `AnsweringModel.pieces`."""
        bits, wanted = self.kv_bits, speculation or Speculation()
        requests = [
            AnswerRequest(each, limits, sampling, sentinels=sentinels, memory_bits=bits, speculation=wanted) for each in prompts
        ]
        return _pieces(self.scheduler, requests)
