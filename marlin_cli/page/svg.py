"""Charts as inline SVG. Colours are classes, so that the page's style turns them dark; marks carry their values as titles."""

import html
import math
from collections.abc import Iterator, Mapping, Sequence

from marlin_cli.page.axes import Axis, axis_of, number, tick_texts
from marlin_cli.page.blocks import Bars, Chart, Histogram, Plot, Point

# The page scales a picture to its place: a phone shows it at about three quarters, which the text must survive.
WIDTH, PLOT_HEIGHT = 460.0, 230.0
LINE = 15.0  # from one line of small text to the next
LETTER = 7.5  # wide, on average, in the widest of the page's fonts
COLOURS = 8  # classes c0 .. c7

# Characters of a label beside a bar; the middle of a longer one is left out.
LABEL_LETTERS = 34


def draw(chart: Chart) -> str:
    """The chart as an `<svg>` element."""
    if isinstance(chart, Bars):
        return _bars(chart)
    return _plot(chart) if isinstance(chart, Plot) else _histogram(chart)


def clean(text: object) -> str:
    """Text for HTML and SVG: escaped, also for attributes; what is no character of a page becomes U+FFFD."""
    plain = "".join("\ufffd" if _is_foreign(ord(each)) else each for each in str(text))
    return html.escape(plain, quote=True)


def _is_foreign(code: int) -> bool:
    """Is it a control character, half of a surrogate pair (a byte of a name that is not UTF-8), or no character at all?"""
    control = code < 32 and code not in (9, 10) or 127 <= code < 160
    # Marks that turn the direction of writing around could dress a name up as another.
    turning = 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    return control or turning or 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE


def shortened(text: str, most: int = LABEL_LETTERS) -> str:
    """At most `most` characters of a label: its start and, longer, its end."""
    if len(text) <= most:
        return text
    end = most * 2 // 3
    return f"{text[: most - end - 1]}\u2026{text[-end:]}"


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{clean(title)}">'
        f"<title>{clean(title)}</title>{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{clean(text)}</text>'


def _rectangle(x: float, y: float, width: float, height: float, colour: int, title: str) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(width, 0):.2f}" height="{max(height, 0):.2f}"'
        f' class="c{colour % COLOURS}"><title>{clean(title)}</title></rect>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _legend(names: Sequence[str], top: float) -> tuple[list[str], float]:
    """Colours and names in as many lines as they need, and the place below them; nothing for a single nameless series."""
    if len(names) < 2 and not any(names):
        return [], top
    parts, x, y = [], 0.0, top + 11
    for index, name in enumerate(names):
        label = shortened(name, 46)
        width = 16 + LETTER * len(label) + 14
        if x and x + width > WIDTH:
            x, y = 0.0, y + LINE
        parts.append(f'<rect x="{x:.1f}" y="{y - 9:.1f}" width="10" height="10" rx="2" class="c{index % COLOURS}"/>')
        parts.append(_text(x + 15, y, label))
        x += width
    return parts, y + 10


def _bars(chart: Bars) -> str:
    names = list(chart.series)
    parts, top = _legend(names, 0)
    if chart.unit:
        top += LINE
        parts.append(_text(0, top - 4, chart.unit, "start", "faint"))
    width = LETTER * max((len(shortened(label)) for label in chart.labels), default=0) + 10
    above = width > WIDTH * 0.58  # long labels stand over their bars, not beside them
    left = 0.0 if above else width
    values = [value for values in chart.series.values() for value in values if value is not None]
    values += [end for ranges in chart.ranges.values() for each in ranges if each is not None for end in each]
    if chart.stacked:
        values = [sum(each[row] or 0.0 for each in chart.series.values()) for row in range(len(chart.labels))]
    axis = Axis(min([0.0, *values]), max([0.0, *values]) or 1.0, ())
    # Numbers of negative bars stand before them, and labels before those.
    below = [len(number(value)) for each in chart.series.values() for value in each if value is not None and value < 0]
    place = _Places(axis, left + (LETTER * max(below) if below else 0), WIDTH - 62)
    thickness = 13.0 if len(names) == 1 or chart.stacked else 11.0
    y = top + 4
    for row, label in enumerate(chart.labels):
        if above:
            parts.append(_text(0, y + 9, shortened(label, 66)))
            y += LINE
        heights = thickness if chart.stacked else thickness * len(names)
        if not above:
            parts.append(_text(left - 8, y + heights / 2 + 4, shortened(label), "end"))
        if chart.stacked:
            parts += _stack(chart, row, place, y, thickness)
        else:
            for index, name in enumerate(names):
                value = chart.series[name][row]
                if value is not None:
                    reach = chart.ranges[name][row] if name in chart.ranges else None
                    title = _mark(label, name, value, chart.unit)
                    parts += _bar(value, reach, place, y + index * thickness, thickness, index, title)
        y += heights + 8
    if not above:
        parts.append(_line(place(0), top, place(0), y - 4, "axis"))
    return _svg(chart.title, y, parts)


def _bar(
    value: float, reach: tuple[float, float] | None, place: "_Places", y: float, thickness: float, colour: int, title: str
) -> list[str]:
    start, end = sorted((place(0), place(value)))
    parts = [_rectangle(start, y, max(end - start, 0.7), thickness - 1.5, colour, title)]
    if reach is not None:
        low, high = map(place, reach)
        middle = y + thickness / 2 - 0.75
        parts.append(_line(low, middle, high, middle, "axis"))
        parts += [_line(each, middle - 3, each, middle + 3, "axis") for each in (low, high)]
        start, end = min(start, low), max(end, high)
    if value < 0:
        return [*parts, _text(start - 4, y + thickness - 2, number(value), "end", "small")]
    return [*parts, _text(end + 4, y + thickness - 2, number(value), "start", "small")]


