"""Streams of networks that take bytes one by one, drafted ahead: the bytes are those without drafts, also across windows."""

from dataclasses import replace

import mlx.core as mx
import pytest
from decoder_cases import random_bygpt5
from drafted_cases import Recording, assert_same, drafted
from evabyte_cases import SIZES, random_evabyte
from packed_layers import packed
from stream_cases import at_random, mixed, run

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.draft_model import drafts_of
from marlin_cli.engine.endless import Window
from marlin_cli.engine.prompt_store import PromptStore, StoreLimits
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.schedulers import scheduler_of, streams_of
from marlin_cli.engine.scheduling import Request, SchedulerLimits
from marlin_cli.engine.speculation import AUTO, Drafting, Prices, Speculation
from marlin_cli.engine.state_kinds import kind_of
from marlin_cli.engine.stopping import Stopping
from marlin_cli.engine.stream_scheduler import StreamScheduler
from marlin_cli.engine.window_decoding import LayerWindow
from marlin_cli.errors import UsageError
from marlin_cli.models.evabyte import EvaByte, EvaByteConfig
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops import cpu

LIMITS = SchedulerLimits(max_streams=5, slice_rows=3)
MODULE = cpu.kernels()[0]
# Requests reach beyond two windows of 32 bytes.
NETWORKS = {"evabyte": random_evabyte, "bygpt5": lambda: random_bygpt5(head_dim=32, max_bytes=255)}


@pytest.fixture(autouse=True)
def exact_rows():
    if MODULE is None:
        pytest.skip(f"no CPU kernels here: {cpu.kernels()[1]}")
    MODULE.set_exact_rows(True)
    yield
    MODULE.set_exact_rows(cpu.rows_are_exact())


@pytest.fixture(scope="module", params=NETWORKS.values(), ids=NETWORKS.keys())
def network(request):
    return request.param()


def plain_and_ids(network, requests, bits=None):
    """What comes of requests without drafts, and by request what an all-knowing draft is: its ids as bytes."""
    bits, records = bits or CacheBits(), [Recording() for _ in requests]
    scheduler = StreamScheduler(
        network, streams_of(network, bits), LIMITS, bits.window,
        lambda request, prompt: records[int(request.speculation.prediction)],
    )  # fmt: skip
    asked = [replace(each, speculation=Speculation(1, prediction=str(n).encode())) for n, each in enumerate(requests)]
    return run(scheduler, asked), records


@pytest.mark.parametrize("wrong_every", [0, 1, 6], ids=["right", "wrong", "sometimes wrong"])
def test_drafts_change_nothing(network, wrong_every):
    requests = mixed(10, seed=1)
    expected, ids = plain_and_ids(network, requests)
    found, told = drafted(network, requests, ids, wrong_every)
    assert_same(found, expected)
    drafts = sum(each.drafted_bytes for each in told if each)
    accepted = sum(each.accepted_bytes for each in told if each)
    assert {0: accepted > 0.4 * drafts > 0, 1: 0 < drafts and accepted < 0.2 * drafts, 6: 0 < accepted < drafts}[wrong_every]
    # A pass gives a byte, and those that were drafted right.
    assert all(each.passes + each.accepted_bytes >= len(one.data) for each, one in zip(told, found, strict=True) if each)


def test_nor_does_it_who_is_beside_a_stream(network):
    requests = [replace(each, logprobs=None) for each in mixed(6, seed=5)]
    together = run(scheduler_of(network, LIMITS), requests, at_random(8))
    alone = [run(scheduler_of(network, LIMITS), [request])[0] for request in requests]
    assert_same(together, alone)


@pytest.mark.parametrize("bits", [CacheBits(8, 8), CacheBits(4, 8)], ids=["8 bits", "4 and 8 bits"])
def test_nor_do_drafts_with_a_packed_cache(network, bits):
    requests = mixed(6, seed=2)
    expected, ids = plain_and_ids(network, requests, bits)
    assert_same(drafted(network, requests, ids, 9, bits=bits)[0], expected)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "int4"])
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
def test_nor_with_packed_weights(network, name):
    own, requests = packed(network(), name), mixed(6, seed=3)
    expected, ids = plain_and_ids(own, requests)
    assert_same(drafted(own, requests, ids, 7, most=3)[0], expected)


@pytest.mark.parametrize("most", [1, 31, 40])
def test_nor_wherever_a_window_ends(network, most):
    requests = [Request(bytes([7]) * n, Stopping(90), Sampling(0.03 * n, seed=n)) for n in (0, 30, 31, 32)]
    expected, ids = plain_and_ids(network, requests)
    for wrong_every in (0, 15):
        found, told = drafted(network, requests, ids, wrong_every, most=most)
        assert_same(found, expected)
        assert sum(each.accepted_bytes for each in told) > 90


def test_nor_when_the_context_is_read_again(network):
    bits = CacheBits(window=Window())
    requests = [Request(b"abc", Stopping(320), Sampling(1.0, seed=n)) for n in range(2)]
    expected, ids = plain_and_ids(network, requests, bits)
    found, told = drafted(network, requests, ids, 9, bits=bits)
    assert_same(found, expected)
    assert sum(each.accepted_bytes for each in told) > 200


def test_a_model_drafts_for_one_whose_ids_are_others(network, random_network, small_sizes):
    other = random_network(MegaByteConfig(**small_sizes))
    requests = mixed(6, seed=7)
    expected = run(scheduler_of(network, LIMITS), requests, at_random(6))
    asked = [replace(each, speculation=Speculation(3)) for each in requests]
    assert_same(run(scheduler_of(network, LIMITS, draft_source=drafts_of(other)), asked, at_random(6)), expected)


