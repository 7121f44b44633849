"""The ways in which bytes are continued, by what a network takes at a step, behind one protocol that generation drives."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from marlin_cli.engine.block_decoding import block_rows
from marlin_cli.engine.byte_decoding import ByteByByte
from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.decoding import Lockstep
from marlin_cli.engine.fused import fuse
from marlin_cli.engine.fused_bygpt5 import fuse_bygpt5
from marlin_cli.engine.latent_decoding import latent_rows
from marlin_cli.engine.patch_streams import patch_streams
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.engine.space_decoding import space_rows
from marlin_cli.engine.states import PromptKeeper
from marlin_cli.engine.streams import Streams
from marlin_cli.engine.text_readers import bygpt5_streams, evabyte_streams
from marlin_cli.engine.whole_patches import why_undrafted
from marlin_cli.engine.window_decoding import window_rows
from marlin_cli.models import Network, Reading, continuing_of


class Continuation(Protocol):
    """Decoding state of a batch of streams of one phase (see `Way`).

    Attributes:
        config: of the network.
        positions: ids of each stream so far.
    """

    config: Any
    positions: list[int]

    @property
    def logits(self) -> mx.array:
        """Logits [streams, vocab] of the next id of each stream."""

    @property
    def cache_bytes(self) -> dict[str, int]:
        """Bytes in use, by level of the cache."""

    @property
    def part_seconds(self) -> dict[str, float] | None:
        """Seconds of the kernels so far, by part of the model; None where nothing tells parts apart."""

    def check_finite(self) -> None:
        """See that what comes next is predicted by numbers.

        Raises:
            CheckpointError: it is not.
        """

    def advance(self, sampling: Sampling, noise: Noise, most: int) -> mx.array | np.ndarray:
        """Draw the next ids of the streams and append them: [streams, n], of which there are at most `most`."""

    def push(self, ids: mx.array) -> None:
        """Append ids [streams] to the streams."""

    def keep(self, streams: Sequence[int]) -> None:
        """Go on with these streams alone, in this order."""

    def read_slice(self) -> bool:
        """Read the next rows of prompts that were not read at once; whether any are left."""

    @property
    def at_boundary(self) -> bool:
        """Do the streams stand where another batch may stand too, whatever came before?"""

    def join(self, other: Any) -> bool:
        """Take in the streams of another batch behind these, both at a boundary; False where that cannot be."""


class FusedScoring(Protocol):
    """What predicts whole windows in the kernels; both take windows of bytes [n, length]."""

    def predictions(self, windows: mx.array) -> mx.array:
        """Logits [n, length, vocab] float32, as `Continuing.predictions` gives them."""

    def costs(self, windows: mx.array) -> mx.array:
        """What each byte costs, in nats: [n, length] float32."""


@dataclass(frozen=True)
class Way:
    """How networks of one reading are decoded and scored.

    Attributes:
        begin: (network, ids of prompts of one phase, bits of the cache, what keeps a single prompt) -> their state; raises
            `UsageError` for bits that do not fit the network.
        begin_unread: the same, but the prompts are read by the state's `read_slice`; None where nothing reads them in slices.
        phase: (config, ids of a prompt) -> what is equal for prompts that can be decoded together.
        fuse: (network) -> the kernels that score it, None where they do not run or do not know a layer of it.
        together: (network, bits of the cache, what keeps prompts) -> streams whose rows go through the kernels together,
            wherever each stands; None where there are no such kernels.
        undrafted: (network, bits of the cache) -> why streams that are not together verify no drafts; None where they do.
    """

    begin: Callable[[Any, Sequence[Any], CacheBits | None, PromptKeeper | None], Continuation]
    phase: Callable[[Any, int], object]
    begin_unread: Callable[[Any, Sequence[Any], CacheBits | None, PromptKeeper | None], Any] | None = None
    fuse: Callable[[Any], FusedScoring | None] = lambda network: None
    together: Callable[[Any, CacheBits, PromptKeeper | None], Streams | None] = lambda network, bits, keeper: None
    undrafted: Callable[[Any, CacheBits], str | None] = lambda network, bits: (
        "drafts are verified by the CPU kernels, and these streams go by others"
    )


WAYS: dict[Reading, Way] = {
    Reading.PATCHES: Way(Lockstep, Lockstep.phase, functools.partial(Lockstep, read=False), fuse, patch_streams, why_undrafted),
    Reading.BYTES: Way(ByteByByte, ByteByByte.phase, None, fuse_bygpt5, bygpt5_streams),
    Reading.BLOCKS: Way(
        functools.partial(ByteByByte, new_rows=block_rows, level="memory"),
        ByteByByte.phase,
        undrafted=lambda network, bits: (
            "a block that has ended is written into its states, and a draft cannot be taken back out of these"
        ),
    ),
    Reading.LATENT_PATCHES: Way(
        functools.partial(ByteByByte, new_rows=latent_rows, level="patches"),
        ByteByByte.phase,
        undrafted=lambda network, bits: (
            "where a patch ends depends on its bytes, and those that a draft has ended cannot be taken back"
        ),
    ),
    Reading.BEGUN_PATCHES: Way(
        functools.partial(ByteByByte, new_rows=space_rows, level="patches"),
        ByteByByte.phase,
        undrafted=lambda network, bits: (
            "where a patch begins depends on its bytes, and those that a draft has begun cannot be taken back"
        ),
    ),
    Reading.WINDOWS: Way(
        functools.partial(ByteByByte, new_rows=window_rows, level="window"), ByteByByte.phase, together=evabyte_streams
    ),
}


def way_of(network: Network) -> Way:
    """How a network that continues bytes is decoded and scored."""
    return WAYS[continuing_of(network).reading]


def begin(network: Network, prompts: Sequence[bytes], cache_bits: CacheBits | None = None) -> Continuation:
    """The state of a batch of prompts of one phase.

    Raises:
        UsageError: `cache_bits` do not fit the network.
    """
    ids = [continuing_of(network).ids(network.config, prompt, False) for prompt in prompts]
    return way_of(network).begin(network, ids, cache_bits, None)
