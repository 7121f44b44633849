"""Whole patches of a batch on a GPU, one queued ahead of what is read: what stands there until MLX goes on from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from marlin_cli.engine.cache import KeyValueCache
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.engine.whole_patches import DraftedPatches, QueuedPatch, WholePatches


@dataclass(frozen=True)
class Wanted:
    """How many ids of each stream are drawn."""

    steps: int  # now, all in the open patch
    lacking: int  # that the open patch lacks
    most: int  # now and by the next call
    room: int  # that the context has behind the open patch


@dataclass(frozen=True)
class Left:
    """What the GPU leaves to MLX."""

    ids: np.ndarray  # [streams on the GPU, n] of the last patch that was read
    live: list[int] | None  # the streams that are still asked for, where some are not
    condition: mx.array | None  # [streams on the GPU, 1, dim] of the patch that follows; None where the context is full


@dataclass(frozen=True)
class _Read:
    """The patch that was read last, and what it was drawn with."""

    patch: QueuedPatch
    ids: np.ndarray
    sampling: Sampling
    noise: Noise


class PatchesInPlace:
    """Walks a batch from patch to patch.

    While it is `going` the caches of MLX and what else is known of the batch stand where the GPU began.

    Args:
        decoder: of whole patches.
        patch_size: ids of a patch.
    """

    def __init__(self, decoder: WholePatches, patch_size: int) -> None:
        self.decoder = decoder
        self._patch_size = patch_size
        self._ahead: QueuedPatch | None = None  # a patch that has been queued before it was asked for
        self._last: _Read | None = None
        self._live: list[int] | None = None  # of the streams on the GPU, those that are still asked for

    @property
    def going(self) -> bool:
        """Has a patch been read since MLX knew the state?"""
        return self._last is not None

    def draws_on(self, sampling: Sampling, noise: Noise) -> bool:
        """Can the next ids be drawn so, if it is going?"""
        return self._last is None or (self._last.sampling, self._last.noise) == (sampling, noise)

    def keep(self, streams: Sequence[int]) -> None:
        """Go on with these of the streams that are asked for; the GPU goes on with all of them."""
        assert self._last is not None
        live = self._live or range(self._last.ids.shape[0])
        self._live = [live[stream] for stream in streams]

    def next(self, caches: Sequence[KeyValueCache], sampling: Sampling, noise: Noise, wanted: Wanted) -> np.ndarray:
        """The next ids [streams, steps] of those that are asked for.

        If another patch may follow, that is queued before this one is read. Of a patch that is not wanted whole the rest is
        taken back, and nothing may be drawn on before it is settled.
        """
        whole = wanted.steps == wanted.lacking
        patch = self._ahead or self.decoder.queue(caches, sampling, noise, whole and wanted.room > 0)
        self._ahead = None
        rest = wanted.most - wanted.steps
        if patch.more and whole and min(rest, wanted.room) > 0:
            more = rest >= self._patch_size and wanted.room > self._patch_size
            self._ahead = self.decoder.queue(caches, sampling, noise, more)
        ids = self.decoder.read(patch)
        given = ids if self._live is None else ids[self._live]
        if whole:
            self._last = _Read(patch, ids, sampling, noise)
            return given
        self.decoder.take_back(patch, sampling, wanted.lacking - wanted.steps)
        if self._last is None:
            self.decoder.settle(caches)
            self.decoder.give_back_noise(noise)
        return given[:, : wanted.steps]

    @property
    def most_drafted(self) -> int:
        """Patches that may be drafted now: of a stream that is alone, whose next patch is led and not queued yet."""
        by_drafts = self.decoder if isinstance(self.decoder, DraftedPatches) else None
        if by_drafts is None or self._last is None or not self._last.patch.more or self._ahead is not None or self._live:
            return 0
        return by_drafts.most_drafted

    @property
    def is_ahead(self) -> bool:
        """Is the next patch queued?"""
        return self._ahead is not None

    def widen(self) -> bool:
        """See `whole_patches.DraftedPatches`; before it goes."""
        return isinstance(self.decoder, DraftedPatches) and self._last is None and self.decoder.widen()

    def verify(self, caches: Sequence[KeyValueCache], drafts: np.ndarray, room: int) -> np.ndarray:
        """The ids [patches, patch_size] that come of drafts of the next patches, see `whole_patches.DraftedPatches`."""
        assert isinstance(self.decoder, DraftedPatches) and self._last is not None
        patch, ids = self.decoder.verify(caches, drafts, room)
        self._last = _Read(patch, ids[-1:], self._last.sampling, self._last.noise)
        return ids

    @property
    def more(self) -> bool:
        """Is the condition of the patch after the one that was read last made?"""
        return self._last is not None and self._last.patch.more

    def settle(self, caches: Sequence[KeyValueCache]) -> Left | None:
        """Take back what was queued too far, and wait for what changes in place; None where it was not going."""
        if self._last is None:
            return None
        last, live = self._last, self._live
        if self._ahead is not None:
            self.decoder.take_back(self._ahead, last.sampling, self._patch_size)
        self.decoder.settle(caches)
        self.decoder.give_back_noise(last.noise)
        self._ahead, self._last, self._live = None, None, None
        return Left(last.ids, live, self.decoder.condition(last.patch) if last.patch.more else None)
