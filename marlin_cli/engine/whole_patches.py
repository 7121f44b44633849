"""Who decodes whole patches on the device in use, chosen in one place; else decoding goes operation by operation."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx
import numpy as np

from marlin_cli.engine import cuda_patches
from marlin_cli.engine.cache import CacheBits, KeyValueCache
from marlin_cli.engine.compiled_patches import compiled_patches
from marlin_cli.engine.cuda_shared import shared_patch_decoder
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.splitting import share_of
from marlin_cli.ops.dispatch import by_operations, gpu


class QueuedPatch(Protocol):
    """A patch that has been queued."""

    @property
    def more(self) -> bool:
        """Is the condition of the patch that follows made?"""


class WholePatches(Protocol):
    """Queues patches on a GPU, each of which goes on from the one before. What a patch is, is its own business.

    Attributes:
        checks_logits: does it see that logits are numbers, each time it reads a patch?
    """

    checks_logits: bool

    @property
    def part_seconds(self) -> dict[str, float] | None:
        """Seconds of the kernels so far by part; None where nothing tells parts apart."""

    @property
    def sequence_cache_bytes(self) -> int:
        """Bytes of the local stage's cache."""

    def keep(self, streams: int) -> None:
        """Go on with fewer streams, all that was queued being settled."""

    def takes(self, given: int) -> bool:
        """Can it go on in a patch in which so many ids stand already?"""

    def enter(
        self, condition: mx.array, before: mx.array, given: mx.array, caches: Sequence[KeyValueCache], padding: mx.array | None
    ) -> None:
        """Go on from what MLX has made.

        Args:
            condition: [streams, slots, dim] of the open patch.
            before: [streams] the id before it.
            given: [streams, n] ids that stand in it already.
            caches: of what came before it.
            padding: [streams] filler rows of the caches.
        """

    def queue(self, caches: Sequence[KeyValueCache], sampling: Sampling, noise: Noise, more: bool) -> Any:
        """Queue the next patch, and the global step after it if there is to be `more`: a `QueuedPatch`."""

    def read(self, patch: Any) -> np.ndarray:
        """The ids [streams, patch_size] of a patch, waited for, on the host."""

    def condition(self, patch: Any) -> mx.array:
        """The condition [streams, slots, dim] of the patch after this one."""

    def take_back(self, patch: Any, sampling: Sampling, steps: int) -> None:
        """Forget the last steps of the patch that was queued last, and what followed it."""

    def count(self, caches: Sequence[KeyValueCache]) -> None:
        """Tell the global cache of the rows that have been queued."""

    def settle(self, caches: Sequence[KeyValueCache]) -> None:
        """Before MLX goes on where patches have been."""

    def give_back_noise(self, noise: Noise) -> None:
        """Give back what was drawn ahead and not used."""


@runtime_checkable
class DraftedPatches(WholePatches, Protocol):
    """`WholePatches` of a stream that may be drafted."""

    @property
    def most_drafted(self) -> int:
        """Patches that `verify` takes now."""

    def widen(self) -> bool:
        """Write several patches of its only stream at once from here on, where nothing is queued; False: it cannot."""

    def verify(self, caches: Sequence[KeyValueCache], drafts: np.ndarray, room: int) -> tuple[Any, np.ndarray]:
        """Write the next patch of its only stream and those behind drafts of it, the likeliest ids.

        Args:
            drafts: int32 [n, patch_size].
            room: ids that the context has.

        Returns:
            The last patch that counts, a `QueuedPatch`, and the ids [1 + right, patch_size] of all.
        """


def why_undrafted(network: MegaByte, bits: CacheBits) -> str | None:
    """Why patches that are drafted are not verified on a GPU; None where they are, of a stream that is alone."""
    if gpu() != "cuda" or by_operations():
        return "drafts are verified by the CPU kernels, and by whole patches on NVIDIA GPUs, and these streams go by others"
    if share_of(network) is not None:
        return "ranks share the model, and a launch of one does not know what the others have drafted"
    if network.config.layout == "paper":
        return "a patch of the layout paper begins with the byte before it, which launches of drafts are not given"
    reason = "the cache is packed, or has a window" if bits != CacheBits() else cuda_patches.why_operations(network, 1)
    return None if reason is None else f"patches go operation by operation here: {reason}"


def patch_decoder(network: MegaByte, streams: int, bits: CacheBits | None = None) -> WholePatches | None:
    """The decoder of whole patches, or None where they are decoded operation by operation.

    Args:
        bits: of the global cache.
    """
    bits = bits or CacheBits()
    device = gpu()
    share = share_of(network)
    if device is None or by_operations() or (device == "metal" and share is not None):  # what MLX compiles does not sum
        return None
    if share is not None:
        return None if share.ranks is None else shared_patch_decoder(network, share.ranks, streams, bits)
    if device == "metal":
        return compiled_patches(network, streams) if bits == CacheBits() else None
    return cuda_patches.patch_decoder(network, streams, bits)
