"""Charts as one picture in a file, SVG or PNG, drawn by matplotlib (extra `plot`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from marlin_cli.errors import UsageError
from marlin_cli.page.axes import number
from marlin_cli.page.blocks import Bars, Chart, Histogram, Plot
from marlin_cli.page.document import LIGHT
from marlin_cli.page.svg import shortened
from marlin_cli.writing import writing

SUFFIXES = (".svg", ".png", ".pdf")

# Inches of a chart in so many columns, of a curve, and of a bar.
CHART_WIDTHS = {1: 6.0, 2: 6.0, 3: 5.4, 4: 5.2}
PLOT_HEIGHT, BAR_HEIGHT = 2.6, 0.24
DOTS_PER_INCH = 144

# Inches of a picture that is seen whole on a screen of 1080 lines.
SCREEN_HEIGHT = 7.4

NAMES_INSIDE = 4  # of curves, at most


def check_figure_path(path: Path) -> None:
    """Raise now what `write_figure` would raise before it draws.

    Raises:
        UsageError: another kind of file, or matplotlib is missing.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: pictures are {', '.join(SUFFIXES)}; name the file so")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(f"{path}: pictures need matplotlib; install it with pip install 'marlin-cli[plot]'") from None


def write_figure(path: Path, charts: Sequence[Chart], title: str) -> None:
    """Draw the charts in as few columns as a screen shows whole, and write the file, atomically; equal charts give equal files.

    More than four columns would be too narrow: of more charts than stand in them the picture is higher.

    Raises:
        UsageError: see `check_figure_path`; or there is nothing to draw.
        OutputError: the file cannot be written.
    """
    check_figure_path(path)
    if not charts:
        raise UsageError(f"{path}: the result holds nothing that can be drawn")
    import matplotlib
    from matplotlib.figure import Figure

    # Names are text, not formulas; and no random identifiers in the file.
    with matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "marlin", "font.size": 9}):
        columns = _columns(charts)
        height = max(sum(_height(chart) for chart in column) for column in columns)
        width = CHART_WIDTHS[len(columns)] * len(columns)
        figure = Figure(figsize=(width, height + 0.5), layout="constrained", dpi=DOTS_PER_INCH)
        figure.suptitle(shortened(title, 90))
        for part, column in zip(figure.subfigures(1, len(columns), squeeze=False)[0], columns, strict=True):
            heights = [_height(chart) for chart in column]
            rest = height - sum(heights)
            axes = part.subplots(
                len(column) + (rest > 0.01), 1, squeeze=False, height_ratios=heights + ([rest] if rest > 0.01 else [])
            )
            for axis, chart in zip(axes[:, 0], column, strict=False):
                _draw(axis, chart)
            for axis in axes[len(column) :, 0]:
                axis.set_axis_off()
        # The solver of layouts differs in the last digits from call to call, and names in the file are made of them.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for index, part in enumerate(figure.subfigs):
            (_, bottom), (_, top) = part.bbox_relative.p0, part.bbox_relative.p1
            part.bbox_relative.p0 = (index / len(columns), round(float(bottom), 3))
            part.bbox_relative.p1 = ((index + 1) / len(columns), round(float(top), 3))
        for axis in figure.axes:
            left, bottom, width, height = (round(value, 4) for value in axis.get_position().bounds)
            axis.set_position((left, bottom, width, height))
        with writing(path) as temporary:
            dated = {"Date": None} if path.suffix == ".svg" else {"CreationDate": None} if path.suffix == ".pdf" else {}
            figure.savefig(temporary, metadata=dated)


def _columns(charts: Sequence[Chart]) -> list[list[Chart]]:
    """The charts in the fewest columns that a screen shows whole, the highest placed first; each column keeps their order."""
    found: list[list[int]] = []
    heights = [_height(chart) for chart in charts]
    for count in CHART_WIDTHS:
        found = [[] for _ in range(min(count, len(charts)))]
        for index in sorted(range(len(charts)), key=lambda index: -heights[index]):
            min(found, key=lambda column: sum(heights[each] for each in column)).append(index)
        if max(sum(heights[each] for each in column) for column in found) + 0.5 <= SCREEN_HEIGHT:
            break
    return [[charts[index] for index in column] for column in sorted(map(sorted, found))]


