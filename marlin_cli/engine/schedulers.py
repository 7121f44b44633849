"""The scheduler of a network, chosen in one place."""

from collections.abc import Callable
from typing import Any

from marlin_cli.engine.answer_scheduler import AnsweringScheduler
from marlin_cli.engine.cache import CacheBits, check_cache_bits
from marlin_cli.engine.continuation import way_of
from marlin_cli.engine.drafts import DraftSource
from marlin_cli.engine.merged_streams import MergedStreams
from marlin_cli.engine.scheduling import Scheduler, SchedulerLimits
from marlin_cli.engine.states import PromptKeeper
from marlin_cli.engine.stream_scheduler import StreamScheduler
from marlin_cli.engine.streams import Streams
from marlin_cli.errors import UsageError
from marlin_cli.models import Capability, Network, architecture_of, decoding_of


def scheduler_of(
    network: Any,
    limits: SchedulerLimits | None = None,
    cache_bits: CacheBits | None = None,
    keeper: PromptKeeper | None = None,
    draft_source: Callable[[Any, bytes], DraftSource] | None = None,
) -> Scheduler[Any]:
    """A scheduler of streams that the network continues (its requests are `Request`s), or answers (`AnswerRequest`s).

    Args:
        cache_bits: of the keys and values that every stream keeps, in one width where it reads an input.
        keeper: what knows the beginnings of prompts, and keeps what is read of them, such as a `PromptStore`; an input that is
            answered is read as a whole, and has none.
        draft_source: see `StreamScheduler`; of a model that continues.

    Raises:
        UsageError: `cache_bits` do not fit the network, or it is an encoder alone.
    """
    if architecture_of(network).capability is Capability.ANSWERS:
        bits = cache_bits or CacheBits()
        if bits.keys != bits.values:
            raise UsageError("a model that answers keeps keys and values in one width; give one number")
        return AnsweringScheduler(network, limits, memory_bits=bits.keys)
    streams = streams_of(network, cache_bits or CacheBits(), keeper)
    return StreamScheduler(network, streams, limits or SchedulerLimits(), draft_source)


def streams_of(network: Network, bits: CacheBits, keeper: PromptKeeper | None = None) -> Streams:
    """The streams of a network: of kernels that take rows of all of them where there are any, else in batches."""
    if bits != CacheBits():
        check_cache_bits(bits.keys, bits.values, decoding_of(network.config).stacks(network.config)[0].head_dim)
    way = way_of(network)
    begin = way.begin_unread or way.begin
    return way.together(network, bits, keeper) or MergedStreams(network, begin, way.phase, bits, keeper)
