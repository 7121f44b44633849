"""Generation: prompts in, pieces of bytes out as they are decoded, for one stream or many of unequal length."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.continuation import way_of
from marlin_cli.engine.drafts import DraftSource
from marlin_cli.engine.finite import not_finite
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.schedulers import scheduler_of
from marlin_cli.engine.scheduling import NOT_FINITE, Piece, Request, Scheduler, SchedulerLimits
from marlin_cli.engine.speculation import Speculation
from marlin_cli.engine.states import PromptKeeper
from marlin_cli.engine.stopping import Stopping
from marlin_cli.models import Network, continuing_of


def generate(
    network: Network,
    prompts: Sequence[bytes],
    stopping: Stopping,
    sampling: Sampling,
    cache_bits: CacheBits | None = None,
    *,
    sentinels: bool = False,
    keeper: PromptKeeper | None = None,
    speculation: Speculation | None = None,
    draft_source: Callable[[Request, bytes], DraftSource] | None = None,
) -> Iterator[Piece]:
    """Decode all prompts side by side; the pieces of a stream come in order, as soon as they are decoded.

    A stream gives the same bytes alone as in a batch. An id that is neither a byte nor an end counts as a byte and is read on.

    Args:
        sentinels: texts stand for such ids, in prompts and in what is generated, which else leaves them out.
        keeper: what knows the beginnings of prompts, and takes their states when they have been read, whatever follows.
        speculation: how the streams are drafted ahead, which changes none of their bytes.
        draft_source: where drafts come from, unless it is the text itself; see `StreamScheduler`.

    Raises:
        UsageError: a prompt longer than the model's context, sentinels where a model has none, or drafts that nothing verifies.
        CheckpointError: predictions that are not finite.
    """
    scheduler = scheduler_of(network, SchedulerLimits(max_streams=max(1, len(prompts))), cache_bits, keeper, draft_source)
    requests = [Request(prompt, stopping, sampling, sentinels, speculation=speculation or Speculation()) for prompt in prompts]
    streams = {scheduler.admit(request): number for number, request in enumerate(requests)}
    if keeper is not None:
        _read_alone(network, prompts, stopping, cache_bits, sentinels, keeper)
    yield from pieces_of(scheduler, streams)


def pieces_of(scheduler: Scheduler[Any], streams: Mapping[int, int]) -> Iterator[Piece]:
    """The pieces of streams until all have ended; those that have not when nobody asks any more are released.

    Args:
        streams: numbers that the scheduler gave them, and those that their pieces shall have.

    Raises:
        CheckpointError: predictions that are not finite.
    """
    left = set(streams)
    try:
        while left:
            for piece in scheduler.advance():
                if piece.stop_reason == NOT_FINITE:
                    raise not_finite()
                if piece.stop_reason is not None:
                    left.discard(piece.stream)
                yield replace(piece, stream=streams[piece.stream])
    finally:
        for number in left:
            scheduler.release(number)


def _read_alone(
    network: Network,
    prompts: Sequence[bytes],
    stopping: Stopping,
    cache_bits: CacheBits | None,
    sentinels: bool,
    keeper: PromptKeeper,
) -> None:
    """Read the prompts that nothing follows, which no scheduler reads, for what keeps them."""
    for prompt in prompts:
        ids = continuing_of(network).ids(network.config, prompt, sentinels)
        if stopping.max_bytes == 0 or len(ids) >= network.config.max_bytes:
            way_of(network).begin(network, [ids], cache_bits, keeper)
