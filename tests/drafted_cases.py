"""Streams that are drafted ahead by what knows their future, in part, for tests that drafts change no byte."""

import random
from dataclasses import replace

from stream_cases import at_random, run

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.drafts import Draft
from marlin_cli.engine.schedulers import streams_of
from marlin_cli.engine.scheduling import SchedulerLimits
from marlin_cli.engine.speculation import Speculation
from marlin_cli.engine.stream_scheduler import StreamScheduler

LIMITS = SchedulerLimits(max_streams=5, slice_rows=3)


class Knowing:
    """Drafts what will come, but for one byte in so many."""

    is_free = True

    def __init__(self, future, wrong_every, seed=0):
        rng = random.Random(seed)
        self._future = bytes(byte ^ (wrong_every > 0 and rng.random() * wrong_every < 1) for byte in future)

    def push(self, data):
        self._future = self._future[len(data) :]

    def draft(self, count):
        return Draft(self._future[:count], 64) if self._future else None


def sources(wrong_every):
    """The drafts of requests whose predictions are what will come, wrong in one byte of so many; 0: in none."""
    return lambda request, prompt: Knowing(request.speculation.prediction, wrong_every, len(prompt))


def drafted(network, requests, outcomes, wrong_every, most=4, bits=None, limits=LIMITS):
    """All requests side by side, with drafts out of what came of them without; what came of them, and of the drafts."""
    asked = [
        replace(request, speculation=Speculation(most, prediction=found.data + bytes(40)))
        for request, found in zip(requests, outcomes, strict=True)
    ]
    bits = bits or CacheBits()
    scheduler = StreamScheduler(network, streams_of(network, bits), limits, bits.window, sources(wrong_every))
    told = {}
    advance = scheduler.advance

    def telling():
        pieces = advance()
        told.update({piece.stream: piece.speculated for piece in pieces if piece.stop_reason is not None})
        return pieces

    scheduler.advance = telling
    return run(scheduler, asked, at_random(len(requests))), [told[number] for number in sorted(told)]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert (one.data, one.reason, one.costs) == (other.data, other.reason, other.costs)


class Recording:
    """Drafts nothing, and notes what comes: an id that is no byte as zero."""

    is_free = True

    def __init__(self):
        self.data = b""

    def push(self, data):
        self.data += data

    def draft(self, count):
        return None
