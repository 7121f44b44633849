"""The numbers that are shown, on arrays written by hand."""

import dataclasses
import json
import math

import numpy as np
import pytest

from marlin_cli.statistics import Statistics
from marlin_cli.statistics.data import Moments, Run, Totals
from marlin_cli.statistics.show import BAR_LETTERS, drawings, summarise, tables

# One domain saw 2 rows of each of 2 positions, the other 1 and 1; channels of mean square 1, 4 and 9.
INPUT = Moments(
    count=np.array([[2, 2], [1, 1]]),
    sum_squares=np.array([[[2.0, 8.0, 18.0]] * 2, [[1.0, 4.0, 9.0]] * 2]),
    absolute_maximum=np.array([[[1, 2, 5]] * 2, [[1, 2, 3]] * 2], dtype=np.float32),
)
HEADS = Moments(
    count=np.array([[4], [0]]),
    sum_squares=np.array([[[16.0, 16.0]], [[0.0, 0.0]]]),
    absolute_maximum=np.array([[[3.0, 2.0]], [[0.0, 0.0]]], dtype=np.float32),
)
LAYERS = {"local.ffn.up_proj": "local.ffn.up_proj", "local.ffn.gate_proj": "local.ffn.up_proj"}
STATISTICS = Statistics(
    "f" * 64,
    LAYERS,
    (Run("c" * 64, 16, 0, None),),
    Totals({"code": 30, "text": 10}, {"local.ffn.up_proj": INPUT}, {"local.attention": HEADS}, {"local.attention": HEADS}),
)


def test_ranges() -> None:
    summary = summarise(STATISTICS)
    (layer,) = summary.layers
    assert layer.layers == ["local.ffn.up_proj", "local.ffn.gate_proj"]
    assert (layer.input.rows, layer.input.channels, layer.input.absolute_maximum) == (6, 3, 5.0)
    root = math.sqrt(14 / 3)
    assert layer.input.rms == pytest.approx(root)
    assert layer.input.channel_peak == pytest.approx(3 / 2)
    assert layer.input.rms_by_domain == pytest.approx({"code": root, "text": root})
    assert layer.input.rms_by_group == pytest.approx([root, root])
    (attention,) = summary.attentions
    assert attention.keys.rms == pytest.approx(2)
    assert attention.keys.rms_by_domain == {"code": pytest.approx(2), "text": 0}  # no rows are no fault


def test_tables() -> None:
    domains, layers, rows, caches = tables(summarise(STATISTICS))
    assert domains.rows == [["code", "30", "75.0 %"], ["text", "10", "25.0 %"], ["all", "40", ""]]
    assert layers.rows == [["local.ffn.up/gate_proj", "3", "5", "1.5", "2.16", "2.16", "2.16"]]
    assert rows.rows == [["local.ffn.up/gate_proj", "2.16", "2.16"]]
    assert [row[0] for row in caches.rows] == ["local.attention K", "local.attention V"]
    for table in (domains, layers, rows, caches):
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_tables_fit_100_columns() -> None:
    names = [f"local.layers.11.attention.{name}_proj" for name in "qkv"]
    shape = (3, 17)
    moments = Moments(
        np.full(shape, 10**7), np.full((*shape, 4096), 1.235e3), np.full((*shape, 4096), 1.235e3, dtype=np.float32)
    )
    heads = {"global.layers.11.attention": moments}
    totals = Totals({"binary": 10**7, "code": 10**7, "multilingual": 10**7}, {names[0]: moments}, heads, heads)
    found = tables(summarise(Statistics("f" * 64, dict.fromkeys(names, names[0]), (Run("c" * 64, 16, 0, None),), totals)))
    # Eight rows of the sequence in a table, so of 17 there are three.
    assert [len(table.columns) for table in found] == [3, 8, 9, 9, 2, 8]
    for table in found:
        widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
        assert sum(widths) + 2 * (len(widths) - 1) <= 100 and len(table.title) <= 100


def test_ranges_are_drawn_in_80_columns() -> None:
    layers, domains, rows = drawings(summarise(STATISTICS))
    assert layers.rows == [["local.ffn.up_proj", "5", "#" * BAR_LETTERS]]
    assert [row[0] for row in domains.rows] == ["code", "text"]
    assert [row[0] for row in rows.rows] == ["0", "1"]
    halved = dataclasses.replace(INPUT, sum_squares=INPUT.sum_squares * np.array([[1.0], [0.25]]))
    totals = dataclasses.replace(STATISTICS.totals, inputs={"local.ffn.up_proj": halved})
    _, _, rows = drawings(summarise(dataclasses.replace(STATISTICS, totals=totals)))
    assert [row[2] for row in rows.rows] == ["#" * BAR_LETTERS, "#" * (BAR_LETTERS // 2) + "." * (BAR_LETTERS // 2)]
    long = dataclasses.replace(STATISTICS, layers={"a." * 60: "local.ffn.up_proj"})
    for table in drawings(summarise(long)):
        assert all(len("  ".join(row)) <= 78 for row in table.rows)


def test_a_summary_is_plain_values() -> None:
    document = json.loads(json.dumps(dataclasses.asdict(summarise(STATISTICS))))
    assert document["domains"] == {"code": 30, "text": 10}
    assert document["runs"][0]["sequence_bytes"] == 16
