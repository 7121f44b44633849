"""Charts made fit to be seen: times in the unit that suits them, each chart once, and those that were asked for."""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from marlin_cli.page.blocks import Bars, Chart, Plot, Point

# The unit of times and how many of it a second has, by the longest time below which it is taken.
UNITS_OF_TIME = ((1e-3, "us", 1e6), (1.0, "ms", 1e3))


def fitting_time(chart: Chart) -> Chart:
    """A chart of seconds in ms or us where all of it is shorter than a second or a millisecond; its title names no unit."""
    if isinstance(chart, Bars) and chart.unit == "s":
        ends = (
            _ends(chart) if chart.stacked else [value for each in chart.series.values() for value in each if value is not None]
        )
        unit, scale = _unit_for(max(ends, default=0.0))
        series = {name: [_scaled(value, scale) for value in values] for name, values in chart.series.items()}
        ranges = {
            name: [None if each is None else (each[0] * scale, each[1] * scale) for each in values]
            for name, values in chart.ranges.items()
        }
        return dataclasses.replace(chart, title=_without_seconds(chart.title), unit=unit, series=series, ranges=ranges)
    if isinstance(chart, Plot) and chart.y_title == "s":
        unit, scale = _unit_for(max((point.y for points in chart.series.values() for point in points), default=0.0))
        curves = {name: [_point(point, scale) for point in points] for name, points in chart.series.items()}
        return dataclasses.replace(chart, title=_without_seconds(chart.title), y_title=unit, series=curves)
    return chart


def each_once(charts: Iterable[Chart]) -> list[Chart]:
    """The charts without those that show what one before them shows: a single domain is all domains."""
    found: list[Chart] = []
    for chart in charts:
        if chart not in found:
            found.append(chart)
    return found


def chosen(charts: Sequence[Chart], wanted: Sequence[str]) -> list[Chart]:
    """The charts whose titles hold any of these words, in upper or lower case, in their order. All where none is wanted."""
    if not wanted:
        return list(charts)
    return [chart for chart in charts if any(each.casefold() in chart.title.casefold() for each in wanted)]


def _unit_for(longest: float) -> tuple[str, float]:
    return next(((unit, scale) for below, unit, scale in UNITS_OF_TIME if 0 < longest < below), ("s", 1.0))


def _ends(chart: Bars) -> list[float]:
    """How far the bars reach."""
    join = sum if chart.stacked else max
    return [join(value or 0.0 for value in values) for values in zip(*chart.series.values(), strict=True)]


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _point(point: Point, scale: float) -> Point:
    return dataclasses.replace(point, y=point.y * scale, low=_scaled(point.low, scale), high=_scaled(point.high, scale))


def _without_seconds(title: str) -> str:
    """`Time to first byte seconds` as "Time to first byte", `Decode seconds by part` as "Decode time by part"."""
    plain = re.sub(r" seconds\b", "", title)
    if plain == title or re.search(r"\b(time|latency)\b", plain, re.IGNORECASE):
        return plain
    return re.sub(r" seconds\b", " time", title)
