"""Passes that are done come back, whatever a kill has left of the file."""

import numpy as np
import pytest

from marlin_cli.bench import journal as journal_module
from marlin_cli.bench.journal import Journal
from marlin_cli.bench.pass_sums import PassSums


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def sums(value: float) -> list[PassSums]:
    table = np.full((2, 5), value)
    return [PassSums(table, table, table, table, table, np.zeros(3, np.float32), np.zeros((2, 3), np.uint16))]


def test_a_short_run_leaves_nothing_and_asks_for_no_key(tmp_path):
    with Journal(tmp_path / "new", lambda: pytest.fail("asked")) as journal:
        journal.add(0, sums(1))
        journal.save()
    assert list(tmp_path.iterdir()) == []


def test_what_was_done_before_an_interrupt_comes_back(tmp_path):
    with pytest.raises(KeyboardInterrupt), Journal(tmp_path, lambda: "key") as journal:
        journal.add(0, sums(1))
        journal.add(4, sums(2))
        raise KeyboardInterrupt
    assert Journal(tmp_path, lambda: "key").load() == {}  # unless it is asked for
    assert Journal(tmp_path, lambda: "other", resume=True).load() == {}
    with Journal(tmp_path, lambda: "key", resume=True, rank=1) as journal:
        found = journal.load()
        assert sorted(found) == [0, 4]
        np.testing.assert_array_equal(found[4][0].bits, np.full((2, 5), 2.0))
    assert list(tmp_path.iterdir()) == []  # finished


@pytest.mark.parametrize("lost", [1, 40, 300])
def test_a_record_that_was_cut_short_is_done_again_and_what_follows_is_read(tmp_path, lost):
    clock = Clock()
    journal = Journal(tmp_path, lambda: "key", clock=clock)
    for number in range(3):
        clock.now += journal_module.SAVE_EVERY_SECONDS
        journal.add(number, sums(number))  # and then it is killed
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-lost])
    again = Journal(tmp_path, lambda: "key", resume=True, clock=clock)
    assert sorted(again.load()) == [0, 1]
    clock.now += journal_module.SAVE_EVERY_SECONDS
    again.add(7, sums(7))
    assert sorted(Journal(tmp_path, lambda: "key", resume=True).load()) == [0, 1, 7]


def test_a_flipped_bit_is_noticed(tmp_path):
    with pytest.raises(RuntimeError), Journal(tmp_path, lambda: "key") as journal:
        journal.add(0, sums(1))
        raise RuntimeError
    [path] = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    assert Journal(tmp_path, lambda: "key", resume=True).load() == {}
