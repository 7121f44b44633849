"""Streams of a MegaByte on the CPU: each has a global cache of its own, and all walk through their patches together.

A step is one pass of the global stage over the rows that are due (a patch of each stream that walks, a slice of the prompts
that enter), and the places of a patch one after another for all whose prompts are read. At a place where a stream has an id
already, of a prompt that ends within a patch, that is fed and nothing is drawn: so all stand at the same place.

A stream that has a draft of the patches to come takes these through the global stage too, behind the patch that is due, and
verifies them (`patch_verification`). It goes on behind what was right, as far as the end of the patch, where the others are.
"""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.engine.cache import ROWS_PER_PAGE, CacheBits
from marlin_cli.engine.decoding import fused_stages
from marlin_cli.engine.endless import reach_of
from marlin_cli.engine.fused import FusedCache, FusedStages
from marlin_cli.engine.patch_verification import DraftedPatches, Outcome, verified
from marlin_cli.engine.patch_walk import PatchWalk
from marlin_cli.engine.sampling import Draws, draw
from marlin_cli.engine.speculation import NOT_BY_BOUNDS, ROWS_DEPEND, Prices
from marlin_cli.engine.stage_caches import GraphCache
from marlin_cli.engine.states import Beginning, Place, PromptKeeper, StreamState, is_cut_anywhere, units_of
from marlin_cli.engine.streams import ROWS_READ_ALONE, Ask, Drawn, Floats, slices
from marlin_cli.models.megabyte import MegaByte

Ids = npt.NDArray[np.int32]


class _Stream:
    """What is known of one stream.

    Attributes:
        unread: [n, patch_size] whole patches that the global stage has not seen.
        rows: that it has seen, the leading row among them.
        given: the ids after those patches: the beginning of the open one.
        before: the id before them.
        enters: is its prompt still being read?
        known: ids of its prompt that need not be read.
        seen: the patches that it has seen, if they are kept.
        places: where reading has paused before, if they are kept and a shift of tokens asks for them.
        condition: of the patch after those seen, once it is known: [streams, slots, dim], and its row there.
    """

    def __init__(self, cache: FusedCache | GraphCache, unread: Ids, given: list[int], before: int) -> None:
        self.cache, self.unread, self.given, self.before = cache, unread, given, before
        self.rows = 0
        self.enters = True
        self.known = 0
        self.seen: list[Ids] = []
        self.places: list[Place] = []
        self.condition: tuple[mx.array, int] | None = None

    def take_up(self, beginning: Beginning) -> None:
        """Begin behind what need not be read."""
        self.cache.take_up(beginning)
        self.rows, self.places = beginning.count, list(beginning.places)
        self.seen, self.unread = [self.unread[: beginning.units]], self.unread[beginning.units :]
        self.known = self.seen[0].size

    def pause(self, condition: mx.array, row: int) -> Place:
        """Where it may be taken up: here, where the next patch has this condition."""
        return Place(self.rows - 1, condition[row : row + 1], self.cache.delayed())

    def draft(self, patches: Ids) -> None:
        """Take drafted patches in behind the one that is due; the last of them needs no row of its own."""
        if len(patches) > 1:
            assert isinstance(self.cache, FusedCache)
            self.cache.may_go_back()
            self.unread = np.concatenate([self.unread, patches[:-1]])

    def go_on_behind(self, draft: DraftedPatches, outcome: Outcome) -> int:
        """Forget what was drafted wrong, which the global stage has seen.

        Returns:
            Rows of the draft that it has seen and that stay: up to the one that gives the condition of the patch that is open,
            or, where none is, to the one before the patch that is due.
        """
        size, whole = draft.patches.shape[1], outcome.whole
        kept = whole + outcome.is_open
        forgotten = len(draft.patches) - kept
        if forgotten:
            assert isinstance(self.cache, FusedCache)
            self.cache.forget(forgotten)
            self.rows -= forgotten
        if self.seen:
            self.seen[-1] = self.seen[-1][:kept]
        last = outcome.text[(whole - 1) * size : whole * size] if whole else [self.before]
        self.before, self.given = last[-1], outcome.open
        self.unread = np.array([] if outcome.is_open else [last], dtype=np.int32).reshape(-1, size)
        return kept

    @property
    def due(self) -> int:
        """Rows that the global stage has to see before the open patch can go on."""
        return len(self.unread) + (self.rows == 0)


class _First(NamedTuple):
    """An id and the logits [1, vocab] that it was drawn from."""

    id: int
    logits: Floats


