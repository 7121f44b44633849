"""Ratios with their standard errors, over windows or pairs. Arrays in, a few floats out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error, which is None where a single observation does not tell."""

    value: float
    standard_error: float | None


def ratio(totals: Floats, sizes: Floats) -> Estimate:
    """Sum of `totals` [n] over sum of `sizes` [n], where observation i adds to both.

    The standard error is that of a ratio estimator, from the residuals of its observations:
    sqrt(n / (n - 1) x sum((total_i - ratio x size_i)^2)) / sum(sizes) (Cochran, Sampling Techniques, 3rd edition,
    chapter 6). It takes the observations as independent.
    """
    count, size = len(totals), float(sizes.sum())
    value = float(totals.sum()) / size
    if count < 2:
        return Estimate(value, None)
    residuals = totals - value * sizes
    return Estimate(value, math.sqrt(count / (count - 1) * float(residuals @ residuals)) / size)


def stratified(parts: Sequence[Estimate], sizes: Sequence[int]) -> Estimate:
    """The estimate over all strata from those within each, weighted by size: what lies between strata is no error."""
    total = sum(sizes)
    value = sum(part.value * size for part, size in zip(parts, sizes, strict=True)) / total
    variance = 0.0
    for part, size in zip(parts, sizes, strict=True):
        if part.standard_error is None:
            return Estimate(value, None)
        variance += (part.standard_error * size / total) ** 2
    return Estimate(value, math.sqrt(variance))
