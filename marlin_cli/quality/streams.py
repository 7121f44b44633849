"""How well models predict files that are streams: each is read once from its beginning on, however long, in a window."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.stream_scoring import PatchScorer, StreamScorer, stream_scorer
from marlin_cli.errors import CheckpointError
from marlin_cli.models import Network, architecture_of
from marlin_cli.quality.held_out import Window
from marlin_cli.quality.pass_sums import Groups, PassSums
from marlin_cli.quality.quality import Quality, own_sums, quality_of, read_windows
from marlin_cli.text import quoted


def measure_streams(
    networks: Mapping[str, tuple[Network, CacheBits]],
    windows: Mapping[str, Sequence[Window]],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> list[Quality]:
    """Score networks, by their names, each with the cache that it reads streams with.

    Args:
        windows: by domain, of each file one after another without a gap: they are what standard errors are taken over.
        on_bytes: told after each of them how many bytes it scored.

    Raises:
        UsageError: a network that cannot have such a cache.
        CheckpointError: predictions that are not finite; model and domain are named.
    """
    return [_measured(name, network, bits, windows, on_bytes) for name, (network, bits) in networks.items()]


def _measured(
    name: str,
    network: Network,
    bits: CacheBits,
    windows: Mapping[str, Sequence[Window]],
    on_bytes: Callable[[int], None],
) -> Quality:
    patch_size = architecture_of(network).unit_bytes(network.config)
    tallies: dict[str, list[PassSums]] = {domain: [] for domain in windows}
    pages: list[tuple[int, int]] = []
    for domain, part in windows.items():
        scorer: StreamScorer | None = None
        for window in part:
            if scorer is None or window.start == 0:
                pages = _added(pages, scorer)
                scorer = stream_scorer(network, bits)
            data, classes = read_windows([window])
            try:
                costs = scorer.score(data.tobytes()).astype(np.float64)
            except CheckpointError as error:
                raise CheckpointError(f"{name}: domain {quoted(domain)}: {error}") from None
            positions = (window.start + np.arange(window.length))[None] % patch_size
            tallies[domain].append(own_sums(Groups(classes, positions, patch_size), costs[None]))
            on_bytes(window.length)
        pages = _added(pages, scorer)
    return replace(quality_of(tallies), pages_read=tuple(pages))


def _added(pages: list[tuple[int, int]], scorer: StreamScorer | None) -> list[tuple[int, int]]:
    """With the pages of one more stream."""
    new = scorer.pages_read if isinstance(scorer, PatchScorer) else []
    if not any(there for _, there in new):
        return pages
    return [(a + c, b + d) for (a, b), (c, d) in zip(pages or [(0, 0)] * len(new), new, strict=True)]
