"""Pages are well formed, say what they were given, and let nothing in that a name smuggles."""

import math

import pytest

from marlin_cli.errors import OutputError
from marlin_cli.page import Bars, Grid, Histogram, Plot, Point, Section, Text, render, write_page
from marlin_cli.page.axes import axis_of, number
from marlin_cli.page.svg import LABEL_LETTERS, shortened

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<!--<script>",
    "\"'><img src=x onerror=\"document.title='owned'\">",
    "a\0b\x1b[31m\ufffe",
    b"caf\xe9".decode("utf-8", "surrogateescape"),  # a file name that is not UTF-8
    "\u202etxt.exe",
    "&lt;b&gt;",
]


def charts(name):
    return [
        Bars(name, name, [name, "b"], {name: [1.0, None], "other": [-2.0, 3.5]}),
        Bars(name, "s", [name], {name: [1.0], "other": [2.0]}, stacked=True),
        Plot(name, name, name, {name: [Point(1, 2, 1.5, 2.5, name), Point(10, 3)]}, log_x=True),
        Histogram(name, name, [0.0, 1.0, 2.0], {name: [3, 4]}),
    ]


def page_of(name):
    blocks = [Text(name), Grid(name, [name, "x"], [[name, name]]), *charts(name)]
    return render(name, name, [Section(name, blocks)], {name: [name, 0.1]})


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_no_name_gets_out_of_its_place(name, read_page):
    plain, hostile = read_page(page_of("plain")), read_page(page_of(name))
    assert hostile.faults == []
    skeleton = [(tag, sorted(attributes)) for tag, attributes, _ in hostile.elements]
    assert skeleton == [(tag, sorted(attributes)) for tag, attributes, _ in plain.elements]
    assert hostile.data == {name: [name, 0.1]}
    assert page_of(name).isprintable() or all(each == "\n" for each in page_of(name) if not each.isprintable())


def test_chromium_runs_nothing_and_reads_the_same_numbers(browser, read_page, tmp_path):
    title = "".join(HOSTILE[:3])
    for number_of_page, name in enumerate(["plain", title]):
        write_page(tmp_path / f"{number_of_page}.html", page_of(name))
    plain, hostile = (read_page(browser(tmp_path / f"{each}.html")) for each in (0, 1))
    assert [tag for tag, _, _ in hostile.elements] == [tag for tag, _, _ in plain.elements]
    assert hostile.texts("h1") == [title]  # as it was given: no script has changed it
    assert hostile.data == {title: [title, 0.1]}


def test_a_page_needs_nothing_from_elsewhere(read_page):
    page = read_page(page_of("x"))
    for _, attributes, _ in page.elements:
        assert not {"src", "href", "style", "onload"} & attributes.keys()
    [(policy, _)] = [each for each in page.named("meta") if "http-equiv" in each[0]]
    assert policy["content"].startswith("default-src 'none'")
    assert [attributes["type"] for attributes, _ in page.named("script")] == ["application/json"]


def test_marks_stand_where_their_values_say(read_page):
    bars = Bars("b", "MB", ["one", "two"], {"": [10.0, 5.0]})
    curve = Plot("p", "bits", "loss", {"": [Point(4, 0.5), Point(8, 0.25), Point(16, 0.0)]}, log_x=True)
    counts = Histogram("h", "KL", [1e-6, 1e-4, 1e-2], {"": [30, 10]}, log_x=True)
    page = read_page(render("t", "", [Section("s", [bars, curve, counts])], None))
    ten, five, many, few = (float(each["width" if row < 2 else "height"]) for row, (each, _) in enumerate(page.named("rect")))
    assert ten / five == pytest.approx(2, rel=0.05)
    assert many / few == pytest.approx(3, rel=0.05)
    x = [float(each["cx"]) for each, _ in page.named("circle")]
    y = [float(each["cy"]) for each, _ in page.named("circle")]
    assert x[2] - x[1] == pytest.approx(x[1] - x[0], rel=0.01)  # 4, 8, 16 on a logarithmic axis
    assert y[1] - y[0] == pytest.approx(y[2] - y[1], rel=0.01)
    assert y == sorted(y)  # less is lower
    titles = page.texts("title")
    assert "one: 10 MB" in titles and ": bits 8, loss 0.25" in titles and "1e-6 .. 0.0001: 30" in titles


