"""The page of a bench result: what a result holds is drawn, whatever its names."""

import copy
import json
import re
import struct

import pytest

from marlin_cli.errors import UsageError
from marlin_cli.page import Bars, Plot, Point, render
from marlin_cli.page.figure import write_figure
from marlin_cli.page.fitting import chosen
from marlin_cli.reports.page import charts_in, charts_of, sections_of


def spread(median):
    return {"median": median, "minimum": median * 0.9, "maximum": median * 1.2, "interquartile_range": 1.0, "samples": [median]}


def estimate(value, error=0.5):
    return {"value": value, "standard_error": error}


def score(bits):
    beside = {"bits_per_byte_difference": estimate(bits - 2, 0.01), "kl_median_bits": 0.1}
    return {"bytes": 10, "bits_per_byte": estimate(bits), "against_reference": beside}


def model(name, bits, speed):
    return {
        "model": f"/some/where/{name}",
        "weights": {"global": 1000, "local": 24},
        "stored_weight_bytes": {"global": 125 * bits, "local": 3 * bits},
        "throughput": {
            "decode_bytes_per_second": spread(speed),
            "sweep": [
                {"context_bytes": context, "batch": batch, "decode_bytes_per_second": spread(speed * batch / context)}
                for context in (128, 1024, 8192)
                for batch in (1, 4)
            ],
            "decode_seconds_by_part": {"global": 3.0, "local": 1.0},
            "roofline": {"predicted_seconds_by_part": {"global": 2.0, "local": 1.5}, "copy_bytes_per_second": 1e10},
        },
        "quality": {
            "domains": {"code": score(2.5), "binary": score(5.0)},
            "all_domains": score(32 / bits),
            "by_position": [{"position": i, "bits_per_byte": estimate(3.0 - i / 10)} for i in range(4)],
        },
        "cache_bits": {"keys": 16, "values": 16},
        "something_new": None,
    }


DOCUMENT = {
    "format_version": 1,
    "machine": {"device": "cpu", "device_name": "a processor"},
    "models": [model("plain", 16, 100.0), model("packed", 4, 300.0)],
}


def titled(document, title):
    [chart] = [chart for chart in charts_in(sections_of(document)) if chart.title == title]
    return chart


def test_quality_stands_against_bits_per_weight_with_the_paired_error():
    chart = titled(DOCUMENT, "Quality against size")
    points = {name: point for name, [point] in chart.series.items()}
    assert (points["plain"].x, points["packed"].x) == (16, 4)
    assert (points["packed"].y, points["packed"].low, points["packed"].high) == (8.0, 7.99, 8.01)


def test_percentiles_stand_side_by_side():
    waits = {"percentile_50": 0.1, "percentile_99": 0.3, "maximum": 0.9}
    [chart] = charts_of("byte_latency_seconds", [waits, waits], ["plain", "packed"])
    assert not chart.stacked and chart.labels == ["Percentile 50", "Percentile 99", "Maximum"]
    assert chart.series == {"plain": [0.1, 0.3, 0.9], "packed": [0.1, 0.3, 0.9]}


def test_spreads_are_bars_with_ranges_and_sums_are_stacked():
    speed = titled(DOCUMENT, "Decode bytes per second")
    assert isinstance(speed, Bars) and speed.labels == ["plain", "packed"] and speed.unit == "bytes/s"
    assert (speed.series[""], speed.ranges[""]) == ([100, 300], [(90, 120), (270, 360)])
    for title, series in (
        ("Decode time by part", {"global": [3, 3], "local": [1, 1]}),
        ("Predicted time by part", {"global": [2, 2], "local": [1.5, 1.5]}),
    ):
        parts = titled(DOCUMENT, title)
        assert parts.stacked and parts.series == series and parts.unit == "s"


def test_times_are_in_the_unit_that_fits():
    document = copy.deepcopy(DOCUMENT)
    document["models"].pop()
    throughput = document["models"][0]["throughput"]
    throughput["time_to_first_byte_seconds"] = spread(0.02)
    throughput["decode_seconds_by_part"] = {"global": 6e-4, "local": 3e-4}
    throughput["byte_latency_seconds"] = {"percentile_50": 0.5, "maximum": 1.5}
    first = titled(document, "Time to first byte")
    assert (first.unit, first.series[""], first.ranges[""]) == ("ms", [20.0], [pytest.approx((18.0, 24.0))])
    parts = titled(document, "Decode time by part")
    assert (parts.unit, parts.series) == ("us", {"global": [pytest.approx(600)], "local": [pytest.approx(300)]})
    waits = titled(document, "Byte latency")
    assert (waits.unit, waits.series) == ("s", {"": [0.5, 1.5]})  # of one model, which needs no name


def test_a_single_domain_is_drawn_once_and_a_single_model_beside_none():
    document = copy.deepcopy(DOCUMENT)
    document["models"].pop()
    quality = document["models"][0]["quality"]
    quality["domains"] = {"code": quality["all_domains"]}
    titles = [chart.title for chart in charts_in(sections_of(document))]
    assert titles.count("Bits per byte") == 1 and "Quality against size" not in titles


