"""Means, pooling and merging on arrays written by hand."""

import dataclasses

import numpy as np
import pytest

from marlin_cli.errors import StatisticsError
from marlin_cli.statistics import Statistics, merge
from marlin_cli.statistics.data import Moments, Run, Totals, pool

RUN = Run(corpus="c" * 64, sequence_bytes=16, seed=0, max_bytes=None)


def moments(*domains: tuple[list[int], list[list[float]]]) -> Moments:
    """(rows by group, sums of squares [groups][channels]) of each domain; the maximum is the sum's tenth."""
    squares = np.array([sums for _, sums in domains], dtype=np.float64)
    count = np.array([rows for rows, _ in domains], dtype=np.int64)
    return Moments(count, squares, (squares / 10).astype(np.float32))


def statistics(domains: dict[str, int], found: Moments, run: Run = RUN) -> Statistics:
    totals = Totals(domains, {"up_proj": found}, {"attention": found}, {"attention": found})
    return Statistics("m" * 64, {"up_proj": "up_proj", "gate_proj": "up_proj"}, (run,), totals)


# Two domains, two byte positions, two channels: means are [2, 4] of code and [10, 0] of binary.
TWO = statistics({"binary": 30, "code": 10}, moments(([3, 1], [[30.0, 0.0], [10.0, 0.0]]), ([2, 2], [[2.0, 8.0], [6.0, 8.0]])))


def test_mean_square_weighs_rows_and_then_domains_by_their_bytes() -> None:
    found = TWO.mean_square("up_proj")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [(3 * 10 + 2) / 4, 4 / 4])


def test_mean_square_of_chosen_domains() -> None:
    np.testing.assert_allclose(TWO.mean_square("up_proj", {"code": 5.0}), [2, 4])
    np.testing.assert_allclose(TWO.mean_square("up_proj", {"code": 1.0, "binary": 1.0}), [6, 2])


def test_layers_that_share_an_input_share_its_statistics() -> None:
    np.testing.assert_array_equal(TWO.mean_square("gate_proj"), TWO.mean_square("up_proj"))
    np.testing.assert_allclose(TWO.absolute_maximum("gate_proj"), [3.0, 0.8])


def test_a_layer_that_no_row_reached_prefers_no_channel() -> None:
    unreached = statistics({"code": 4}, moments(([0], [[0.0, 0.0]])))
    np.testing.assert_array_equal(unreached.mean_square("up_proj"), [1, 1])


@pytest.mark.parametrize(
    ("path", "weights", "message"),
    [
        ("q_proj", None, "no layer 'q_proj'"),
        ("up_proj", {"cod": 1.0}, "no domain 'cod'.*did you mean 'code'"),
        ("up_proj", {"code": -1.0, "binary": 2.0}, "zero or more"),
        ("up_proj", {"code": 0.0}, "zero or more"),
        ("up_proj", {"code": float("nan")}, "zero or more"),
    ],
    ids=["unknown layer", "unknown domain", "negative weight", "all zero", "NaN weight"],
)
def test_impossible_questions(path: str, weights: dict[str, float] | None, message: str) -> None:
    with pytest.raises(StatisticsError, match=message):
        TWO.mean_square(path, weights)


def test_domains_meet_by_name_whatever_their_order() -> None:
    a = Totals({"code": 1, "binary": 2}, {"x": moments(([1], [[1.0]]), ([2], [[20.0]]))}, {}, {})
    b = Totals({"text": 5, "code": 3}, {"x": moments(([7], [[700.0]]), ([4], [[4.0]]))}, {}, {})
    for pooled in (pool(a, b), pool(b, a)):
        assert dict(pooled.domains) == {"binary": 2, "code": 4, "text": 5}
        assert pooled.inputs["x"].count.tolist() == [[2], [5], [7]]
        assert pooled.inputs["x"].sum_squares.tolist() == [[[20.0]], [[5.0]], [[700.0]]]
        np.testing.assert_allclose(pooled.inputs["x"].absolute_maximum.ravel(), [2.0, 0.4, 70.0])


def test_pooling_leaves_its_arguments_alone() -> None:
    before = TWO.totals.inputs["up_proj"].sum_squares.copy()
    pool(TWO.totals, TWO.totals)
    np.testing.assert_array_equal(TWO.totals.inputs["up_proj"].sum_squares, before)


@pytest.mark.parametrize(
    ("a", "b", "overlap"),
    [
        ((0, 1), (0, 1), True),
        ((0, 1), (1, 2), True),
        ((0, 2), (1, 2), False),
        ((0, 2), (2, 4), True),
        ((1, 2), (2, 4), False),
        ((1, 2), (2, 3), True),
    ],
)
def test_windows_are_not_counted_twice(a: tuple[int, int], b: tuple[int, int], overlap: bool) -> None:
    one = statistics({"code": 4}, moments(([1], [[1.0]])), dataclasses.replace(RUN, shard_index=a[0], shard_count=a[1]))
    two = statistics({"code": 4}, moments(([1], [[1.0]])), dataclasses.replace(RUN, shard_index=b[0], shard_count=b[1]))
    if overlap:
        with pytest.raises(StatisticsError, match="counted already"):
            merge(one, two)
    else:
        assert merge(one, two).total_bytes == 8


def test_other_corpora_and_seeds_merge_and_are_remembered() -> None:
    other = dataclasses.replace(TWO, runs=(dataclasses.replace(RUN, seed=1),))
    merged = merge(TWO, other)
    assert [run.seed for run in merged.runs] == [0, 1]
    with pytest.raises(StatisticsError, match=r"seed 1\) are counted already"):
        merge(merged, other)


def test_another_model_is_refused() -> None:
    with pytest.raises(StatisticsError, match=f"another model.*{'o' * 12}"):
        merge(TWO, dataclasses.replace(TWO, model="o" * 64))


def test_another_shape_is_refused() -> None:
    wide = statistics({"code": 4}, moments(([1], [[1.0, 2.0, 3.0]])), dataclasses.replace(RUN, seed=1))
    with pytest.raises(StatisticsError, match="another shape"):
        merge(TWO, wide)


def test_the_fingerprint_follows_every_number() -> None:
    again = statistics(dict(TWO.domains), moments(([3, 1], [[30.0, 0.0], [10.0, 0.0]]), ([2, 2], [[2.0, 8.0], [6.0, 8.0]])))
    assert again.fingerprint() == TWO.fingerprint()
    others = [
        dataclasses.replace(TWO, model="o" * 64),
        dataclasses.replace(TWO, runs=()),
        statistics({"binary": 30, "code": 11}, TWO.totals.inputs["up_proj"]),
        statistics(dict(TWO.domains), moments(([3, 1], [[30.0, 0.0], [10.0, 0.0]]), ([2, 2], [[2.0, 8.0], [6.0, 8.5]]))),
    ]
    assert len({TWO.fingerprint(), *(other.fingerprint() for other in others)}) == 5
