"""Axes of charts: where the ticks are, how numbers are written, and how values become places."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

# Steps between ticks, as factors of a power of ten.
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)

SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Axis:
    """The range of an axis and its ticks; `place` maps the range to 0 .. 1."""

    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def place(self, value: float) -> float:
        """Where on the axis `value` lies: 0 at its start, 1 at its end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def axis_of(values: Sequence[float], *, log: bool = False, from_zero: bool = False, most_ticks: int = 6) -> Axis:
    """An axis on which all of `values` have a place, from tick to tick where it is linear.

    Args:
        log: logarithmic; values must be above zero.
        from_zero: the axis holds 0 too.
    """
    if not values:
        values = [1.0]
    low, high = min(values), max(values)
    if log:
        return _log_axis(low, high, most_ticks)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        low, high = (low, low + 1.0) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    step = _step((high - low) / (most_ticks - 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [round(number * step, 12 - math.floor(math.log10(step))) for number in range(first, last + 1)]
    return Axis(ticks[0], ticks[-1], ticks)


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """The ticks as short as they can be told apart."""
    for digits in range(3, 12):
        texts = [number(tick, digits) for tick in ticks]
        if len(set(texts)) == len(texts):
            return texts
    return [repr(tick) for tick in ticks]


def _step(least: float) -> float:
    """The smallest pleasant step that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in STEPS if factor * power >= least * (1 - 1e-9))


def _log_axis(low: float, high: float, most_ticks: int) -> Axis:
    if high / low < 1.2:
        low, high = low / 1.5, high * 1.5
    if high / low < 4:  # too near for powers of ten
        ticks = axis_of([low, high], most_ticks=most_ticks).ticks
        return Axis(low, high, [tick for tick in ticks if low <= tick <= high], log=True)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside: list[float] = []
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        inside = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(inside) <= most_ticks:
            break
    inside = inside[:: -(-len(inside) // most_ticks)]
    return Axis(low, high, inside, log=True)


def number(value: float, digits: int = 3) -> str:
    """So many digits and a decimal suffix: 12.3k, 0.00452, 1e-7."""
    size = abs(value)
    scale, suffix = next((each for each in SUFFIXES if size >= each[0] * 0.9995), (1.0, ""))
    if suffix and size / scale < 1e5:
        return f"{value / scale:.{digits}g}{suffix}" if size / scale < 999.5 else f"{value / scale:,.0f}{suffix}"
    return re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{value:.{digits}g}")
