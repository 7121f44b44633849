"""Numbers that a measurement cannot give, refused where statistics are read, merged and written. Knows no files."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from marlin_cli.errors import StatisticsError
from marlin_cli.text import quoted

# Whole numbers up to here are exact in float64, and a thousand files of them add up within 64 bits.
MOST_COUNTED = 1 << 53
MOST_DOMAINS = 1024

# Quantisation computes with squares in float32; a measurement, too, so that it never exceeds them.
LARGEST_SQUARE = float(np.finfo(np.float32).max)
LARGEST_VALUE = LARGEST_SQUARE**0.5

# What sums of x^T x in float32 may differ by on both sides of the diagonal, in parts of the root of its two squares.
ASYMMETRY = 0.01
ROWS_AT_ONCE = 256


def check_domains(domains: Mapping[str, int]) -> None:
    """See that there are bytes, not more domains than any corpus has, and no number that cannot be.

    Raises:
        StatisticsError: see above.
    """
    if len(domains) > MOST_DOMAINS:
        raise StatisticsError(f"{len(domains):,} domains, expected at most {MOST_DOMAINS:,}")
    for name, count in domains.items():
        if not 0 <= count <= MOST_COUNTED:
            raise StatisticsError(f"the bytes of domain {quoted(name)} cannot be: {quoted(count)}")
    if not 0 < sum(domains.values()) <= MOST_COUNTED:
        raise StatisticsError("the byte counts of its domains are missing or zero")


def check_moments(
    name: str, count: npt.NDArray[np.int64], sum_squares: npt.NDArray[np.float64], absolute_maximum: npt.NDArray[np.float32]
) -> None:
    """See that the moments of one input could be measured (see `Moments` for the shapes).

    Raises:
        StatisticsError: NaN, infinity, negative numbers, more than float32 holds, or sums of no rows.
    """
    for field, array in (("count", count), ("sum_squares", sum_squares), ("absolute_maximum", absolute_maximum)):
        if not (np.isfinite(array).all() and (array >= 0).all()):
            raise StatisticsError(f"{quoted(f'{name}.{field}')} holds NaN, infinity or a negative number")
    if count.astype(np.float64).sum() > MOST_COUNTED:
        raise StatisticsError(f"{quoted(f'{name}.count')} counts more rows than can be: above {MOST_COUNTED:,}")
    if not count.all():
        nothing = count == 0
        if sum_squares[nothing].any() or absolute_maximum[nothing].any():
            raise StatisticsError(f"{quoted(f'{name}.count')} is 0 where sums or maxima are not; no row was measured there")
    if (absolute_maximum > LARGEST_VALUE).any() or (sum_squares > count[..., None] * LARGEST_SQUARE).any():
        raise StatisticsError(f"{quoted(name)} holds numbers whose squares are beyond float32; the model overflowed")


def check_hessian(name: str, hessian: npt.NDArray[np.float32]) -> None:
    """See that [channels, channels] can be a sum of x^T x.

    Raises:
        StatisticsError: NaN, infinity, a negative diagonal, or another number on either side of it.
    """
    size = np.sqrt(np.maximum(diagonal := np.diagonal(hessian), 0))
    for start in range(0, len(hessian), ROWS_AT_ONCE):
        rows = hessian[start : start + ROWS_AT_ONCE]
        if not np.isfinite(rows).all():
            raise StatisticsError(f"{quoted(name)} holds NaN or infinity")
        allowed = ASYMMETRY * size[start : start + ROWS_AT_ONCE, None] * size
        if (np.abs(rows - hessian[:, start : start + ROWS_AT_ONCE].T) > allowed).any():
            raise StatisticsError(f"{quoted(name)} is not symmetric, as sums of x^T x are")
    if (diagonal < 0).any():
        raise StatisticsError(f"{quoted(name)} has a negative square on its diagonal")
