"""Renderings parse back to the numbers that went in."""

import csv
import dataclasses
import io
import json

import pytest

from marlin_cli.bench.machine import Machine
from marlin_cli.bench.result import ModelReport, QualitySettings, Report
from marlin_cli.bench.spreads import Percentiles, spread_of
from marlin_cli.bench.throughput import SweepPoint, Throughput, ThroughputSettings
from marlin_cli.engine.decoding import CacheBits
from marlin_cli.quality.estimates import Estimate
from marlin_cli.quality.held_out import Windowing
from marlin_cli.quality.quality import Comparison, Quality, Score
from marlin_cli.reports.forms import to_json, to_jsonl
from marlin_cli.reports.measurements import measurements
from marlin_cli.reports.quality_tables import quality_tables
from marlin_cli.reports.report import RENDERINGS, to_csv, to_markdown, to_tables
from marlin_cli.reports.speed_tables import speed_table

BESIDE = Comparison(Estimate(0.0125, 0.002), Estimate(0.03, 0.001), 0.01, 0.4, 1.5, Estimate(0.975, 0.004))
CODE = Score(4096, 2, 10240.0, Estimate(2.5, 0.25), BESIDE)
TEXT = Score(100, 1, 300.0, Estimate(3.0, None), BESIDE)
WHOLE = Score(4196, 3, 10540.0, Estimate(10540 / 4196, None), BESIDE)
SPEED = Throughput(
    spread_of([1000.0, 1200.0, 1100.0]), spread_of([90.0, 95.5, 80.0]), spread_of([0.5, 0.25, 0.75]), 384,
    {"global": 4096, "local": 512}, 123456,
    Percentiles(0.001, 0.002, 0.003, 0.004), None, 0.125,
    (SweepPoint(1024, 128, 8, spread_of([5.0]), spread_of([6.0, 8.0]), spread_of([0.5])),),
)  # fmt: skip


def one_model(name):
    return ModelReport(
        name, {"global": 1000, "head": 50}, {"global": 2000, "head": 100}, CacheBits(4, 4), SPEED,
        Quality({"code": CODE, "text": TEXT}, WHOLE),
    )  # fmt: skip


@pytest.fixture
def report():
    return Report(
        machine=Machine("cpu", "asked for", "a processor", "Linux", 2, "3.12", "0.32", "0.1"),
        throughput_settings=ThroughputSettings(512, 128, 3, sweep_contexts=(1024,), sweep_batches=(8,)),
        quality_settings=QualitySettings(("held | out",), Windowing(2048), reference="full"),
        peak_resident_bytes=99_000,
        models=(one_model("first"), one_model("second \u00e9")),
    )


def test_json_is_one_document_on_the_last_line(report):
    document = json.loads(to_json(report).splitlines()[-1])
    assert to_json(report).count("\n") == 0
    assert document["format_version"] == 2
    assert document["machine"]["device_reason"] == "asked for"
    assert document["quality_settings"]["windowing"]["window_bytes"] == 2048
    first, second = document["models"]
    assert second["model"] == "second \u00e9"
    assert first["stored_weight_bytes"] == {"global": 1000, "head": 50}
    assert first["cache_bits"] == {"keys": 4, "values": 4, "window": None, "share_left": None}
    assert first["throughput"]["decode_bytes_per_second"]["samples"] == [90.0, 95.5, 80.0]
    assert first["throughput"]["time_to_first_byte_seconds"]["median"] == 0.5
    assert first["quality"]["domains"]["text"]["bits_per_byte"] == {"value": 3.0, "standard_error": None}
    assert first["quality"]["all_domains"]["against_reference"]["kl_maximum_bits"] == 1.5


def test_json_lines_are_a_document_a_model(report):
    lines = [json.loads(line) for line in to_jsonl(report).splitlines()]
    assert [[model["model"] for model in line["models"]] for line in lines] == [["first"], ["second \u00e9"]]
    assert all(line["machine"] == lines[0]["machine"] for line in lines)


def test_csv_has_a_row_for_each_measurement(report):
    rows = list(csv.DictReader(io.StringIO(to_csv(report))))
    assert len(rows) == len(list(measurements(report)))
    found = {(row["model"], row["measure"], row["part"]): row for row in rows}
    assert len(found) == len(rows)
    decode = found["first", "decode_bytes_per_second", ""]
    assert [float(decode[name]) for name in ("value", "minimum", "maximum")] == [90.0, 80.0, 95.5]
    assert decode["standard_error"] == ""
    bits = found["second \u00e9", "bits_per_byte", "code"]
    assert (float(bits["value"]), float(bits["standard_error"])) == (2.5, 0.25)
    assert found["first", "bits_per_byte", "text"]["standard_error"] == ""
    assert float(found["first", "top1_agreement", "all"]["value"]) == 0.975
    assert found["first", "cache_bytes", "local"]["value"] == "512"
    assert found["first", "scored_bytes", "all"]["value"] == "4196"


def test_markdown_tables_are_whole(report):
    text = to_markdown(report)
    blocks = [[line for line in part.splitlines() if line.startswith("|")] for part in text.split("\n\n")]
    tables = [block for block in blocks if block]
    assert len(tables) == len(to_tables(report))
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "| code | 4,096 | 2 | 2.50000 | 0.25000 |\n" in text
    assert "| code | +0.01250 | 0.00200 | 0.03 |" in text


