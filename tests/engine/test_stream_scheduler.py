"""Streams that come and go: each gives what it gives alone, whoever is beside it; places, memory, slices and releases."""

import random
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from decoder_cases import random_bygpt5
from packed_layers import packed
from stream_cases import Outcome, at_random, mixed, run

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.compiled_patches import compiled_patches
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.schedulers import scheduler_of
from marlin_cli.engine.scheduling import NOT_FINITE, Request, SchedulerLimits
from marlin_cli.engine.stopping import Stopping
from marlin_cli.engine.streams import slices
from marlin_cli.errors import UsageError
from marlin_cli.models import continuing_of
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops import cpu

MODULE = cpu.kernels()[0]
BYGPT5 = {"relative_buckets": 8, "relative_distance": 16, "max_bytes": 96, "head_dim": 32}


def alone(network, request, bits=None) -> Outcome:
    return run(scheduler_of(network, cache_bits=bits), [request])[0]


@pytest.fixture
def exact_rows() -> Iterator[None]:
    if MODULE is None:
        pytest.skip(f"no CPU kernels here: {cpu.kernels()[1]}")
    MODULE.set_exact_rows(True)
    yield
    MODULE.set_exact_rows(cpu.rows_are_exact())


def assert_same(network, requests, limits, bits=None, exact=True):
    together = run(scheduler_of(network, limits, bits), requests, at_random(len(requests)))
    for request, found in zip(requests, together, strict=True):
        expected = alone(network, request, bits)
        assert (found.data, found.reason) == (expected.data, expected.reason)
        if request.logprobs is None:
            assert found.costs == ()
        else:
            assert len(found.costs) == len(found.data)
            told = [[each.log_probability for each in outcome.costs] for outcome in (found, expected)]
            assert np.allclose(*told, atol=0 if exact else 1e-4)


LIMITS = SchedulerLimits(max_streams=7, slice_rows=3)


@pytest.mark.parametrize("bits", [None, CacheBits(8, 8), CacheBits(8, 4)], ids=["float32", "8 bits", "8 and 4 bits"])
def test_each_request_gives_what_it_gives_alone(random_network, each_config, bits, exact_rows):
    config = replace(each_config, global_dim=64, byte_dim=each_config.byte_dim or 64 // each_config.patch_size)
    assert_same(random_network(config), mixed(40, seed=1), LIMITS, bits)


@pytest.mark.parametrize("bits", [None, CacheBits(8, 4)], ids=["float32", "8 and 4 bits"])
def test_each_request_of_a_network_of_bytes_gives_what_it_gives_alone(bits, exact_rows):
    assert_same(random_bygpt5(**BYGPT5), mixed(60, seed=2), LIMITS, bits)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "int8"])
def test_so_do_packed_networks(random_network, small_sizes, name, exact_rows):
    sizes = {**small_sizes, "global_dim": 64, "local_dim": 64}
    assert_same(packed(random_network(MegaByteConfig(**sizes)), name), mixed(40, seed=3), LIMITS)


def test_so_do_networks_whose_rows_are_fast(each_network):
    assert_same(each_network, mixed(60, seed=4), LIMITS, exact=False)


def test_so_do_networks_that_go_operation_by_operation(each_network, monkeypatch):
    """And join each other with padding."""
    monkeypatch.setattr("marlin_cli.engine.decoding.fuse", lambda network: None)
    assert_same(each_network, mixed(30, seed=5), LIMITS, exact=False)


@pytest.fixture
def by_operations(monkeypatch):
    monkeypatch.setattr("marlin_cli.engine.decoding.fuse", lambda network: None)


