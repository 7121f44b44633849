"""The scheduler of a network, chosen in one place."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from marlin_cli.engine.answer_scheduler import AnsweringScheduler
from marlin_cli.engine.cache import CacheBits, check_cache_bits
from marlin_cli.engine.continuation import way_of
from marlin_cli.engine.decoding import fused_stages
from marlin_cli.engine.drafts import DraftSource
from marlin_cli.engine.endless import reach_of
from marlin_cli.engine.merged_streams import MergedStreams
from marlin_cli.engine.restarting import RestartingStreams
from marlin_cli.engine.scheduling import Scheduler, SchedulerLimits
from marlin_cli.engine.states import PromptKeeper
from marlin_cli.engine.stream_scheduler import StreamScheduler
from marlin_cli.engine.streams import Streams
from marlin_cli.errors import UsageError
from marlin_cli.models import Capability, Network, Reading, architecture_of, continuing_of, decoding_of


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
    bits = cache_bits or CacheBits()
    streams = streams_of(network, bits, keeper)
    return StreamScheduler(network, streams, limits or SchedulerLimits(), bits.window, draft_source)


def streams_of(network: Network, bits: CacheBits, keeper: PromptKeeper | None = None) -> Streams:
    """The streams of a network: of kernels that take rows of all of them where there are any, else in batches.

    Raises:
        UsageError: `bits` do not fit the network, or there is a `keeper` of streams that forget where they began.
    """
    check_cache(network, bits)
    if bits.window is not None:
        if keeper is not None:
            raise UsageError("--window: a stream that forgets its beginning is no state of a prompt; leave one of them out")
        if bits.window.restarts:
            return RestartingStreams(streams_of(network, replace(bits, window=None)), network.config.max_bytes)
    way = way_of(network)
    begin = way.begin_unread or way.begin
    return way.together(network, bits, keeper) or MergedStreams(
        network, begin, way.phase, bits, keeper, way.undrafted(network, bits)
    )


def check_cache(network: Any, bits: CacheBits) -> None:
    """Refuse what the caches of a network cannot be.

    Raises:
        UsageError: see `check_cache_bits` and `reach_of`; or pages to leave out where no kernel reads pages by their bounds.
    """
    if bits.is_packed or 16 < max(bits.keys, bits.values):
        check_cache_bits(bits.keys, bits.values, decoding_of(network.config).stacks(network.config)[0].head_dim)
    if bits.window is not None and not bits.window.restarts:
        reach_of(network.config, bits.window)
    if bits.share_left is not None:
        by_patches = continuing_of(network).reading is Reading.PATCHES
        fused = fused_stages(network, bits) if by_patches else None
        if not by_patches:
            raise UsageError(
                f"--sparse is of the pages of a MegaByte, and this is a {architecture_of(network).title}; leave it out"
            )
        if fused is None or not fused.has(0):
            raise UsageError("--sparse: pages are left out by the CPU kernels alone, which do not run here; leave it out")