def test_markdown_escapes_what_would_end_a_cell(report):
    models = (one_model("a|b"),)
    renamed = Report(report.machine, report.throughput_settings, None, 0, models)
    assert "a\\|b" in to_markdown(renamed)


def test_tables_show_every_model(report):
    machine, speed, _, weights, *quality = to_tables(report)
    assert machine.columns == ["device", "cpu (asked for)"]
    assert speed.columns == weights.columns == ["", "first", "second \u00e9"]
    rows = {name: cells for name, *cells in speed.rows}
    assert rows["prefill, bytes/s"] == ["1,100 (1,000 .. 1,200)"] * 2
    assert rows["time to first byte, ms"] == ["500 (250 .. 750)"] * 2
    assert rows["decode, bytes/s"] == ["90 (80 .. 95.5)"] * 2
    assert ["all, loaded", "2,100", "2,100"] in weights.rows
    assert [table.columns[1] for table in quality] == ["bytes", "difference", "median"] * 2
    for table in quality:
        assert [row[0] for row in table.rows] == ["code", "text", "all"]
        assert {len(row) for row in table.rows} == {len(table.columns)}
    assert quality[0].rows[1][4] == ""  # a single window does not tell its error


def test_parts_that_were_not_measured_are_left_out(report):
    weights = {"global": 1}
    bare = ModelReport("bare", weights, weights, CacheBits(), None, None)
    slim = Report(report.machine, None, None, 0, (bare,))
    assert [table.title for table in to_tables(slim)] == ["Machine", "Weights, bytes"]
    assert json.loads(to_json(slim))["models"][0]["throughput"] is None
    assert {measurement.measure for measurement in measurements(slim)} == {"stored_weight_bytes", "loaded_weight_bytes"}


def test_tables_of_quality_fit_a_terminal(report):
    """Numbers of six digits, and domains as long as those that come with marlin."""
    small = Comparison(
        Estimate(-0.123, 0.012), Estimate(1.23e-05, 1.23e-06), 1.23e-07, 1.23e-05, 1.23e-03, Estimate(0.98765, None)
    )
    score = Score(12_345_678, 12_345, 1e7, Estimate(12.34567, 0.12345), small)
    quality = Quality({"multilingual": score, "code": score}, score)
    for table in quality_tables("model", quality, report.quality_settings):
        widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
        assert sum(widths) + 2 * (len(widths) - 1) <= 80, table.columns


def test_without_a_reference_there_is_nothing_to_compare(report):
    score = Score(4096, 2, 10240.0, Estimate(2.5, 0.25), None)
    model = ModelReport("one", {}, {}, CacheBits(), None, Quality({"code": score}, score))
    alone = Report(report.machine, None, QualitySettings(("path",), Windowing()), 0, (model,))
    table = to_tables(alone)[-1]
    assert table.rows == [["code", "4,096", "2", "2.50000", "0.25000"]]  # one domain is all
    assert len(table.columns) == 5


@pytest.mark.parametrize("name", RENDERINGS)
def test_a_number_that_is_none_does_not_break_a_rendering(report, name):
    text = RENDERINGS[name](report)
    assert "None" not in text
    assert "NaN" not in text


def test_latencies_energy_and_the_sweep_are_rows(report):
    found = {(row.model, row.measure, row.part): row.value for row in measurements(report)}
    assert found["first", "byte_latency_seconds", "percentile_99"] == 0.003
    assert ("first", "patch_latency_seconds", "maximum") not in found
    assert found["first", "joules_per_byte", ""] == 0.125
    assert found["first", "decode_bytes_per_second", "context 1024, decoded 128, batch 8"] == 7.0
    tables = to_tables(report)
    speed = {row[0]: row[1:] for row in next(table for table in tables if table.title.startswith("Speed: ")).rows}
    assert speed["a byte, ms: 50 %, 90 %, 99 %, longest"] == ["1, 2, 3, 4"] * 2
    assert not any(name.startswith("a patch") for name in speed)  # there was none
    assert speed["decoding, J/byte of the processor packages"] == ["0.125"] * 2
    [sweep] = [table for table in tables if table.title.startswith("Speed by context")]
    assert sweep.columns[:5] == ["context", "decoded", "batch", "first: prefill", "first: decode"]
    assert sweep.rows == [["1,024", "128", "8", *["5 (5 .. 5)", "7 (6 .. 8)"] * 2]]


def test_what_has_no_patches_says_nothing_of_them(report):
    for positions, named in (({}, False), ({0: CODE}, True)):
        quality = dataclasses.replace(report.models[0].quality, patch_positions=positions, byte_classes={"letters": CODE})
        _, _, _, groups, *_ = quality_tables("model", quality, report.quality_settings)
        assert ("position in the patch" in groups.title) is named
    waits = Percentiles(0.001, 0.002, 0.003, 0.004)
    timed = dataclasses.replace(report.models[0].throughput, patch_latency_seconds=waits)
    models = (dataclasses.replace(report.models[0], throughput=timed), report.models[1])
    rows = speed_table(dataclasses.replace(report, models=models), report.throughput_settings).rows
    assert next(row[1:] for row in rows if row[0].startswith("a patch")) == ["1, 2, 3, 4", "-"]
