"""Requests of all kinds, and what comes of them in a scheduler of streams, for tests of streams that come and go."""

import random

from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.scheduling import Request
from marlin_cli.engine.stopping import Stopping


def mixed(count, seed, longest=90):
    """Requests of all kinds: short and long, greedy and drawn, with stops, with nothing to do."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        prompt = rng.randbytes(rng.choice([0, 1, 3, 4, 5, 8, 17, 40, longest]))
        stop = tuple(rng.randbytes(1) for _ in range(rng.choice([0, 0, 0, 4])))
        sampling = rng.choice([
            Sampling(), Sampling(rng.uniform(0.5, 1.5), seed=rng.randrange(4)),
            Sampling(1.0, top_k=9, top_p=0.9, min_p=0.01, seed=3),
        ])  # fmt: skip
        stopping = Stopping(rng.choice([0, 1, 2, 7, 20, 33]), stop)
        found.append(Request(prompt, stopping, sampling, logprobs=rng.choice([None, None, 0, 2])))
    return found


class Outcome:
    """What has come of a stream so far."""

    def __init__(self):
        self.data, self.reason, self.costs = b"", None, ()

    def add(self, piece):
        assert self.reason is None, "a piece after the end"
        self.data, self.reason, self.costs = self.data + piece.data, piece.stop_reason, self.costs + piece.costs


def run(scheduler, requests, arrive=lambda step: True) -> list[Outcome]:
    """All requests, in their order, of which the next ones are admitted while `arrive`."""
    waiting, found = list(requests), {}
    step = 0
    while waiting or scheduler.running or scheduler.waiting:
        while waiting and arrive(step):
            found[scheduler.admit(waiting.pop(0))] = Outcome()
            step += 1
        step += 1
        for piece in scheduler.advance():
            found[piece.stream].add(piece)
    assert scheduler.cache_bytes == 0
    return list(found.values())


def at_random(seed):
    rng = random.Random(seed)
    return lambda step: rng.random() < 0.4