class PatchStreams:
    """`Streams` of a MegaByte whose layers the kernels know. Made by `patch_streams`."""

    def __init__(self, network: MegaByte, fused: FusedStages, bits: CacheBits, keeper: PromptKeeper | None = None) -> None:
        self._network, self._config, self._fused, self._bits = network, network.config, fused, bits
        self._keeper = keeper
        # megabyte_pytorch predicts from the patch that ends a prompt, so that patch is left open; and the first id after it.
        self._ahead = 1 if network.config.layout == "megabyte_pytorch" else 0
        self._streams: dict[int, _Stream] = {}
        self._prices = Prices()

    @property
    def no_drafts(self) -> str | None:
        if not self._fused.has(0):
            return "ranks share the model, whose sums do not keep rows apart"
        if not self._fused.rows_are_exact:
            return ROWS_DEPEND
        return None if self._bits.share_left is None else NOT_BY_BOUNDS

    @property
    def nbytes(self) -> int:
        return sum(stream.cache.nbytes for stream in self._streams.values())

    def most_bytes(self, ids: int) -> int:
        size = self._config.patch_size
        rows = 1 + ids // size
        if self._bits.window is not None:  # pages that are left in part, and the rows that are read at once, come on top
            rows = min(rows, reach_of(self._config, self._bits.window).farthest + 1 + 2 * ROWS_PER_PAGE + ROWS_READ_ALONE)
        kept = self._fused.cache_bytes(0, rows, self._bits.keys, self._bits.values)
        return kept + sum(self._fused.cache_bytes(n, stage.length + 1) for n, stage in enumerate(self._config.stages) if n)

    def bytes_together(self, most: Sequence[int]) -> int:
        return sum(most)

    def is_ready(self, ids: Sequence[int]) -> bool:
        return self._keeper is None or self._keeper.is_ready(ids)

    def begin(self, stream: int, ids: Sequence[int]) -> None:
        size = self._config.patch_size
        whole = max(0, len(ids) - self._ahead) // size * size
        unread = np.array(list(ids[:whole]), dtype=np.int32).reshape(-1, size)
        cache = self._fused.new_cache(0, 1, [], self._bits)
        before = ids[whole - 1] if whole else self._config.bos_byte
        self._streams[stream] = _Stream(cache, unread, list(ids[whole:]), before)
        beginning = None if self._keeper is None else self._keeper.restore(ids)
        if beginning is not None:
            self._streams[stream].take_up(beginning)

    def step(self, asks: Mapping[int, Ask], slice_rows: int) -> Mapping[int, Drawn]:
        ready = [number for number, stream in self._streams.items() if stream.enters and stream.due == 0]  # all was known
        conditions = [self._streams[number].places[-1].last for number in ready]
        where = {number: (row, 1) for row, number in enumerate(ready)}  # of the conditions: the first row of each, and how many
        clock = [time.process_time()]
        drafted = self._drafts(asks)
        reads = {number: stream.due for number, stream in self._streams.items() if not stream.enters}
        entering = {number: stream.due for number, stream in self._streams.items() if stream.enters and stream.due}
        reads |= slices(entering, len(reads) + len(ready), slice_rows)
        if reads:
            hidden = self._read(reads)
            ends = dict(zip(reads, (np.cumsum(list(reads.values())) - 1).tolist(), strict=True))
            rows: list[int] = []
            for number in reads:
                if self._streams[number].due == 0:
                    count = len(drafted[number]) if number in drafted else 1
                    where[number] = len(ready) + len(rows), count
                    rows += range(ends[number] + 1 - count, ends[number] + 1)
            if rows:
                conditions.append(self._network.to_next(0, hidden[mx.array(rows)]))
            else:
                mx.eval(hidden)
            if self._keeper is not None and not is_cut_anywhere(self._config):
                self._pause({number: end for number, end in ends.items() if self._streams[number].due}, hidden)
        if not where:
            return {}
        condition = conditions[0] if len(conditions) == 1 else mx.concatenate(conditions)
        for number in where:
            stream = self._streams[number]
            if stream.enters:
                stream.condition = condition, where[number][0]
                self._keep(stream)
        timed = not entering and not ready and any(ask.drafting is not None for ask in asks.values())
        clock.append(time.process_time())  # kernels compute at once: what is left to MLX is little, and counts as written
        found, walks = self._verify(asks, condition, where, drafted)
        clock.append(time.process_time())
        if walks:
            rows = [row for row, _ in walks.values()]
            alone = rows == list(range(condition.shape[0]))
            walking = {number: ask for number, (_, ask) in walks.items()}
            for number, drawn in self._walk(walking, condition if alone else condition[mx.array(rows)]).items():
                found[number] = _joined(found.get(number), drawn)
        clock.append(time.process_time())
        if timed:
            self._learn(*np.diff(clock).tolist(), streams=len(where), patches=sum(map(len, drafted.values())))
        return found

    def _drafts(self, asks: Mapping[int, Ask]) -> dict[int, Ids]:
        """The patches [n, patch_size] that streams are drafted ahead, which have taken them in; of those that are."""
        size, found = self._config.patch_size, {}
        for number, stream in self._streams.items():
            drafting = asks[number].drafting
            if drafting is None or stream.enters or len(stream.given) != self._ahead:
                continue
            most = asks[number].most - self._ahead  # the end of a draft predicts one id more in megabyte_pytorch
            ids = drafting.draft(size, self._ahead, most, self._prices)
            if ids:
                found[number] = np.array([*stream.given, *ids], dtype=np.int32).reshape(-1, size)
                stream.draft(found[number])
        return found

    def _verify(
        self, asks: Mapping[int, Ask], condition: mx.array, where: Mapping[int, tuple[int, int]], drafted: Mapping[int, Ids]
    ) -> tuple[dict[int, Drawn], dict[int, tuple[int, Ask]]]:
        """What drafts have given, and the streams that go on: the rows of their conditions, and what each still asks for."""
        drafts = {
            number: DraftedPatches(patches, self._ahead, self._streams[number].before, where[number][0])
            for number, patches in drafted.items()
        }
        outcomes = verified(self._config, self._fused, condition, drafts, asks) if drafts else {}
        found, walks = {}, {}
        for number, (row, _) in where.items():
            stream, ask = self._streams[number], asks[number]
            if number not in outcomes:
                stream.condition = condition, row
                walks[number] = row, ask
                continue
            outcome = outcomes[number]
            found[number] = Drawn(outcome.ids, outcome.logits)
            row += stream.go_on_behind(drafts[number], outcome) - 1
            stream.condition = condition, row
            left = ask.most - len(outcome.ids)
            if outcome.is_open and left > 0:
                walks[number] = row, replace(ask, most=left)
        return found, walks

    def _learn(self, reading: float, verifying: float, writing: float, *, streams: int, patches: int) -> None:
        """What a step has cost, for those that follow."""
        if patches:
            self._prices.drafted(reading, verifying, streams, patches)
        else:
            self._prices.plain(reading, writing, streams)

    def follow(self, stream: int, ids: Sequence[int]) -> None:
        """Append ids to a stream that were not drawn here."""
        own, size = self._streams[stream], self._config.patch_size
        behind = [*own.given, *ids]
        whole = max(0, len(behind) - self._ahead) // size * size
        if whole:
            new = np.array(behind[:whole], dtype=np.int32).reshape(-1, size)
            own.unread, own.before = np.concatenate([own.unread, new]), behind[whole - 1]
        own.given = behind[whole:]

    def look_ahead(self, stream: int, ask: Ask) -> list[int]:
        """The ids that would follow the only stream there is, as many as it asks for. It stays where it is."""
        own = self._streams[stream]
        if own.due:
            own.condition = self._network.to_next(0, self._read({stream: own.due})[-1:]), 0
        assert own.condition is not None and isinstance(own.cache, FusedCache)
        self._streams[stream] = copy.copy(own)
        self._streams[stream].cache = own.cache.copy()
        found = list(self._walk({stream: ask}, own.condition[0])[stream].ids)
        while len(found) < ask.most:
            found += self.step({stream: replace(ask, most=ask.most - len(found))}, 1)[stream].ids
        self._streams[stream] = own
        return found[: ask.most]

    def end(self, stream: int) -> None:
        ended = self._streams.pop(stream, None)
        if ended is not None and not ended.enters and self._keeper is not None and self._keeper.keeps_outputs:
            self._keep(ended)

    def _pause(self, ends: Mapping[int, int], hidden: mx.array) -> None:
        """Note where streams stand whose prompts have been read so far; `ends` has the last row of each in `hidden`."""
        if ends:
            conditions = self._network.to_next(0, hidden[mx.array(list(ends.values()))])
            for row, number in enumerate(ends):
                self._streams[number].places.append(self._streams[number].pause(conditions, row))

    def _keep(self, stream: _Stream) -> None:
        """Hand over what stands for all that a stream has seen."""
        if self._keeper is None or stream.rows < 2:
            return
        assert stream.condition is not None
        ids, here = np.concatenate(stream.seen).reshape(-1), stream.pause(*stream.condition)
        places = (*(place for place in stream.places if place.units < here.units), here)
        cut_anywhere = is_cut_anywhere(self._config)
        self._keeper.keep(StreamState(ids, units_of(self._config), stream.cache.kept(), places, cut_anywhere))

    def _read(self, reads: Mapping[int, int]) -> mx.array:
        """Take so many rows of each stream through the global stage: hidden rows [sum, dim]."""
        patches: list[Ids] = []
        index: list[int] = []
        order: list[int] = []
        leads = sum(1 for number in reads if self._streams[number].rows == 0)
        for number, count in reads.items():
            stream = self._streams[number]
            if stream.rows == 0:
                order.append(0)
            new = stream.unread[: count - (stream.rows == 0)]
            first = max(0, stream.rows - 1)
            order += range(1 + len(index), 1 + len(index) + len(new))
            index += range(first, first + len(new))
            patches.append(new)
            if self._keeper is not None:
                stream.seen.append(new)
            stream.unread = stream.unread[len(new) :]
            stream.rows += count
        tokens = mx.array(np.concatenate(patches))[:, None]
        rows = self._network.token_rows(0, tokens, mx.array(index, dtype=mx.int32), None)[:, 0]
        if leads:
            lead = self._network.leading_row(0, 1, None, None)[0]
            rows = mx.concatenate([lead, rows])[mx.array(order)]
        caches = [self._streams[number].cache for number in reads]
        return self._fused.run_together(0, rows, list(reads.values()), caches)

    def _walk(self, asks: Mapping[int, Ask], condition: mx.array) -> dict[int, Drawn]:
        """Go on to the end of the patch with these streams, or as far as any of them wants to."""
        streams = [self._streams[number] for number in asks]
        firsts = self._first_ids(asks)
        size = self._config.patch_size + self._ahead
        known = [len(stream.given) for stream in streams]
        wanted = [
            min(size - count, ask.most - len(first)) for count, ask, first in zip(known, asks.values(), firsts, strict=True)
        ]
        places = max(count + more for count, more in zip(known, wanted, strict=True))
        noise = []
        for ask, count, more in zip(asks.values(), known, wanted, strict=True):
            taken = ask.noise.take(max(0, places - count)) if ask.settings.temperature else np.zeros((0, 0), dtype=np.float32)
            noise.append(mx.array(taken))
            if len(taken) > more:
                ask.noise.give_back(taken[more:])  # others walk farther than this one wants to
        walk = PatchWalk(
            self._network, self._fused, condition, mx.array([stream.before for stream in streams]),
            [stream.given for stream in streams], Draws([ask.settings for ask in asks.values()], noise), places,
            with_logits=any(ask.with_logits for ask in asks.values()),
        )  # fmt: skip
        ids, found = walk.ids.tolist(), {}
        for row, (number, ask) in enumerate(asks.items()):
            stream, first = streams[row], firsts[row]
            own = slice(known[row], known[row] + wanted[row])
            logits = None
            if ask.with_logits:
                assert walk.logits is not None
                logits = np.concatenate([*(each.logits for each in first), walk.logits[row, own]])
            found[number] = Drawn([*(each.id for each in first), *ids[row][own]], logits, stream.known)
            stream.enters = False
            patch = self._config.patch_size
            if places >= patch:
                stream.unread = np.maximum(walk.ids[row : row + 1, :patch], 0)
                stream.before, stream.given = ids[row][patch - 1], ids[row][patch:]
        return found

    def _first_ids(self, asks: Mapping[int, Ask]) -> list[list[_First]]:
        """By stream, the first id of a text of no ids in megabyte_pytorch, which no patch predicts; else nothing."""
        found: list[list[_First]] = []
        for number, ask in asks.items():
            stream = self._streams[number]
            if not self._ahead or stream.given:
                found.append([])
                continue
            logits = self._network.logits_of_nothing(1)
            noise = mx.array(ask.noise.take(1)) if ask.settings.temperature else None
            ids, costs = draw(logits, [()], [ask.settings], noise)
            first = _First(ids[0] if math.isfinite(costs[0]) else -1, np.array(logits))
            stream.given = [max(first.id, 0)]
            found.append([first])
        return found


def _joined(first: Drawn | None, then: Drawn) -> Drawn:
    """What a stream drew in two parts."""
    if first is None:
        return then
    both = None if first.logits is None or then.logits is None else np.concatenate([first.logits, then.logits])
    return Drawn([*first.ids, *then.ids], both)


def patch_streams(network: MegaByte, bits: CacheBits, keeper: PromptKeeper | None = None) -> PatchStreams | None:
    """The streams of a network, or None where no kernels run that know its layers and such a cache."""
    fused = fused_stages(network, bits)
    return None if fused is None else PatchStreams(network, fused, bits, keeper)
