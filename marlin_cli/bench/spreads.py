"""Repeats of one measurement, and many single waits, summed up in a few floats."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Repeats of one measurement, and what sums them up."""

    median: float
    minimum: float
    maximum: float
    interquartile_range: float  # third quartile less first: robust against one disturbed repeat
    samples: tuple[float, ...]  # in the order they were taken

    @property
    def relative_range(self) -> float:
        """The interquartile range over the median."""
        return self.interquartile_range / self.median


@dataclass(frozen=True)
class Percentiles:
    """Where single waits lie: so many in a hundred are no longer than this; and the longest."""

    percentile_50: float
    percentile_90: float
    percentile_99: float
    maximum: float


def spread_of(samples: Sequence[float]) -> Spread:
    """The spread of one or more samples."""
    first, median, third = np.percentile(np.array(samples, dtype=np.float64), [25, 50, 75])
    return Spread(float(median), min(samples), max(samples), float(third - first), tuple(samples))


def percentiles_of(samples: Sequence[float]) -> Percentiles:
    """The percentiles of one or more samples, by linear interpolation between them."""
    found = np.percentile(np.array(samples, dtype=np.float64), [50, 90, 99, 100])
    return Percentiles(*map(float, found))