def _height(chart: Chart) -> float:
    if isinstance(chart, Bars):
        rows = len(chart.labels) * (1 if chart.stacked else max(len(chart.series), 1))
        return 0.9 + BAR_HEIGHT * rows
    return PLOT_HEIGHT


def _draw(axis: Any, chart: Chart) -> None:
    axis.set_title(chart.title, loc="left", fontweight="bold")
    axis.spines[["top", "right"]].set_visible(False)
    if isinstance(chart, Bars):
        _bars(axis, chart)
    elif isinstance(chart, Plot):
        _plot(axis, chart)
    else:
        _histogram(axis, chart)
    if axis.get_legend_handles_labels()[1]:
        # Bars fill their axes, and so do many names: they stand beside.
        fills = isinstance(chart, Bars) or (isinstance(chart, Plot) and len(chart.series) > NAMES_INSIDE)
        beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if fills else {}
        axis.legend(frameon=False, fontsize=8, **beside)


def _bars(axis: Any, chart: Bars) -> None:
    rows = range(len(chart.labels))
    thickness = 0.8 if chart.stacked else 0.8 / max(len(chart.series), 1)
    ends = [0.0] * len(chart.labels)
    for index, (name, values) in enumerate(chart.series.items()):
        lengths = [value or 0.0 for value in values]
        shift = 0.0 if chart.stacked else (index + 0.5) * thickness - 0.4
        axis.barh(
            [row + shift for row in rows], lengths, thickness * 0.94, left=ends if chart.stacked else None,
            color=LIGHT[index % len(LIGHT)], label=name or None,
        )  # fmt: skip
        if chart.stacked:
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
        else:
            for row, value in enumerate(values):
                if value is None:
                    continue
                reach = chart.ranges[name][row] if name in chart.ranges else None
                if reach is not None:
                    axis.plot(reach, [row + shift] * 2, color="#444444", linewidth=1, marker="|", markersize=5)
                _beside(axis, max(value, *(reach or (value,)), 0.0), row + shift, value)
    if chart.stacked:
        for row, end in enumerate(ends):
            _beside(axis, end, row, end)
    axis.set_xticks([])  # the numbers stand at the bars
    axis.spines["bottom"].set_visible(False)
    axis.set_yticks(list(rows), [shortened(label) for label in chart.labels])
    axis.invert_yaxis()
    axis.margins(x=0.32)  # room for the numbers, short of what names the bars
    axis.set_xlabel(chart.unit)


def _beside(axis: Any, x: float, y: float, value: float) -> None:
    """The value, to the right of a place."""
    axis.annotate(number(value), (x, y), (5, 0), textcoords="offset points", va="center", fontsize=8)


def _plot(axis: Any, chart: Plot) -> None:
    for index, (name, points) in enumerate(chart.series.items()):
        ordered = sorted(points, key=lambda point: point.x)
        colour = LIGHT[index % len(LIGHT)]
        style = "o-" if chart.joined else "o"
        axis.plot([point.x for point in ordered], [point.y for point in ordered], style, color=colour, label=name or None)
        for point in ordered:
            if point.low is not None and point.high is not None:
                axis.plot([point.x] * 2, [point.low, point.high], color=colour, linewidth=1)
    if chart.log_x:
        axis.set_xscale("log")
        _plain_ticks(axis.xaxis)
    if chart.log_y:
        axis.set_yscale("log")
        _plain_ticks(axis.yaxis)
    axis.set_xlabel(chart.x_title)
    axis.set_ylabel(chart.y_title)
    axis.grid(True, linewidth=0.4)


def _plain_ticks(axis: Any) -> None:
    """Powers of ten as numbers: matplotlib writes them as formulas, which are text here."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, place: number(value)))
    axis.set_minor_formatter(NullFormatter())


def _histogram(axis: Any, chart: Histogram) -> None:
    for index, (name, counts) in enumerate(chart.counts.items()):
        axis.stairs(counts, chart.edges, color=LIGHT[index % len(LIGHT)], label=name or None)
    if chart.log_x:
        axis.set_xscale("log")
        _plain_ticks(axis.xaxis)
    axis.set_xlabel(chart.x_title)
    axis.set_ylabel("count")
