"""Ranks open memory to each other, or all say for the same reason why they do not."""

import threading

import pytest
from cuda_emulator import OwnQueue, own_memory

from marlin_cli.errors import BackendError
from marlin_cli.ops import cuda_exchange
from marlin_cli.ops.cuda_exchange import Exchange, NoExchange, exchange_among

pytestmark = pytest.mark.cuda


class Together:
    """Ranks that are threads."""

    def __init__(self, size):
        self.size, self.given, self.barrier = size, [b""] * size, threading.Barrier(size)


class One:
    """A `Ranks` among them."""

    def __init__(self, rank, together):
        self.rank, self.size, self._together = rank, together.size, together
        self.over, self.before_collectives = [], []

    def gather(self, payload):
        self._together.given[self.rank] = payload
        self._together.barrier.wait(10)
        found = list(self._together.given)
        self._together.barrier.wait(10)
        return found

    def when_over(self, act):
        self.over.append(act)


@pytest.fixture
def made(monkeypatch):
    """What ranks come to, and they; `of` says of each rank's thread what the driver would."""
    here = threading.local()
    monkeypatch.setattr(cuda_exchange, "Queue", OwnQueue)
    monkeypatch.setattr(cuda_exchange, "pinned", own_memory)
    monkeypatch.setattr(cuda_exchange, "MOST_PLACES", 64)
    monkeypatch.setattr(cuda_exchange, "handle_of", lambda address: address.to_bytes(8, "little"))
    monkeypatch.setattr(cuda_exchange, "bus_address", lambda: here.gpu)
    monkeypatch.setattr(cuda_exchange, "_machine", lambda: here.machine)

    def opened(handle):
        if here.closed:
            raise BackendError("cannot")
        return int.from_bytes(handle, "little")

    monkeypatch.setattr(cuda_exchange, "opened", opened)

    def make(size=2, machines="aaaaaaaaa", gpus="012345678", closed=()):
        ranks, found = [One(rank, together) for together in [Together(size)] for rank in range(size)], [None] * size

        def act(rank):
            here.machine, here.gpu, here.closed = machines[rank], gpus[rank], rank in closed
            found[rank] = exchange_among(ranks[rank])

        threads = [threading.Thread(target=act, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return found, ranks

    return make


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_reach_each_others_memory(size, made):
    found, ranks = made(size)
    assert all(isinstance(each, Exchange) for each in found)
    for each, rank in zip(found, ranks, strict=True):
        assert exchange_among(rank) is each  # nobody asks twice
        assert [each.take(6)[1], each.take(6)[1]] == [0, 6]
        each.check()
        for act in (*rank.over, *rank.before_collectives):
            act()
        assert each._words[0] == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"machines": "ab"}, "the ranks are on several machines"),
        ({"gpus": "00"}, "several ranks are on one GPU"),
        ({"closed": (1,)}, "rank 1: cannot"),
        ({"size": 9}, "9 ranks are more than 8"),
    ],
)
def test_all_ranks_say_why_they_do_not(options, reason, made):
    found, _ = made(**options)
    assert all(isinstance(each, NoExchange) and str(each) == reason for each in found)


def test_what_does_not_arrive_is_found(made, monkeypatch):
    write = OwnQueue.write
    monkeypatch.setattr(OwnQueue, "write", lambda self, address, data: data.startswith(b"rank 0") or write(self, address, data))
    found, _ = made()
    assert [str(each) for each in found] == ["rank 0: what other ranks write into its GPU's memory does not arrive"] * 2