def _stack(chart: Bars, row: int, place: "_Places", y: float, thickness: float) -> list[str]:
    parts, total = [], 0.0
    for index, (name, values) in enumerate(chart.series.items()):
        value = values[row] or 0.0
        if value > 0:
            start, end = place(total), place(total + value)
            parts.append(_rectangle(start, y, end - start, thickness, index, _mark(chart.labels[row], name, value, chart.unit)))
            total += value
    return [*parts, _text(place(total) + 4, y + thickness - 2, number(total), "start", "small")]


def _mark(label: str, name: str, value: float, unit: str) -> str:
    return f"{label}{', ' + name if name else ''}: {value:.6g} {unit}".rstrip()


class _Places:
    """Values of an axis to places in the picture."""

    def __init__(self, axis: Axis, start: float, end: float) -> None:
        self.axis, self.start, self.end = axis, start, end

    def __call__(self, value: float) -> float:
        return self.start + self.axis.place(value) * (self.end - self.start)


def _frame(x: Axis, y: Axis, x_title: str, y_title: str, top: float) -> tuple[list[str], _Places, _Places, float]:
    """Grid, ticks and titles of two axes; the places on both, and the height of it all."""
    up_texts, across_texts = tick_texts(y.ticks), tick_texts(x.ticks)
    left = 12 + LETTER * max(map(len, up_texts), default=1)
    top += LINE + 4
    across, up = _Places(x, left, WIDTH - 16), _Places(y, top + PLOT_HEIGHT, top)
    parts = [_text(0, top - 8, y_title, "start", "faint")]
    for tick, text in zip(y.ticks, up_texts, strict=True):
        parts.append(_line(left, up(tick), WIDTH - 16, up(tick), "grid"))
        parts.append(_text(left - 6, up(tick) + 4, text, "end", "small"))
    base = top + PLOT_HEIGHT
    for tick, text in zip(x.ticks, across_texts, strict=True):
        parts.append(_line(across(tick), base, across(tick), base + 4, "axis"))
        parts.append(_text(across(tick), base + 16, text, "middle", "small"))
    parts.append(_line(left, base, WIDTH - 16, base, "axis"))
    parts.append(_text(WIDTH - 16, base + 32, x_title, "end", "faint"))
    return parts, across, up, base + 40


def _plot(chart: Plot) -> str:
    series = {name: _drawable(points, chart) for name, points in chart.series.items()}
    points = [point for each in series.values() for point in each]
    x = axis_of([point.x for point in points], log=chart.log_x)
    reach = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    y = axis_of([value for value in reach if value > 0 or not chart.log_y], log=chart.log_y)
    legend, top = _legend(list(series), 0)
    frame, across, up, height = _frame(x, y, chart.x_title, chart.y_title, top)
    parts = [*legend, *frame]
    for index, (name, own) in enumerate(series.items()):
        if chart.joined and len(own) > 1:
            corners = " ".join(f"{across(point.x):.1f},{up(point.y):.1f}" for point in own)
            parts.append(f'<polyline points="{corners}" class="l{index % COLOURS}"/>')
        for point in own:
            parts += _dot(point, name, index, across, up, chart)
    return _svg(chart.title, height, parts)


def _drawable(points: Sequence[Point], chart: Plot) -> list[Point]:
    kept = [
        point
        for point in points
        if math.isfinite(point.x)
        and math.isfinite(point.y)
        and (point.x > 0 or not chart.log_x)
        and (point.y > 0 or not chart.log_y)
    ]
    return sorted(kept, key=lambda point: point.x)


def _dot(point: Point, name: str, index: int, across: _Places, up: _Places, chart: Plot) -> list[str]:
    x, y = across(point.x), up(point.y)
    parts = []
    if point.low is not None and point.high is not None and (point.low > 0 or not chart.log_y):
        parts.append(_line(x, up(point.low), x, up(point.high), f"l{index % COLOURS}"))
    title = f"{name or point.label}: {chart.x_title} {point.x:.6g}, {chart.y_title} {point.y:.6g}"
    parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="c{index % COLOURS}"><title>{clean(title)}</title></circle>')
    if point.label:
        end = x + 7 + LETTER * len(shortened(point.label, 28)) > WIDTH
        parts.append(_text(x - 7 if end else x + 7, y - 5, shortened(point.label, 28), "end" if end else "start", "small"))
    return parts


def _histogram(chart: Histogram) -> str:
    x = Axis(chart.edges[0], chart.edges[-1], axis_of(chart.edges, log=chart.log_x).ticks, log=chart.log_x)
    x = Axis(x.low, x.high, [tick for tick in x.ticks if x.low <= tick <= x.high], x.log)
    y = axis_of([count for counts in chart.counts.values() for count in counts], from_zero=True)
    legend, top = _legend(list(chart.counts), 0)
    frame, across, up, height = _frame(x, y, chart.x_title, "count", top)
    return _svg(chart.title, height, [*legend, *frame, *_columns(chart.edges, chart.counts, across, up)])


def _columns(edges: Sequence[float], counts: Mapping[str, Sequence[float]], across: _Places, up: _Places) -> Iterator[str]:
    """The columns of each series side by side between their edges."""
    for index, (name, values) in enumerate(counts.items()):
        for low, high, count in zip(edges[:-1], edges[1:], values, strict=True):
            start, width = across(low), (across(high) - across(low)) / len(counts)
            title = f"{name + ': ' if name else ''}{number(low)} .. {number(high)}: {count:,.6g}"
            yield _rectangle(start + index * width, up(count), width - 0.6, up(0) - up(count), index, title)
