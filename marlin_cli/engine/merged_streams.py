"""Streams in batches that walk in lockstep, where no kernel takes the rows of unlike streams: on GPUs, and by operations.

A prompt is read alone, or with those of its phase that came with it. Batches that stand at the same boundary become one,
padded to the longest, where one step can draw for all of them (`may_walk_together`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx
import numpy as np

from marlin_cli.engine.cache import ROWS_PER_STEP, CacheBits
from marlin_cli.engine.fused import row_bytes
from marlin_cli.engine.sampling import Noise, Sampling, sample_rows
from marlin_cli.engine.speculation import Drafting, Prices
from marlin_cli.engine.states import Beginning, PromptKeeper, StreamState, units_of
from marlin_cli.engine.streams import Ask, Drawn, Floats
from marlin_cli.errors import CheckpointError
from marlin_cli.models import Network, decoding_of
from marlin_cli.ops.dispatch import by_operations, gpu

# Patches without drafts until one is queued ahead.
UNDRAFTED = 4

# Streams whose prompts are read at the same time at most.
READ_TOGETHER = 8


@runtime_checkable
class Verifying(Protocol):
    """A `continuation.Continuation` whose only stream may be drafted; see `decoding.Lockstep`."""

    def may_be_drafted(self) -> bool:
        """Let it be so from here on, before anything is drawn."""

    def verify(self, drafts: np.ndarray) -> np.ndarray:
        """The ids [1, n] that come of drafts."""


class _Batch:
    """Streams that walk together.

    Attributes:
        noises: of each stream; one object for all that have the same settings and have drawn equally many ids.
        drawn: ids of each stream so far.
    """

    def __init__(self, state: Any, streams: Sequence[int], settings: Sequence[Sampling], vocab: int) -> None:
        self.state, self.streams = state, list(streams)
        self.settings = [each if each.temperature else Sampling() for each in settings]
        shared = {each: Noise(each.seed, vocab) for each in self.settings}
        self.noises = [shared[each] for each in self.settings]
        self.drawn = [0] * len(self.streams)
        self._prices, self._may_draft, self._undrafted = Prices(), False, 0
        self._zeros, self._check_at = 0, 0  # zeros so far: whatever is no number draws them, and they are seldom else

    @property
    def alike(self) -> bool:
        """Does one drawing do for all?"""
        return len(set(self.settings)) == 1 and len(set(map(id, self.noises))) == 1

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these alone."""
        self.streams, self.drawn = [self.streams[row] for row in rows], [self.drawn[row] for row in rows]
        self.settings, self.noises = [self.settings[row] for row in rows], [self.noises[row] for row in rows]
        self.state.keep(rows)

    def take_in(self, other: "_Batch") -> None:
        """The streams of another one walk with these, whose state has joined this one's."""
        self._may_draft = False
        one_noise = self.alike and other.alike and self.settings[0] == other.settings[0]
        if one_noise and (not self.settings[0].temperature or self.drawn[0] == other.drawn[0]):
            other.noises = [self.noises[0]] * len(other.noises)
        self.streams, self.drawn = self.streams + other.streams, self.drawn + other.drawn
        self.settings, self.noises = self.settings + other.settings, self.noises + other.noises

    def may_be_drafted(self, asks: Sequence[Ask]) -> None:
        """Before anything is drawn: shall the only stream be drafted, which takes the likeliest ids?"""
        drafting = asks[0].drafting if len(asks) == 1 else None
        # Launches of several sequences cost more where nothing is drafted: 1.15 times as much of 167 M, 1.7 times of the demo.
        alone = drafting is not None and drafting.is_expected and not asks[0].settings.temperature
        self._may_draft = alone and isinstance(self.state, Verifying) and self.state.may_be_drafted()

    def walk(self, asks: Sequence[Ask]) -> tuple[np.ndarray, Floats | None]:
        """Draw ids up to the next boundary, or until a stream has all that it asks for, or one where there are no boundaries.

        Returns:
            The ids [streams, n], and the logits [streams, n, vocab] that they were drawn from, if any stream asks for them.

        Raises:
            CheckpointError: predictions that are not finite.
        """
        told = any(ask.with_logits for ask in asks)
        least, most = min(ask.most for ask in asks), max(ask.most for ask in asks)
        ids, logits = [], []
        drawn = 0
        while drawn == 0 or not (drawn >= least or self.state.at_boundary):
            new, rows = self._advance(most - drawn, told, asks[0].drafting if self._may_draft and len(asks) == 1 else None)
            ids.append(np.array(new))
            drawn += new.shape[1]
            if rows is not None:
                logits.append(np.array(rows)[:, None])
        return np.concatenate(ids, axis=1), np.concatenate(logits, axis=1) if told else None

    def _advance(
        self, most: int, with_logits: bool, drafting: Drafting | None
    ) -> tuple[mx.array | np.ndarray, mx.array | None]:
        """Draw the next ids [streams, n]: all that the open patch lacks, or one, with the logits that it was drawn from."""
        if self._zeros >= self._check_at:
            self.state.check_finite()
            self._check_at = max(1, 2 * self._zeros)
        logits = None
        if drafting is not None and not with_logits:
            ids = self._drafted(drafting, most)
        elif self.alike and not with_logits:
            ids = self.state.advance(self.settings[0], self.noises[0], most)
        else:
            logits = self.state.logits
            ids = sample_rows(logits, self.settings, self._noise_of_an_id())[:, None]
            self.state.push(ids[:, 0])
        self._zeros += int((np.array(ids) == 0).sum())
        self.drawn = [count + ids.shape[1] for count in self.drawn]
        return ids, logits

    def _drafted(self, drafting: Drafting, most: int) -> mx.array | np.ndarray:
        """The next ids [1, n] of the only stream: those of its drafts that are right and a patch more, or what a step gives."""
        size, began, is_ahead = self.state.config.patch_size, time.perf_counter(), self.state.is_ahead
        room = min(most, self.state.config.max_bytes - self.state.positions[0]) // size - 1
        units = min(room, self.state.most_drafted)
        ids = drafting.draft(size, 0, units * size, self._prices) if units > 0 else []
        if ids:
            found = self.state.verify(np.array(ids, dtype=np.int32).reshape(-1, size))
            self._undrafted = 0
            self._prices.drafted(time.perf_counter() - began, 0.0, 1, len(ids) // size)
            return found
        # A patch that is queued ahead cannot be drafted: it is where nothing has been for a while, and then by turns.
        self._undrafted += 1
        ahead = self._undrafted > UNDRAFTED and not is_ahead
        plain = self.state.advance(self.settings[0], self.noises[0], most if ahead else min(most, size))
        if not is_ahead and not self.state.is_ahead:
            self._prices.plain(time.perf_counter() - began, 0.0, 1)
        return plain

    def _noise_of_an_id(self) -> mx.array | None:
        if not any(each.temperature for each in self.settings):
            return None
        taken = {each: noise.take(1) for each, noise in {id(noise): noise for noise in self.noises}.items()}
        return mx.concatenate([taken[id(noise)] for noise in self.noises])


class _Noting:
    """A `PromptKeeper` that notes how much of a prompt it knew.

    Attributes:
        units: of the beginning that was restored.
    """

    def __init__(self, keeper: PromptKeeper) -> None:
        self._keeper, self.keeps_outputs, self.units = keeper, keeper.keeps_outputs, 0

    def is_ready(self, ids: Sequence[int]) -> bool:
        return self._keeper.is_ready(ids)

    def restore(self, ids: Sequence[int]) -> Beginning | None:
        beginning = self._keeper.restore(ids)
        self.units = 0 if beginning is None else beginning.units
        return beginning

    def keep(self, state: StreamState) -> None:
        self._keeper.keep(state)


class MergedStreams:
    """`Streams` of any network that a `continuation.Way` continues.

    Args:
        begin: see `continuation.Way`; what it gives may have its prompts yet to read, by its `read_slice`.
        phase: see `continuation.Way`.
        keeper: of prompts, which are read one by one then, as each may begin elsewhere.
        no_drafts: see `Streams`.
    """

    def __init__(
        self,
        network: Network,
        begin: Callable[[Any, Sequence[Any], CacheBits | None, PromptKeeper | None], Any],
        phase: Callable[[Any, int], object],
        bits: CacheBits,
        keeper: PromptKeeper | None = None,
        no_drafts: str | None = "",
    ) -> None:
        self.no_drafts = no_drafts
        self._network, self._begin, self._phase, self._bits = network, begin, phase, bits
        self._keeper = None if keeper is None else _Noting(keeper)
        self._known: dict[int, int] = {}  # ids of prompts that were not read, by stream, where there are any
        self._unread: dict[int, Sequence[int]] = {}
        self._entering: _Batch | None = None  # the batch whose prompts are being read
        self._gone: set[int] = set()  # streams of it that have ended meanwhile
        self._batches: list[_Batch] = []

    @property
    def nbytes(self) -> int:
        entering = [] if self._entering is None else [self._entering]
        return sum(sum(batch.state.cache_bytes.values()) for batch in [*self._batches, *entering])

    def most_bytes(self, ids: int) -> int:
        return most_bytes(self._network, self._bits, ids)

    def bytes_together(self, most: Sequence[int]) -> int:
        return len(most) * max(most, default=0)  # they are padded to the longest

    def is_ready(self, ids: Sequence[int]) -> bool:
        return self._keeper is None or self._keeper.is_ready(ids)

    def begin(self, stream: int, ids: Sequence[int]) -> None:
        self._unread[stream] = ids

    def step(self, asks: Mapping[int, Ask], slice_rows: int) -> Mapping[int, Drawn]:
        self._read(asks)
        self._join()
        found: dict[int, Drawn] = {}
        for batch in self._batches:
            own = [asks[stream] for stream in batch.streams]
            try:
                ids, logits = batch.walk(own)
            except CheckpointError:
                found |= {stream: Drawn([-1]) for stream in batch.streams}
                continue
            for row, (ask, values) in enumerate(zip(own, ids.tolist(), strict=True)):
                own_logits = logits[row] if logits is not None and ask.with_logits else None
                found[batch.streams[row]] = Drawn(values, own_logits, self._known.get(batch.streams[row], 0))
        return found

    def end(self, stream: int) -> None:
        self._unread.pop(stream, None)
        self._known.pop(stream, None)
        if self._entering is not None and stream in self._entering.streams:
            self._gone.add(stream)
            if self._gone.issuperset(self._entering.streams):
                self._entering = None
        for batch in self._batches:
            rows = [row for row, other in enumerate(batch.streams) if other != stream]
            if not rows:
                self._batches.remove(batch)
                return
            if len(rows) < len(batch.streams):
                batch.keep(rows)

    def _read(self, asks: Mapping[int, Ask]) -> None:
        """Read a slice of the prompt that came first, and of others of its phase beside it; all of it if nobody waits."""
        if self._entering is None and self._unread:
            kinds = {
                stream: (self._phase(self._network.config, len(ids)), one_drawing() and asks[stream].settings)
                for stream, ids in self._unread.items()
            }
            first = next(iter(kinds.values()))
            together = [stream for stream, kind in kinds.items() if kind == first]
            alone = self._keeper is not None or self._bits.window is not None  # a window begins with no filler
            together = together[: 1 if alone else READ_TOGETHER]
            prompts = [self._unread.pop(stream) for stream in together]
            state = self._begin(self._network, prompts, self._bits, self._keeper)
            settings = [asks[stream].settings for stream in together]
            self._entering, self._gone = _Batch(state, together, settings, self._network.config.vocab_size), set()
        if self._entering is None:
            return
        while self._entering.state.read_slice():
            if self._batches:
                return
        batch, self._entering = self._entering, None
        if self._keeper is not None:  # prompts are read one by one
            self._known[batch.streams[0]], self._keeper.units = self._keeper.units * units_of(self._network.config).size, 0
        if self._gone:  # while it was read
            batch.keep([row for row, stream in enumerate(batch.streams) if stream not in self._gone])
        batch.may_be_drafted([asks[stream] for stream in batch.streams])
        self._batches.append(batch)

    def _join(self) -> None:
        """Make one of batches that stand at the same boundary."""
        joined: list[_Batch] = []
        for batch in self._batches:
            for other in joined:
                if may_walk_together(other, batch) and other.state.join(batch.state):
                    other.take_in(batch)
                    break
            else:
                joined.append(batch)
        self._batches = joined


def most_bytes(network: Network, cache_bits: CacheBits, ids: int) -> int:
    """Bytes that MLX's own caches of a text of so many ids may take, in rows that grow by steps."""
    decoding = decoding_of(network.config)
    stack = decoding.stacks(network.config)[0]
    rows = -(-stack.most_kept(ids // stack.row_bytes + 1) // ROWS_PER_STEP) * ROWS_PER_STEP
    widths = sum(row_bytes(stack.head_dim, bits) for bits in (cache_bits.keys, cache_bits.values))
    return rows * stack.layers * stack.kv_heads * widths + decoding.beside_bytes(network.config)


def one_drawing() -> bool:
    """Whether a step has one drawing for all its streams: a GPU's whole patches have, operations have one by row."""
    return gpu() is not None and not by_operations()


def may_walk_together(one: _Batch, other: _Batch) -> bool:
    """Whether one step draws for both."""
    if not one_drawing():
        return True
    same_ids = not one.settings[0].temperature or one.drawn[0] == other.drawn[0]
    return one.alike and other.alike and one.settings[0] == other.settings[0] and same_ids