def test_charts_are_chosen_by_their_titles():
    charts = charts_in(sections_of(DOCUMENT))
    assert [chart.title for chart in chosen(charts, ["BY PART", "against size"])] == [
        "Quality against size",
        "Decode time by part",
        "Predicted time by part",
    ]
    assert chosen(charts, []) == charts and chosen(charts, ["nothing"]) == []


def test_a_picture_stands_on_a_screen(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    charts = charts_in(sections_of(DOCUMENT))
    for count in (1, 5, len(charts)):
        write_figure(tmp_path / "a.png", charts[:count], "t")
        width, height = struct.unpack(">II", (tmp_path / "a.png").read_bytes()[16:24])
        assert height <= 1080 and width >= 600


def test_lists_are_curves_over_the_number_that_differs():
    curve = titled(DOCUMENT, "Decode bytes per second by context bytes")
    assert isinstance(curve, Plot) and curve.log_x
    assert set(curve.series) == {"plain, batch 1", "plain, batch 4", "packed, batch 1", "packed, batch 4"}
    assert [(point.x, point.y) for point in curve.series["packed, batch 4"]] == [
        (128, 9.375),
        (1024, 1.171875),
        (8192, 0.146484375),
    ]
    by_position = titled(DOCUMENT, "Bits per byte by position")
    assert [point.x for point in by_position.series["plain"]] == [0, 1, 2, 3] and not by_position.log_x


def test_tables_of_alike_tables_are_a_bar_a_name():
    chart = titled(DOCUMENT, "Bits per byte by domains")
    assert chart.labels == ["code", "binary"] and chart.series == {"plain": [2.5, 5.0], "packed": [2.5, 5.0]}


def test_every_number_is_on_the_page(read_page):
    page = read_page(render("t", "", sections_of(DOCUMENT), DOCUMENT))
    assert page.faults == []
    assert page.data == json.loads(json.dumps(DOCUMENT))
    rows = page.texts("th")
    assert "Throughput / sweep / context bytes 128, batch 4 / decode bytes per second" in rows
    assert "Machine device name" in rows and "a processor" in page.texts("td")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda document: document.update(models=[]), id="no models"),
        pytest.param(lambda document: document["models"][0].update(quality=None, throughput=None), id="one not measured"),
        pytest.param(lambda document: document["models"][1].pop("weights"), id="an older result"),
        pytest.param(lambda document: document["models"][1]["throughput"].update(sweep=[]), id="an empty list"),
        pytest.param(lambda document: document["models"][1].update(model=document["models"][0]["model"]), id="twice the same"),
        pytest.param(lambda document: document["models"][1]["throughput"].update(sweep=["a", 3, None]), id="a mixed list"),
        pytest.param(lambda document: document.pop("machine"), id="no machine"),
    ],
)
def test_results_of_other_shapes_are_shown_too(change, read_page):
    document = copy.deepcopy(DOCUMENT)
    change(document)
    assert read_page(render("t", "", sections_of(document), document)).faults == []


def test_pictures_are_equal_for_equal_results(tmp_path):
    pytest.importorskip("matplotlib")
    charts = charts_in(sections_of(DOCUMENT))
    for name in ("a.svg", "b.svg", "c.png"):
        write_figure(tmp_path / name, charts, "a $ title_{ of < any kind")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.svg", "b.svg", "c.png"]


def test_pictures_that_cannot_be_drawn_are_refused(tmp_path, monkeypatch):
    charts = charts_in(sections_of(DOCUMENT))
    with pytest.raises(UsageError, match=r"pictures are \.svg, \.png"):
        write_figure(tmp_path / "a.gif", charts, "t")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'marlin-cli\[plot\]'"):
        write_figure(tmp_path / "a.svg", charts, "t")


def test_many_names_stand_beside_their_curves(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    for count in (4, 5):
        curves = {f"a rather long name, {number}": [Point(1, number), Point(2, number)] for number in range(count)}
        write_figure(tmp_path / f"{count}.svg", [Plot("p", "x", "y", curves)], "t")
    few, many = ((tmp_path / f"{count}.svg").read_text() for count in (4, 5))

    def width(drawn):
        """Of the axes, to which curves are clipped."""
        return float(re.search(r'<rect x="[\d.]+" y="[\d.]+" width="([\d.]+)"', drawn)[1])

    assert width(many) < 0.8 * width(few)


def test_ticks_of_logarithmic_axes_are_numbers(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    curve = Plot("p", "context", "bytes/s", {"": [Point(1000, 1), Point(100_000, 2)]}, log_x=True, log_y=True)
    write_figure(tmp_path / "p.svg", [curve], "t")
    drawn = (tmp_path / "p.svg").read_text()
    assert "mathdefault" not in drawn and "<!-- 10k -->" in drawn
