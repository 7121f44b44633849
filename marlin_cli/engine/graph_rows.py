"""Rows of many streams, which stand anywhere, through a stage of a MegaByte by operations: for stages that no kernel takes."""

import itertools
from collections.abc import Sequence

import mlx.core as mx

from marlin_cli.engine.cache import KeyValueCache
from marlin_cli.engine.stage_caches import GraphCache
from marlin_cli.models.megabyte_layers import Stack


def run_together(stack: Stack, rows: mx.array, counts: Sequence[int], caches: Sequence[GraphCache]) -> mx.array:
    """Take rows of many streams, which stand anywhere, through a stage: hidden rows [sum of counts, dim].

    Streams that have equally many rows go together, so that products take the rows of all.

    Args:
        rows: [sum of counts, dim], those of each stream together.
        caches: of one stream each.
    """
    starts = [0, *itertools.accumulate(counts)]
    parts: dict[int, mx.array] = {}
    for count in dict.fromkeys(counts):
        places = [place for place, own in enumerate(counts) if own == count]
        alike = mx.stack([rows[starts[place] : starts[place + 1]] for place in places])
        layers = [_Together(each) for each in zip(*(caches[place].layers for place in places), strict=True)]
        parts |= dict(zip(places, stack(alike, layers), strict=True))
    return mx.concatenate([parts[place] for place in range(len(counts))])


class _Together:
    """The caches of several streams in one layer, as one `LayerCache` of as many sequences."""

    def __init__(self, caches: Sequence[KeyValueCache]) -> None:
        self._caches = caches

    @property
    def offset(self) -> mx.array:
        return mx.array([cache.offset for cache in self._caches])

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None) -> mx.array:
        found = [
            cache.attend(queries[n : n + 1], keys[n : n + 1], values[n : n + 1], scale, window)
            for n, cache in enumerate(self._caches)
        ]
        return mx.concatenate(found)

    def delay(self, slot: int, rows: mx.array) -> mx.array:
        return mx.concatenate([cache.delay(slot, rows[n : n + 1]) for n, cache in enumerate(self._caches)])
