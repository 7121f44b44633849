"""How long slices of prompts are beside streams that run."""

import pytest

from marlin_cli.engine.slice_pace import FEWEST_ROWS, LEAST_ROWS, REMEMBERED, ROWS_A_STREAM, STEPS_A_SLICE, SlicePace


def timed(pace, *, step, row, running=4, rounds=REMEMBERED):
    """Steps with and without a slice of what `pace` wants, of so many seconds."""
    for _ in range(rounds):
        rows = pace.rows(running)
        pace.took(step, running, 0)
        pace.took(step + rows * row, running, rows)
    return pace.rows(running)


@pytest.mark.parametrize(("running", "expected"), [(1, LEAST_ROWS), (8, 8 * ROWS_A_STREAM), (99, 64)])
def test_until_something_is_timed_streams_that_run_count(running, expected):
    assert SlicePace(64).rows(running) == expected


@pytest.mark.parametrize(("step", "row"), [(0.010, 0.001), (0.006, 0.0015), (0.020, 0.001)])
def test_a_slice_takes_as_long_as_some_steps(step, row):
    assert timed(SlicePace(64), step=step, row=row) == pytest.approx(STEPS_A_SLICE * step / row, abs=1)


def test_the_longer_rows_take_the_fewer_they_are_and_never_none():
    pace = SlicePace(64)
    found = [timed(pace, step=0.01, row=row) for row in (0.0005, 0.001, 0.002, 0.1)]
    assert found == sorted(found, reverse=True) and found[0] > found[-1] == FEWEST_ROWS
    assert timed(pace, step=0.01, row=1e-6) == 64


def test_single_long_times_change_nothing():
    pace = SlicePace(64)
    before = timed(pace, step=0.01, row=0.001)
    pace.took(1.0, 4, 0)
    pace.took(2.0, 4, before)
    assert pace.rows(4) == before


def test_another_number_of_streams_goes_by_the_nearest_that_was_seen():
    pace = SlicePace(64)
    for running, step in ((1, 0.010), (8, 0.020)):
        timed(pace, step=step, row=0.001, running=running)
    assert pace.rows(2) == pytest.approx(STEPS_A_SLICE * 10, abs=1) and pace.rows(7) == pytest.approx(STEPS_A_SLICE * 20, abs=1)


def test_a_step_with_a_slice_that_is_no_longer_than_one_without_is_noise():
    pace = SlicePace(1000)
    pace.took(0.010, 4, 0)
    pace.took(0.009, 4, 16)
    assert pace.rows(4) == pytest.approx(STEPS_A_SLICE * 0.010 / (0.0009 / 16), abs=1)


def test_ranks_that_read_the_same_rows_go_by_no_clock():
    assert timed(SlicePace(64, is_timed=False), step=0.01, row=0.001) == LEAST_ROWS
