"""What a page is made of, as plain values: text, tables and charts. Draws nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Grid:
    """A table of text; the first column names its row, the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Bars:
    """A bar for each label and series, from 0. A value of None leaves its bar out.

    `ranges` has by series where each value may lie, from its lowest to its highest.
    """

    title: str
    unit: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[float | None]]
    stacked: bool = False  # the series of a label one after the other, as shares of a whole
    ranges: Mapping[str, Sequence[tuple[float, float] | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """A place in a plot, with its standard error or spread if there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""


@dataclass(frozen=True)
class Plot:
    """Points by series over two axes. Logarithmic axes leave out what is not above zero."""

    title: str
    x_title: str
    y_title: str
    series: Mapping[str, Sequence[Point]]
    joined: bool = True  # by lines, in the order of x
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Histogram:
    """Counts between edges, of which there is one more. On a logarithmic axis all edges are above zero."""

    title: str
    x_title: str
    edges: Sequence[float]
    counts: Mapping[str, Sequence[float]]  # by series
    log_x: bool = False


Chart: TypeAlias = Bars | Plot | Histogram
Block: TypeAlias = Text | Grid | Chart


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]
