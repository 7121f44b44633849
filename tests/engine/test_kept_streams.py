"""Streams of a scheduler that begin where others have been: each has the bytes that it has alone, read from nothing."""

import random
import threading

import numpy as np
import pytest
from engine.state_cases import SHIFTED
from small_networks import CONFIGS, CONTINUING, PACKABLE, random_weights

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.prompt_store import PromptStore, StoreLimits
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.schedulers import scheduler_of
from marlin_cli.engine.scheduling import Request, SchedulerLimits
from marlin_cli.engine.state_kinds import kind_of
from marlin_cli.engine.stopping import Stopping
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops import cpu

MODULE = cpu.kernels()[0]
pytestmark = pytest.mark.skipif(MODULE is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")

CASES = {
    **{name: (config, CacheBits()) for name, config in (*CONFIGS.items(), ("bygpt5", CONTINUING["bygpt5"]))},
    "4 bits": (MegaByteConfig(**PACKABLE), CacheBits(4, 4)),
    "shifted, 8 bits": (SHIFTED, CacheBits(8, 8)),
    "bygpt5, 8 bits": (CONTINUING["bygpt5"], CacheBits(8, 8)),
}


@pytest.fixture(autouse=True)
def exact_rows():
    MODULE.set_exact_rows(True)
    yield
    MODULE.set_exact_rows(cpu.rows_are_exact())


def requests(count, seed=0):
    """Prompts that share beginnings, some of them whole, with settings of their own."""
    draws = random.Random(seed)
    stems = [draws.randbytes(60) for _ in range(3)]
    return [
        Request(
            draws.choice(stems)[: draws.choice((0, 7, 32, 33, 48, 60))] + draws.randbytes(draws.choice((0, 0, 1, 4, 9))),
            Stopping(draws.choice((1, 6, 20)), (bytes([draws.randrange(256)]),)),
            Sampling(temperature=draws.choice((0.0, 1.0)), seed=draws.randrange(3)),
        )
        for _ in range(count)
    ]


def run(network, asked, bits, keeper=None, streams=4, arrivals=None):
    """The bytes of each request; a few arrive at a time."""
    scheduler = scheduler_of(network, SchedulerLimits(max_streams=streams, slice_rows=3), bits, keeper)
    waiting, numbers, found = list(enumerate(asked)), {}, [b""] * len(asked)
    draws = random.Random(arrivals)
    while waiting or scheduler.running or scheduler.waiting:
        for _ in range(draws.randrange(3) if arrivals is not None else len(waiting)):
            if waiting:
                index, request = waiting.pop(0)
                numbers[scheduler.admit(request)] = index
        for piece in scheduler.advance():
            found[numbers[piece.stream]] += piece.data
    return found


@pytest.mark.parametrize(("config", "bits"), CASES.values(), ids=CASES.keys())
def test_streams_that_begin_where_others_have_been_give_their_own_bytes(config, bits, tmp_path):
    network, asked = random_weights(config), requests(24)
    alone = [run(network, [each], bits)[0] for each in asked]
    kind, restored = kind_of(network, bits), []
    for folder, memory in ((None, 1 << 30), (tmp_path, 1 << 30), (tmp_path, 0)):
        store = PromptStore(kind, folder, StoreLimits(memory, fewest_rows=2))
        restore = store.restore
        store.restore = lambda ids, restore=restore: restored.append(restore(ids)) or restored[-1]
        assert run(network, asked, bits, store, arrivals=1) == alone
        assert any(restored)
        restored.clear()
        store.close()


@pytest.mark.parametrize("name", ["prefix", "megabyte_pytorch", "bygpt5"])
def test_so_do_streams_that_are_merged_where_no_kernels_run(monkeypatch, name):
    monkeypatch.setattr("marlin_cli.engine.decoding.fuse", lambda network: None)
    for module in ("state_kinds", "byte_decoding", "text_readers"):
        monkeypatch.setattr(f"marlin_cli.engine.{module}.fuse_bygpt5", lambda network: None)
    config, bits = CASES[name]
    network, asked = random_weights(config), requests(12)
    store = PromptStore(kind_of(network, bits), None, StoreLimits(fewest_rows=2))
    assert run(network, asked, bits, store, arrivals=1) == [run(network, [each], bits)[0] for each in asked]
    assert store.memory_bytes > 0


def test_a_stream_that_is_released_while_it_is_read_leaves_nothing(tmp_path):
    network = random_weights(MegaByteConfig(**PACKABLE))
    store = PromptStore(kind_of(network), None, StoreLimits(fewest_rows=1))
    scheduler = scheduler_of(network, SchedulerLimits(slice_rows=4), None, store)
    other = scheduler.admit(Request(b"a", Stopping(50)))
    scheduler.advance()
    stream = scheduler.admit(Request(bytes(60)))
    scheduler.advance()
    scheduler.release(stream)
    assert store.restore(bytes(60)) is None and scheduler.running == 1
    scheduler.release(other)
    assert scheduler.cache_bytes == 0


def test_what_is_read_of_a_known_prompt_is_what_is_new(monkeypatch):
    network = random_weights(MegaByteConfig(**PACKABLE))
    store = PromptStore(kind_of(network), None, StoreLimits(fewest_rows=1))
    rows = []
    from marlin_cli.engine.fused import FusedStages

    together = FusedStages.run_together
    monkeypatch.setattr(
        FusedStages, "run_together", lambda self, number, *given: rows.append(len(given[0])) or together(self, number, *given)
    )
    stem = np.random.default_rng(0).integers(0, 256, 64, dtype=np.uint8).tobytes()
    for prompt in (stem, stem, stem + b"more", stem[:40] + b"others"):
        run(network, [Request(prompt, Stopping(1))], None, store)
    assert rows == [17, 1, 1]  # the same prompt reads nothing


@pytest.mark.parametrize("by_kernels", [True, False])
@pytest.mark.parametrize("name", ["prefix", "bygpt5"])
def test_pieces_say_how_much_of_a_prompt_was_known(name, by_kernels, monkeypatch):
    if not by_kernels:
        monkeypatch.setattr("marlin_cli.engine.decoding.fuse", lambda network: None)
        for module in ("state_kinds", "byte_decoding", "text_readers"):
            monkeypatch.setattr(f"marlin_cli.engine.{module}.fuse_bygpt5", lambda network: None)
    config, _ = CASES[name]
    network = random_weights(config)
    store = PromptStore(kind_of(network), None, StoreLimits(fewest_rows=1))
    stem, known = bytes(range(40)), []
    for prompt in (stem, stem + b"more", b"?"):
        scheduler = scheduler_of(network, None, None, store)
        scheduler.admit(Request(prompt, Stopping(3)))
        pieces = []
        while scheduler.running or scheduler.waiting:
            pieces += scheduler.advance()
        known.append({piece.known for piece in pieces})
    assert known[0] == known[2] == {0} and known[1] == {40}


def test_no_stream_waits_while_another_one_is_found_on_disk(tmp_path, monkeypatch):
    network = random_weights(MegaByteConfig(**PACKABLE))
    stem = bytes(range(64))
    limits = StoreLimits(memory_bytes=0, fewest_rows=1)
    store = PromptStore(kind_of(network), tmp_path, limits)
    run(network, [Request(stem, Stopping(1))], None, store)
    store.close()
    store, going = PromptStore(kind_of(network), tmp_path, limits), threading.Event()
    find = store._folder.find
    monkeypatch.setattr(store._folder, "find", lambda *given: going.wait(10) and find(*given))
    scheduler = scheduler_of(network, None, None, store)
    going.set()
    runs = scheduler.admit(Request(b"a", Stopping(200)))
    scheduler.advance()
    going.clear()
    enters = scheduler.admit(Request(stem + b"?", Stopping(9)))
    for _ in range(5):
        assert {piece.stream for piece in scheduler.advance()} == {runs} and scheduler.waiting == 1
    going.set()
    found = []
    while scheduler.running or scheduler.waiting:
        found += scheduler.advance()
    own = [piece for piece in found if piece.stream == enters]
    assert b"".join(piece.data for piece in own) == run(network, [Request(stem + b"?", Stopping(9))], None)[0]
    assert own[0].known == 64
    store.close()
