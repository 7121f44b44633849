"""Runs that are killed, two at once and a full disk, a few of each; `make kills` does 200."""

import pytest

from hostile.kills import JOBS, Job, Place, full_disk, kill_one, plan, two_at_once

KILLS = 3  # of each job, one with each signal


@pytest.mark.parametrize("job", JOBS, ids=[job.name for job in JOBS])
def test_nothing_is_lost(job: Job, tmp_path):
    place = Place(tmp_path, (job,))
    problems = [kill_one(place, job, number, part)[0] for _, number, part in plan(KILLS, (job,))]
    assert [*problems, two_at_once(place, job), full_disk(place, job)] == [""] * (KILLS + 2)