@pytest.mark.parametrize("bits", [None, CacheBits(8, 8), CacheBits(8, 4)], ids=["float32", "8 bits", "8 and 4 bits"])
def test_batches_become_one_where_they_stand_at_the_same_boundary(
    random_network, each_config, bits, by_operations, monkeypatch
):
    """Whatever their lengths, beyond a page of the cache too; those that come in slices come later."""
    monkeypatch.setattr("marlin_cli.engine.decoding.PREFILL_ROWS", 50)
    byte_dim = each_config.byte_dim or 64 // each_config.patch_size
    network = random_network(replace(each_config, global_dim=64, byte_dim=byte_dim, max_bytes=1600))
    rng = random.Random(0)
    requests = [
        Request(rng.randbytes(count), Stopping(60), Sampling(1.0, seed=count % 3)) for count in (5, 1040, 12, 0, 1200, 30)
    ]
    scheduler, batches = scheduler_of(network, cache_bits=bits), []
    advance = scheduler.advance
    monkeypatch.setattr(scheduler, "advance", lambda: (advance(), batches.append(len(scheduler._streams._batches)))[0])
    found = [(outcome.data, outcome.reason) for outcome in run(scheduler, requests)]
    assert 1 in batches[batches.index(max(batches)) :]
    assert found == [(outcome.data, outcome.reason) for outcome in (alone(network, each, bits) for each in requests)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_gpu_takes_whole_patches_of_those_that_one_drawing_does_for(
    random_network, small_sizes, temperature, by_operations, monkeypatch
):
    """Here without a GPU, and not compiled."""
    monkeypatch.setattr(mx, "compile", lambda function: function)
    monkeypatch.setattr(
        "marlin_cli.engine.decoding.patch_decoder", lambda network, streams, bits: compiled_patches(network, streams)
    )
    monkeypatch.setattr("marlin_cli.engine.merged_streams.gpu", lambda: "metal")
    network = random_network(MegaByteConfig(**small_sizes))
    requests = [
        Request(b"abcdefghi"[:n], Stopping(30), Sampling(temperature, seed=seed))
        for n, seed in [(4, 1), (8, 1), (5, 1), (4, 2)]
    ]
    scheduler, most = scheduler_of(network), []
    advance = scheduler.advance
    monkeypatch.setattr(scheduler, "advance", lambda: (advance(), most.append(len(scheduler._streams._batches)))[0])
    found = [outcome.data for outcome in run(scheduler, requests)]
    assert found == [alone(network, each).data for each in requests]
    assert most[4] == (3 if temperature else 1)  # of unlike seed, or at another byte of its own


def test_a_stream_can_be_released_while_its_prompt_is_read_beside_others(
    random_network, small_sizes, by_operations, monkeypatch
):
    monkeypatch.setattr("marlin_cli.engine.decoding.PREFILL_ROWS", 3)
    network = random_network(MegaByteConfig(**small_sizes))
    runs, *enter = [Request(bytes([65 + n]) * length, Stopping(30)) for n, length in enumerate((4, 60, 64, 68))]
    for gone in ([1], [1, 2, 3]):
        scheduler = scheduler_of(network)
        outcomes = {scheduler.admit(runs): Outcome()}
        scheduler.advance()
        outcomes |= {scheduler.admit(request): Outcome() for request in enter}
        scheduler.advance()
        for stream in gone:
            scheduler.release(stream)
        while scheduler.running:
            for piece in scheduler.advance():
                outcomes[piece.stream].add(piece)
        assert scheduler.cache_bytes == 0
        for stream, request in enumerate([runs, *enter]):
            if stream == 0:
                assert outcomes[0].reason == "length"
            else:
                assert outcomes[stream].data == (b"" if stream in gone else alone(network, request).data)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [6, 7])
@pytest.mark.parametrize("kind", ["megabyte", "bygpt5"])
def test_five_hundred_requests_give_what_they_give_alone(random_network, small_sizes, kind, seed, exact_rows):
    network = random_network(MegaByteConfig(**small_sizes)) if kind == "megabyte" else random_bygpt5(**BYGPT5)
    assert_same(network, mixed(500, seed), SchedulerLimits(max_streams=24, slice_rows=5))


@pytest.fixture(params=["megabyte", "bygpt5"])
def network(request, random_network, small_sizes):
    """One that draws bytes alone: other ids are not among its likeliest."""
    if request.param == "megabyte":
        return random_network(MegaByteConfig(**small_sizes))
    network = random_bygpt5(**BYGPT5)
    is_byte = (mx.arange(384) >= 3) & (mx.arange(384) < 259)
    network.output.weight = network.output.weight * is_byte[:, None]
    return network


def test_streams_wait_for_places_in_their_order(network):
    scheduler = scheduler_of(network, SchedulerLimits(max_streams=2))
    streams = [scheduler.admit(Request(b"abc", Stopping(9))) for _ in range(5)]
    assert streams == [0, 1, 2, 3, 4] and (scheduler.running, scheduler.waiting) == (0, 5)
    ended = []
    while scheduler.running or scheduler.waiting:
        ended += [piece.stream for piece in scheduler.advance() if piece.stop_reason]
        assert scheduler.running <= 2
    assert ended == streams


def test_what_its_caches_may_grow_to_gives_a_stream_its_place(network):
    """Two fit at once, a long one waits for both and lets nobody pass, and what can never fit is refused."""
    short, long = Request(b"abc", Stopping(9)), Request(b"abc" * 20, Stopping(30))
    most = scheduler_of(network)._streams.most_bytes
    room = 2 * most(12)
    assert most(90) <= room
    scheduler = scheduler_of(network, SchedulerLimits(cache_bytes=room))
    for request in (short, short, long, short):
        scheduler.admit(request)
    ran = []
    while scheduler.running or scheduler.waiting:
        scheduler.advance()
        ran.append(scheduler.running)
        assert scheduler.cache_bytes <= room
    assert max(ran) == 2
    tight = scheduler_of(network, SchedulerLimits(cache_bytes=most(12) - 1))
    with pytest.raises(UsageError, match=r"up to 12 bytes, whose cache takes [\d,]+, but the caches of all streams have"):
        tight.admit(short)
    assert (tight.running, tight.waiting) == (0, 0)


