"""Drafts by another, smaller MegaByte of any patch size, which reads what the stream reads and draws with the same noise."""

from collections.abc import Callable
from typing import Any

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.drafts import Draft
from marlin_cli.engine.patch_streams import PatchStreams, patch_streams
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.scheduling import Request
from marlin_cli.engine.streams import Ask, StreamNoise
from marlin_cli.errors import UsageError
from marlin_cli.models.megabyte import MegaByte

# How many bytes speak for a draft, see `drafts.Draft`: as many as for the surest ones, until it shows otherwise.
MATCH = 32


class ModelDrafts:
    """A `DraftSource` of one stream.

    The noise is that of the stream, at the same bytes: where two models think alike they then draw alike, too.

    Args:
        streams: of the drafting model, for this stream alone.
    """

    is_free = False

    def __init__(self, streams: PatchStreams, prompt: bytes, sampling: Sampling, max_bytes: int, vocab: int) -> None:
        self._streams, self._sampling = streams, sampling
        self._room = max_bytes - len(prompt)  # bytes until its own context ends
        self._noise = StreamNoise(sampling.seed, vocab)
        if self._room > 0:
            self._streams.begin(0, list(prompt))

    def push(self, data: bytes) -> None:
        self._room -= len(data)
        if self._room > 0:
            self._streams.follow(0, list(data))
            if self._sampling.temperature:
                self._noise.take(len(data))

    def draft(self, count: int) -> Draft | None:
        count = min(count, self._room)
        if count < 1:
            return None
        ids = self._streams.look_ahead(0, Ask(count, self._sampling, self._noise.copy()))
        return Draft(bytes(max(value, 0) for value in ids), MATCH)


def drafts_of(network: Any) -> Callable[[Request, bytes], ModelDrafts]:
    """What gives each stream the drafts of a network; see `StreamScheduler`.

    Raises:
        UsageError: it is no MegaByte of bytes alone, or the CPU kernels do not run it.
    """
    if not isinstance(network, MegaByte) or network.config.vocab_size != 256:
        raise UsageError("is no MegaByte of 256 ids, as a model that drafts is; name one")
    if patch_streams(network, CacheBits()) is None:
        raise UsageError("drafts come by the CPU kernels, which do not run it here; leave --draft out")

    def source(request: Request, prompt: bytes) -> ModelDrafts:
        streams = patch_streams(network, CacheBits())
        assert streams is not None
        return ModelDrafts(streams, prompt, request.sampling, network.config.max_bytes, network.config.vocab_size)

    return source