def test_what_is_kept_of_a_drafted_stream_is_what_it_wrote():
    network = random_bygpt5(head_dim=32, max_bytes=255)
    is_byte = (mx.arange(384) >= 3) & (mx.arange(384) < 259)
    network.output.weight = mx.where(is_byte[:, None], network.output.weight, 0)  # what is no byte is never the likeliest
    request = Request(b"a beginning", Stopping(45))
    (plain,) = run(scheduler_of(network), [request])
    store = PromptStore(kind_of(network), None, StoreLimits(fewest_rows=1))
    asked = replace(request, speculation=Speculation(3, prediction=plain.data[:20] + b"wrong" + plain.data[20:]))
    (found,) = run(scheduler_of(network, LIMITS, keeper=store), [asked])
    text = request.prompt + plain.data
    assert found.data == plain.data
    assert store.restore([byte + 3 for byte in text] + [3] * 20).units >= len(text) - 1
    further = Request(text, Stopping(20))
    (again,), (anew,) = (run(scheduler_of(network, keeper=each), [further]) for each in (store, None))
    assert again.data == anew.data


def follower(id):
    """The id after one in a text that `knowing` writes: a cycle of all bytes."""
    return 64 + (id - 64 + 77) % 256 if id >= 64 else id


def knowing(heads, right):
    """A network that writes a cycle of bytes, and as many of whose further heads guess it as are said to be right."""
    config = EvaByteConfig(
        d_model=320, ffn_dim=16, heads=2, layers=1, window_bytes=16, chunk_bytes=4, prediction_heads=heads, max_bytes=400
    )
    network, identity = EvaByte(config), mx.eye(320)
    network.embedding.weight, network.norm.weight = identity, mx.ones((320,))
    for each in (network.layers[0].attention.o_proj, network.layers[0].ffn.down_proj):
        each.weight = mx.zeros(each.weight.shape)
    rows, ids = [], list(range(320))
    for head in range(heads):
        ids = [follower(id) for id in ids]
        rows.append(identity[mx.array(ids if head <= right else [64] * 320)].T)
    network.output.weight = rows[0]
    network.drafts.weight = mx.concatenate(rows[1:])
    return network


@pytest.mark.parametrize("asked", [AUTO, Speculation(5)], ids=["auto", "5"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_further_heads_draft(asked, temperature):
    """The text of this network repeats itself too late for drafts of its own."""
    passes = {}
    for right in (5, 2, 0):
        network, request = knowing(6, right), Request(b"a", Stopping(120), Sampling(temperature, seed=4))
        (expected,) = run(scheduler_of(network), [request])
        scheduler = scheduler_of(network)
        scheduler.admit(replace(request, speculation=asked))
        data, told = b"", None
        while scheduler.running or scheduler.waiting:
            for piece in scheduler.advance():
                data, told = data + piece.data, piece.speculated or told
        assert data == expected.data
        assert told.accepted_bytes + told.passes >= 120
        passes[right] = told.passes
    if not asked.adapts:
        assert passes[5] < 35 < passes[2] < 60 < 115 < passes[0]


def test_guesses_are_asked_for_as_they_pay():
    drafting, prices = Drafting(AUTO, Recording(), 0), Prices()
    prices.plain(1.0, 0.0, streams=1)
    for _ in range(30):
        prices.drafted(1.2, 0.0, streams=1, units=1)
    for _ in range(40):
        assert drafting.wants_guess(prices)
        ids = drafting.draft(1, 0, 100, prices, [5, 6, 7])
        drafting.push([5, 6, 8, 9][: 1 + len(ids)])
    assert ids == [5, 6]
    asked = 0
    for _ in range(200):  # all are wrong from now on
        wanted = drafting.wants_guess(prices)
        asked += wanted
        ids = drafting.draft(1, 0, 100, prices, [5, 6, 7] if wanted else [])
        drafting.push([1])
    assert ids == [] and asked < 80
    assert drafting.draft(1, 0, 0, prices, [5]) == []


@pytest.mark.parametrize("bits", [CacheBits(), CacheBits(8, 4)], ids=["plain", "packed"])
@pytest.mark.parametrize("before", [0, 7, 31, 200])
def test_a_window_goes_back_to_what_it_was(bits, before):
    """Rows that are forgotten leave nothing behind, nor do pages that they filled."""
    by = random_evabyte(window_bytes=256).layers[0].attention
    rows = mx.random.normal((3, 1, 2, 300, SIZES["d_model"] // 2), key=mx.random.key(1))
    wrong = mx.random.normal((3, 1, 2, 40, SIZES["d_model"] // 2), key=mx.random.key(2))

    def taken(window, start, end):
        return window.attend(*(each[:, :, start:end] for each in rows), by)

    plain, drafted = LayerWindow(bits), LayerWindow(bits)
    for window in (plain, drafted):
        if before:
            taken(window, 0, before)
    for right in (0, 3, 9):
        start = drafted.offset
        drafted.may_go_back()
        drafted.attend(*mx.concatenate([rows[:, :, :, start : start + right], wrong], axis=3), by)
        drafted.forget(40, by)
        if right:
            taken(plain, start, start + right)
        assert drafted.offset == plain.offset == start + right
    found, expected = (taken(window, window.offset, 300) for window in (drafted, plain))
    assert mx.array_equal(found, expected).item()
    assert drafted.nbytes == plain.nbytes


def test_networks_whose_memory_is_not_taken_back_say_so(each_continuing):
    if each_continuing.config.model_type in ("blt", "spacebyte", "block_recurrent"):
        with pytest.raises(UsageError, match="cannot be taken back"):
            scheduler_of(each_continuing).admit(Request(b"abc", speculation=Speculation(2)))
    else:
        assert streams_of(each_continuing, CacheBits()).no_drafts is None
