"""Where the pages of packed caches stand in a GPU's memory, for stages whose launches read them and add rows in place."""

from collections.abc import Sequence

import mlx.core as mx

from marlin_cli.engine.cache import CacheBits, PackedKeyValueCache
from marlin_cli.ops.cuda_stages import PagePlaces, StageOnDevice, addresses


class PagesOnDevice:
    """Finds pages. One that is full stays where it is, and is asked for once.

    Args:
        bits: of keys and values.
    """

    def __init__(self, bits: CacheBits) -> None:
        self._packed = bits.keys < 16, bits.values < 16
        self._full: dict[int, tuple[mx.array, int]] = {}  # by an array's id: itself, and its place

    def use(
        self, caches: Sequence[PackedKeyValueCache], stages: Sequence[tuple[int, StageOnDevice]], *others: mx.array
    ) -> list[int]:
        """Have launches of stages use caches, with room for a row or more behind those that are there.

        Args:
            caches: of each layer; those that write to them say so to `wrote`.
            stages: each with the first of the caches' streams that it takes.

        Returns:
            Where the other arrays stand.
        """
        pages = [[[*keys, *values] for keys, values in cache.pages_with_room()] for cache in caches]
        full = [array for layer in pages for page in layer[:-1] for array in page]
        asked = [array for array in full if id(array) not in self._full]
        asked += [array for layer in pages for array in layer[-1]]
        found = addresses([*asked, *others])
        places = {**self._full, **{id(array): (array, place) for array, place in zip(asked, found, strict=False)}}
        self._full = {id(array): places[id(array)] for array in full}
        held = [array for layer in pages for page in layer for array in page]
        for first, stage in stages:
            own = [
                [self._places_of([places[id(array)][1] + first * (array.nbytes // array.shape[0]) for array in page])
                 for page in layer]
                for layer in pages
            ]  # fmt: skip
            stage.use_pages(held, own)
        return found[len(asked) :]

    def _places_of(self, present: Sequence[int]) -> PagePlaces:
        """The places of a page's arrays, of which those that are not packed have no scales."""
        rest = iter(present)
        keys, values = ((next(rest), next(rest) if packed else 0) for packed in self._packed)
        return PagePlaces(*keys, *values)
