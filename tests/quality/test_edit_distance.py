"""Edit distances against the table that defines them."""

import random

import pytest

from marlin_cli.quality.edit_distance import edit_distance


def by_table(found, wanted):
    row = list(range(len(wanted) + 1))
    for line, letter in enumerate(found, 1):
        before, row[0] = row[0], line
        for column, other in enumerate(wanted, 1):
            before, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, before + (letter != other))
    return row[-1]


@pytest.mark.parametrize(
    ("found", "wanted", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("aaa", "aaa", 0), ("ab", "ba", 2), ("x", "y", 1)],
)
def test_known(found, wanted, distance):
    assert edit_distance(found, wanted) == distance


def test_random_strings_of_few_and_many_letters():
    generator = random.Random(3)
    for letters in ("ab", "abcdefgh\udc80\U0001f600"):
        for _ in range(150):
            found, wanted = ("".join(generator.choices(letters, k=generator.randint(0, 90))) for _ in range(2))
            assert edit_distance(found, wanted) == by_table(found, wanted)
