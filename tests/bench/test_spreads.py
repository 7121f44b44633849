"""Spreads of repeats, on samples made by hand."""

import pytest

from marlin_cli.bench.spreads import spread_of


def test_a_spread_keeps_the_order_of_its_samples():
    spread = spread_of([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (spread.median, spread.minimum, spread.maximum) == (3.0, 1.0, 100.0)
    assert spread.interquartile_range == 2.0  # one disturbed repeat does not show
    assert spread.samples == (4.0, 1.0, 2.0, 3.0, 100.0)


def test_the_relative_range_is_of_the_middle_half():
    assert spread_of([90.0, 100.0, 110.0, 100.0, 100.0]).relative_range == 0.0
    assert spread_of([80.0, 90.0, 100.0, 110.0, 120.0]).relative_range == pytest.approx(0.2)
