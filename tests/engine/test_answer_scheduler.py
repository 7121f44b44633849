"""Inputs that are answered side by side as they come: each as if it were alone, whatever stands beside it."""

import random

import pytest
from byt5_cases import KINDS, random_byt5

from marlin_cli.engine import answer_scheduler
from marlin_cli.engine.answer_requests import AnswerLimits, AnswerPiece, AnswerRequest
from marlin_cli.engine.answer_scheduler import AnsweringScheduler
from marlin_cli.engine.beams import Beams
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.scheduling import SchedulerLimits
from marlin_cli.ops import cpu

SHAPE = {"relative_buckets": 8, "relative_distance": 8, "vocab_size": 262}


@pytest.fixture(autouse=True)
def exact_rows():
    module = cpu.kernels()[0]
    if module is not None:
        module.set_exact_rows(True)
    yield
    if module is not None:
        module.set_exact_rows(cpu.rows_are_exact())


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def network(request):
    return random_byt5(**{**SHAPE, **request.param})


@pytest.fixture(params=["kernels", "graph"])
def way(request, monkeypatch):
    if request.param == "kernels" and cpu.kernels()[0] is None:
        pytest.skip(f"no CPU kernels here: {cpu.kernels()[1]}")
    if request.param == "graph":
        monkeypatch.setattr(answer_scheduler, "fuse_answers", lambda network: None)


def random_request(rng):
    longest = rng.choice([0, 1, 5, 12])
    beams = rng.choice([None, None, None, Beams(rng.randint(1, 4), 1, rng.choice([0.5, 1.0]))])
    stop = tuple(bytes([rng.randrange(256)]) for _ in range(rng.choice([0, 0, 40]))) if beams is None else ()
    prefix = rng.choice([b"", b"", b"ab", b"\xff"])
    limits = AnswerLimits(longest, rng.randint(0, longest), prefix, stop)
    temperature = rng.choice([0.0, 0.0, 0.7, 1.5]) if beams is None else 0.0
    sampling = Sampling(temperature, rng.choice([0, 5]), rng.choice([1.0, 0.8]), seed=rng.randint(0, 3))
    prompt = bytes(rng.randrange(256) for _ in range(rng.choice([0, 1, 3, 9, 30])))
    return AnswerRequest(prompt, limits, sampling, beams, sentinels=rng.random() < 0.3, memory_bits=rng.choice([16, 16, 8, 4]))


def ran(
    scheduler: AnsweringScheduler, requests: list[AnswerRequest], rng: random.Random | None = None
) -> list[list[AnswerPiece]]:
    """The pieces of each request, which come one by one at random if `rng` is given."""
    pieces: dict[int, list[AnswerPiece]] = {}
    order = []
    waiting = list(requests)
    while waiting or scheduler.running or scheduler.waiting:
        for _ in range(len(waiting) if rng is None else rng.choice([0, 0, 1, 3])):
            if waiting:
                order.append(scheduler.admit(waiting.pop(0)))
        for piece in scheduler.advance():
            own = pieces.setdefault(piece.stream, [])
            assert not own or own[-1].stop_reason is None
            own.append(piece)
    return [pieces[number] for number in order]


def told(pieces):
    """The bytes, the reason of the end, and the answers of one request."""
    last = pieces[-1]
    return (
        b"".join(each.data for each in pieces),
        last.stop_reason,
        [(each.ids, each.score, each.stop_reason) for each in last.answers],
    )


def test_requests_that_come_at_random_are_answered_as_alone(network, way):
    rng = random.Random(5)
    requests = [random_request(rng) for _ in range(60)]
    limits = SchedulerLimits(max_streams=6, cache_bytes=400_000, slice_rows=8)
    scheduler = AnsweringScheduler(network, limits)
    together = [told(each) for each in ran(scheduler, requests, rng)]
    assert together == [told(ran(AnsweringScheduler(network), [each])[0]) for each in requests]
    assert len({data for data, _, _ in together}) > 20
    assert {reason for _, reason, _ in together} >= {"stop", "length"}
    assert scheduler.cache_bytes == scheduler.running == scheduler.waiting == 0
