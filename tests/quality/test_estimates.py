"""Standard errors, against textbook cases and a bootstrap."""

import math

import numpy as np
import pytest

from marlin_cli.quality.estimates import Estimate, ratio, stratified


def test_a_ratio_of_equal_sizes_has_the_standard_error_of_a_mean():
    totals = np.random.default_rng(0).normal(20.0, 3.0, size=50)
    estimate = ratio(totals, np.full(50, 10.0))
    assert estimate.value == pytest.approx(totals.mean() / 10)
    assert estimate.standard_error == pytest.approx(totals.std(ddof=1) / math.sqrt(50) / 10)


def test_the_standard_error_of_ragged_windows_is_that_of_a_bootstrap():
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 100, size=300).astype(np.float64)
    totals = sizes * rng.normal(2.5, 0.6, size=300)
    estimate = ratio(totals, sizes)
    draws = rng.integers(0, 300, size=(4000, 300))
    bootstrap = (totals[draws].sum(axis=1) / sizes[draws].sum(axis=1)).std()
    assert estimate.value == totals.sum() / sizes.sum()
    assert estimate.standard_error == pytest.approx(bootstrap, rel=0.05)


def test_windows_that_cost_the_same_per_byte_leave_no_error():
    sizes = np.array([3.0, 50.0, 7.0])
    assert ratio(2 * sizes, sizes) == Estimate(2.0, 0.0)


def test_one_window_does_not_tell_its_error():
    assert ratio(np.array([12.0]), np.array([4.0])) == Estimate(3.0, None)


def test_strata_weigh_by_size_and_what_lies_between_them_is_no_error():
    pooled = stratified([Estimate(2.0, 0.03), Estimate(6.0, 0.08)], [300, 100])
    assert pooled.value == 3.0
    assert pooled.standard_error == pytest.approx(math.hypot(0.75 * 0.03, 0.25 * 0.08))


def test_strata_with_an_unknown_error_leave_it_unknown():
    assert stratified([Estimate(2.0, None), Estimate(4.0, 0.1)], [1, 1]) == Estimate(3.0, None)
