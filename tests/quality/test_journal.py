"""Passes that are done come back, whatever a kill has left of the file."""

import dataclasses
import os

import numpy as np
import pytest

from marlin_cli.quality import journal as journal_module
from marlin_cli.quality.journal import Journal
from marlin_cli.quality.pass_sums import PassSums, from_bytes, to_bytes


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def sums(value: float) -> list[PassSums]:
    table = np.full((2, 5), float(value))
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


@pytest.mark.parametrize("hazard", ["pipe", "folder", "link", "garbage"])
def test_what_is_no_journal_is_not_read_and_stops_nothing(hazard, tmp_path, capsys):
    path, precious = tmp_path / "key.0.journal", tmp_path / "precious"
    precious.write_bytes(b"mine")
    {
        "pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "link": lambda: path.symlink_to(precious),
        "garbage": lambda: path.write_bytes(bytes(range(256)) * 9),
    }[hazard]()  # fmt: skip
    clock = Clock()
    journal = Journal(tmp_path, lambda: "key", resume=True, clock=clock)
    assert journal.load() == {}
    for number in range(2):
        clock.now += journal_module.SAVE_EVERY_SECONDS
        journal.add(number, sums(1))
    said = capsys.readouterr().err
    assert said.count("cannot keep what is scored") == (hazard != "garbage")
    assert precious.read_bytes() == b"mine"
    if hazard == "garbage":
        assert sorted(Journal(tmp_path, lambda: "key", resume=True).load()) == [0, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": np.full((2, 5), np.nan)}, {"bits": np.full((3, 5), 1.0)}, {"bytes": np.zeros(3)}, {"kl_of_bytes": np.zeros(3)},
        {"groups_of_bytes": np.zeros((2, 4), np.uint16)}, {"agreements": np.full((2, 5), 1)},
    ],
    ids=str,
)  # fmt: skip
def test_sums_that_cannot_be_are_damaged(changes):
    with pytest.raises(ValueError, match="damaged sums of a pass"):
        from_bytes(to_bytes([dataclasses.replace(sums(1)[0], **changes)]))