def test_a_prompt_beyond_the_context_is_refused(network):
    with pytest.raises(UsageError, match="the prompt has 97 bytes, but the model's context is 96"):
        scheduler_of(network).admit(Request(b"x" * 97))


@pytest.mark.parametrize("steps", [0, 1, 2, 9])
def test_a_stream_that_is_released_is_gone_wherever_it_stands(network, steps):
    """Waiting, while its prompt is read, and decoded; what it held is free, and its neighbour does not notice."""
    scheduler = scheduler_of(network, SchedulerLimits(max_streams=2, slice_rows=2))
    stays, leaves = scheduler.admit(Request(b"stays", Stopping(40))), scheduler.admit(Request(b"leaves" * 9, Stopping(40)))
    waits = scheduler.admit(Request(b"waits", Stopping(5)))
    outcomes = {stays: Outcome(), leaves: Outcome(), waits: Outcome()}

    def advance():
        for piece in scheduler.advance():
            outcomes[piece.stream].add(piece)

    for _ in range(steps):
        advance()
    before, held = outcomes[leaves].data, scheduler.cache_bytes
    for _ in range(2):  # the second time there is nobody
        scheduler.release(leaves)
        scheduler.release(99)
    assert scheduler.cache_bytes < held or held == 0
    if steps == 0:
        scheduler.release(waits)
    while scheduler.running or scheduler.waiting:
        advance()
    assert outcomes[leaves].data == before and outcomes[leaves].reason is None
    assert outcomes[stays].data == alone(network, Request(b"stays", Stopping(40))).data
    assert outcomes[waits].reason == (None if steps == 0 else "length")
    assert scheduler.cache_bytes == 0


def test_a_long_prompt_comes_in_slices_and_keeps_nobody_waiting(network):
    """Streams that run have a patch (or byte) each time, of which there are as many as there are slices."""
    scheduler = scheduler_of(network, SchedulerLimits(slice_rows=2))
    runs = scheduler.admit(Request(b"abcd", Stopping(90)))
    scheduler.advance()
    enters = scheduler.admit(Request(b"x" * 80, Stopping(2)))
    came = []
    while not any(piece.stream == enters for piece in came):
        new = scheduler.advance()
        assert [piece.stream for piece in new if piece.stream == runs] == [runs]
        came += new
    rows = 21 if network.config.model_type == "megabyte" else 80
    assert len([piece for piece in came if piece.stream == runs]) == -(-rows // 2)


@pytest.mark.parametrize(
    ("ready", "most", "expected"),
    [
        (0, 64, {1: 200, 2: 56}),
        (1, 64, {1: 64}),
        (99, 250, {1: 200, 2: 50}),
        (1, 3, {1: 3}),
    ],
)
def test_a_slice_goes_to_prompts_in_their_order(ready, most, expected):
    assert slices({1: 200, 2: 300, 3: 5}, ready, most) == expected


def test_costs_are_those_of_the_model(network):
    """Before temperature and filters; the likeliest first; as many as there are bytes, also where bytes were held back."""
    stopping, continuing = Stopping(12, (b"\x00\x01\x02",)), continuing_of(network)
    outcome = alone(network, Request(b"some", stopping, Sampling(2.0, top_k=3, seed=5), logprobs=3))
    whole = np.frombuffer(b"some" + outcome.data, dtype=np.uint8).astype(np.int32)
    logits = continuing.predictions(network, mx.array(whole)[None])[0]
    expected = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[4:]
    assert len(outcome.costs) == len(outcome.data) == 12
    for row, byte, cost in zip(expected, outcome.data, outcome.costs, strict=True):
        assert cost.id == byte + continuing.first_byte and abs(cost.log_probability - row[cost.id]) < 1e-4
        assert [each for each, _ in cost.likeliest] == np.argsort(-row, kind="stable")[:3].tolist()
        assert cost.id in [each for each, _ in cost.likeliest]  # drawn of three


def test_a_stream_without_numbers_ends_and_its_neighbours_go_on(random_network, small_sizes):
    """One byte of the table is none: who reads it has nothing to go on with."""
    network = random_network(MegaByteConfig(**small_sizes))
    network.byte_embedding.weight[7] = np.nan
    clean, spoiled = Request(b"abcdefgh", Stopping(16), Sampling(1.0, top_k=5)), Request(b"abcd\x07efg", Stopping(16))
    first, second = run(scheduler_of(network), [clean, spoiled])
    assert (second.data, second.reason) == (b"", NOT_FINITE)
    expected = alone(network, clean)
    assert (first.data, first.reason) == (expected.data, expected.reason)


@pytest.mark.parametrize("values", [{"max_streams": 0}, {"cache_bytes": 0}, {"slice_rows": 0}])
def test_impossible_limits_are_refused(values):
    with pytest.raises(UsageError, match="must be at least 1, found 0"):
        SchedulerLimits(**values)