def test_the_number_of_a_negative_bar_does_not_touch_its_label(read_page):
    bars = Bars("b", "bits", ["binary"], {"": [-0.000398]}, ranges={"": [(-0.000902, 0.000106)]})
    page = read_page(render("t", "", [Section("s", [bars])], None))
    ends = {text: float(each["x"]) for each, text in page.named("text") if each.get("text-anchor") == "end"}
    assert ends["-0.000398"] - 6.5 * len("-0.000398") > ends["binary"]


@pytest.mark.parametrize(
    "chart",
    [
        pytest.param(Bars("t", "", [], {"": []}), id="no bars"),
        pytest.param(Bars("t", "", ["a"], {"": [0.0]}), id="zero"),
        pytest.param(Bars("t", "", ["a"], {"x": [None], "y": [None]}), id="nothing measured"),
        pytest.param(Plot("t", "x", "y", {}), id="no series"),
        pytest.param(Plot("t", "x", "y", {"": [Point(0, 0)]}, log_x=True, log_y=True), id="nothing above zero"),
        pytest.param(Plot("t", "x", "y", {"": [Point(3, 3)]}), id="one point"),
        pytest.param(Plot("t", "x", "y", {"": [Point(3, 3)]}, log_x=True, log_y=True), id="one point, logarithmic"),
        pytest.param(Plot("t", "x", "y", {"": [Point(1, 1e-30), Point(2, 1e30)]}, log_y=True), id="far apart"),
        pytest.param(Plot("t", "x", "y", {"": [Point(1, math.nan), Point(2, 1)]}), id="NaN"),
        pytest.param(Histogram("t", "x", [0.0, 1.0], {"": [0]}), id="nothing counted"),
    ],
)
def test_degenerate_charts_are_drawn_all_the_same(chart, read_page):
    html = render("t", "", [Section("s", [chart])], None)
    assert read_page(html).faults == []
    assert "nan" not in html.split("<body>")[1] and "inf" not in html.split("<body>")[1]


@pytest.mark.parametrize("low, high", [(0, 1), (3, 3), (-5, 12), (1e-9, 3e-9), (0, 0), (-1, -1), (1e12, 1.1e12), (0.1, 0.7)])
def test_linear_ticks_are_round_and_hold_the_values(low, high):
    axis = axis_of([low, high])
    assert axis.low <= low and high <= axis.high and 2 <= len(axis.ticks) <= 8
    assert all(float(f"{tick:.4g}") == pytest.approx(tick, rel=1e-6) for tick in axis.ticks)
    assert [axis.place(axis.low), axis.place(axis.high)] == [0, 1]


@pytest.mark.parametrize("low, high", [(1, 1), (1, 2), (3, 4), (1e-8, 10), (128, 32768), (0.9, 1.05)])
def test_logarithmic_ticks_lie_inside_and_are_several(low, high):
    axis = axis_of([low, high], log=True)
    assert axis.low <= low and high <= axis.high and 1 <= len(axis.ticks) <= 6
    assert all(axis.low * 0.99 <= tick <= axis.high * 1.01 for tick in axis.ticks)


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (1, "1"), (999, "999"), (999.9, "1k"), (1234, "1.23k"), (999950, "1M"), (2.5e9, "2.5G"),
     (0.00452, "0.00452"), (1e-7, "1e-7"), (-1500, "-1.5k"), (1.5e-12, "1.5e-12")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_long_labels_keep_both_ends():
    path = "global.layers.0.attention.a_very_long_name_indeed.q_proj"
    assert len(shortened(path)) == LABEL_LETTERS
    assert shortened(path).startswith("global") and shortened(path).endswith("q_proj")
    assert shortened("short") == "short"


def test_writing_is_atomic_and_says_what_fails(tmp_path):
    write_page(tmp_path / "p.html", "whole")
    assert [file.name for file in tmp_path.iterdir()] == ["p.html"]
    with pytest.raises(OutputError, match="name a file"):
        write_page(tmp_path, "x")
    with pytest.raises(OutputError, match="no such|No such"):
        write_page(tmp_path / "none" / "p.html", "x")


def test_numbers_that_json_lacks_are_refused():
    with pytest.raises(ValueError, match="JSON"):
        render("t", "", [], {"x": math.nan})
