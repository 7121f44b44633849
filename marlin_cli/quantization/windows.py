"""Calibration bytes as batches of whole windows, for the steps that run bytes through a network."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from marlin_cli.corpus import Corpus
from marlin_cli.models import Network, architecture_of

# Bytes of a window where the network's context holds them, and windows of a batch.
WINDOW_BYTES = 1024
WINDOWS_PER_BATCH = 8

# Windows of one domain: the domain, and bytes [windows, window_bytes].
Batch = tuple[str, npt.NDArray[np.uint8]]


def window_bytes_of(network: Network) -> int:
    """Whole units (patches) of at most `WINDOW_BYTES`, within the network's context; at least one."""
    architecture = architecture_of(network)
    unit = architecture.unit_bytes(network.config)
    return max(min(WINDOW_BYTES, architecture.most_bytes(network.config)) // unit, 1) * unit


def whole_windows(corpus: Corpus, window_bytes: int) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    """Each window of a corpus that has all its bytes, by itself: the domain, and bytes [window_bytes]."""
    for window in corpus:
        if len(window.bytes) == window_bytes:
            yield window.domain, window.bytes


def batches_of(corpus: Corpus, window_bytes: int, windows: int = WINDOWS_PER_BATCH) -> Iterator[npt.NDArray[np.uint8]]:
    """The whole windows of a corpus as batches [windows, window_bytes]; what fills no batch is left out."""
    batch: list[npt.NDArray[np.uint8]] = []
    for _, window in whole_windows(corpus, window_bytes):
        batch.append(window)
        if len(batch) == windows:
            yield np.stack(batch)
            batch = []


def batches_by_domain(corpus: Corpus, window_bytes: int, windows: int = WINDOWS_PER_BATCH) -> list[Batch]:
    """All whole windows of a corpus, at most `windows` of a domain together, domain after domain."""
    found: dict[str, list[npt.NDArray[np.uint8]]] = {}
    for domain, window in whole_windows(corpus, window_bytes):
        found.setdefault(domain, []).append(window)
    return [
        (domain, np.stack(each[start : start + windows]))
        for domain, each in sorted(found.items())
        for start in range(0, len(each), windows)
    ]
