"""Streams that are drafted ahead: their bytes are those without drafts, whatever the drafts are and whoever is beside them."""

import random
from dataclasses import replace

import pytest
from drafted_cases import Knowing, assert_same, drafted, sources
from packed_layers import packed
from small_networks import CONFIGS
from stream_cases import at_random, mixed, run

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.draft_model import drafts_of
from marlin_cli.engine.drafts import Draft, TextDrafts
from marlin_cli.engine.endless import Window
from marlin_cli.engine.prompt_store import PromptStore, StoreLimits
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.schedulers import scheduler_of, streams_of
from marlin_cli.engine.scheduling import Request, SchedulerLimits
from marlin_cli.engine.speculation import AUTO, Drafting, Prices, Speculation, speculation_of, worth, worth_of
from marlin_cli.engine.state_kinds import kind_of
from marlin_cli.engine.stopping import Stopping
from marlin_cli.engine.stream_scheduler import StreamScheduler
from marlin_cli.errors import UsageError
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops import cpu

LIMITS = SchedulerLimits(max_streams=5, slice_rows=3)
MODULE = cpu.kernels()[0]


@pytest.fixture
def exact_rows():
    if MODULE is None:
        pytest.skip(f"no CPU kernels here: {cpu.kernels()[1]}")
    MODULE.set_exact_rows(True)
    yield
    MODULE.set_exact_rows(cpu.rows_are_exact())


@pytest.mark.parametrize("wrong_every", [0, 1, 6], ids=["right", "wrong", "sometimes wrong"])
def test_drafts_change_nothing(random_network, each_config, wrong_every, exact_rows):
    network = random_network(each_config)
    requests = mixed(24, seed=1)
    expected = run(scheduler_of(network, LIMITS), requests, at_random(24))
    found, told = drafted(network, requests, expected, wrong_every)
    assert_same(found, expected)
    drafts = sum(each.drafted_bytes for each in told if each)
    accepted = sum(each.accepted_bytes for each in told if each)
    assert drafts
    assert {0: accepted > 0.7 * drafts, 1: accepted == 0, 6: 0 < accepted < drafts}[wrong_every]


@pytest.mark.parametrize("bits", [CacheBits(8, 8), CacheBits(4, 4)], ids=["8 bits", "4 bits"])
def test_nor_with_a_packed_cache(random_network, each_config, bits, exact_rows):
    config = replace(each_config, global_dim=64, byte_dim=each_config.byte_dim or 64 // each_config.patch_size)
    network, requests = random_network(config), mixed(12, seed=2)
    expected = run(scheduler_of(network, LIMITS, bits), requests, at_random(12))
    assert_same(drafted(network, requests, expected, 9, bits=bits)[0], expected)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8", "int8", "int4"])
def test_nor_with_packed_weights(random_network, small_sizes, name, exact_rows):
    network = packed(random_network(MegaByteConfig(**{**small_sizes, "global_dim": 64, "local_dim": 64})), name)
    requests = mixed(16, seed=3)
    expected = run(scheduler_of(network, LIMITS), requests, at_random(16))
    for wrong_every in (0, 7):
        assert_same(drafted(network, requests, expected, wrong_every, most=3)[0], expected)


@pytest.mark.parametrize("asked", [AUTO, Speculation(4)], ids=["auto", "4"])
def test_drafts_out_of_the_text_itself_change_nothing(random_network, small_sizes, asked, exact_rows):
    """Random weights repeat themselves where the likeliest byte is taken: drafts are right, and fewer passes are made."""
    network = random_network(MegaByteConfig(**{**small_sizes, "max_bytes": 800}))
    requests = [
        Request(bytes([n]) * n, Stopping(400), Sampling(0.05 * n, seed=n), speculation=asked) for n in (0, 1, 5, 12)
    ]  # fmt: skip
    plain = [replace(request, speculation=Speculation()) for request in requests]
    assert_same(run(scheduler_of(network, LIMITS), requests), run(scheduler_of(network, LIMITS), plain))


@pytest.mark.parametrize("name, window", [
    ("prefix", Window(80)), ("prefix", Window(96, 3)), ("prefix", Window()), ("grouped attention", Window(80)),
    ("megabyte_pytorch", Window()), ("megabyte_pytorch, 3 stages", Window(80)), ("prefix learned, token shift", Window()),
], ids=str)  # fmt: skip
def test_nor_beyond_the_context(random_network, name, window, exact_rows, monkeypatch):
    """Rows that a draft had wrong are taken out of a ring, which has let go of none that a row to come sees."""
    monkeypatch.setattr("marlin_cli.engine.fused.ROWS_PER_PAGE", 64)  # tiles of attention are as long
    network, bits = random_network(CONFIGS[name]), CacheBits(window=window)
    requests = [Request(bytes([n]) * n, Stopping(620), Sampling(0.02 * n, seed=n)) for n in (0, 7, 50)]
    expected = run(scheduler_of(network, LIMITS, bits), requests, at_random(3))
    found, told = drafted(network, requests, expected, 9, bits=bits)
    assert_same(found, expected)
    assert sum(each.accepted_bytes for each in told) > 200


def test_a_stream_may_leave_while_others_are_drafted(random_network, small_sizes, exact_rows):
    network = random_network(MegaByteConfig(**{**small_sizes, "token_shift": True}))
    requests = [Request(bytes([n] * 9), Stopping(40)) for n in range(4)]
    expected = run(scheduler_of(network, LIMITS), requests)
    asked = [
        replace(each, speculation=Speculation(3, prediction=found.data)) for each, found in zip(requests, expected, strict=True)
    ]
    scheduler = StreamScheduler(network, streams_of(network, CacheBits()), LIMITS, draft_source=sources(5))
    found = {scheduler.admit(request): b"" for request in asked[:3]}
    for step in range(40):
        if step == 2:
            scheduler.release(1)
        if step == 3:
            found[scheduler.admit(asked[3])] = b""
        for piece in scheduler.advance():
            found[piece.stream] += piece.data
    assert [found[n] for n in (0, 2, 3)] == [expected[n].data for n in (0, 2, 3)]
    assert expected[1].data.startswith(found[1])
    assert len(found[1]) < 40
    assert scheduler.cache_bytes == 0


def test_a_stop_within_a_draft_ends_the_stream(random_network, small_sizes, exact_rows):
    network = random_network(MegaByteConfig(**small_sizes))
    request = Request(b"abc", Stopping(40), Sampling(1.0, seed=5))
    (whole,) = run(scheduler_of(network), [request])
    stop = whole.data[17:19]
    asked = replace(request, stopping=Stopping(40, (stop,)), speculation=Speculation(8, prediction=whole.data))
    (found,) = run(scheduler_of(network), [asked])
    assert (found.data, found.reason) == (whole.data[: whole.data.index(stop)], "stop")


def test_rows_that_depend_on_others_are_no_ground_for_drafts(random_network, small_sizes):
    network = random_network(MegaByteConfig(**small_sizes))
    if MODULE is not None:
        MODULE.set_exact_rows(False)
    with pytest.raises(UsageError, match="leave it off"):
        scheduler_of(network).admit(Request(b"abc", speculation=Speculation(2)))
    (found,) = run(scheduler_of(network), [Request(b"abc", speculation=AUTO)])
    assert len(found.data) == 93
    if MODULE is not None:
        MODULE.set_exact_rows(cpu.rows_are_exact())


def test_more_is_drafted_where_more_is_right():
    assert [worth(chance, 0.4) for chance in (0.1, 0.59, 0.61, 0.7, 0.9, 0.99)] == [0, 0, 1, 2, 8, 91]
    drafting = Drafting(Speculation(16, adapts=True), Knowing(bytes(9000), 0), 0)
    lengths, prices = [], Prices()
    for _ in range(20):
        ids = drafting.draft(4, 0, 900, prices)
        lengths.append(len(ids))
        drafting.push(ids or [0] * 4)
    assert lengths[0] < lengths[-1] <= 64
    for _ in range(30):  # what is thought of is wrong from now on
        ids = drafting.draft(4, 0, 900, prices)
        drafting.push([1] * 4)
    assert ids == []
    told = drafting.told
    assert told.passes == 50
    assert told.accepted_bytes == sum(lengths)
    for _ in range(30):  # and right again, which is seen without trying
        ids = drafting.draft(4, 0, 900, prices)
        drafting.push(ids or [0] * 4)
    assert len(ids) > 4


def test_nothing_is_drafted_that_costs_as_much():
    prices = Prices()
    assert prices.price == 0.4
    for _ in range(30):
        prices.plain(1.0, 3.0, streams=4)
        prices.drafted(1.0, 3.0, streams=4, units=2)
    assert abs(prices.price - 1.5) < 0.1
    drafting = Drafting(AUTO, Knowing(bytes(100), 0), 0)
    assert drafting.draft(4, 0, 90, prices) == []
    for _ in range(300):
        prices.plain(1.0, 3.0, streams=4)
    assert prices.price < 0.5  # and is tried again


def test_one_step_that_was_interrupted_is_not_believed():
    prices = Prices()
    prices.plain(1.0, 3.0, streams=4)
    prices.drafted(1.0, 300.0, streams=4, units=2)
    assert prices.price < 0.6


def test_drafts_follow_an_edited_text():
    rng = random.Random(0)
    lines = [rng.randbytes(30) + b"\n" for _ in range(60)]
    edited = [b"another line, of another length\n" if n % 12 == 5 else line for n, line in enumerate(lines)]
    old, new = b"".join(lines), b"".join(edited)
    drafts, right, at = TextDrafts(text=old), 0, 0
    while at < len(new):
        found = drafts.draft(8)
        guessed = b"" if found is None else found.data
        right += sum(one == other for one, other in zip(guessed, new[at : at + 8], strict=False))
        drafts.push(new[at : at + 8])
        at += 8
    assert right > 0.75 * len(new)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(b"", None), (b"abc" * 5, None), (b"ab" * 12, b"ab" * 5), (b"0123456789abcdefX, 0123456789abcdef", b"X, 0123456")],
)
def test_drafts_need_a_long_match(text, expected):
    found = TextDrafts(text=text).draft(10)
    assert (found and found.data) == expected


def test_a_prediction_needs_no_match():
    drafts = TextDrafts(b"what may follow", b"the prompt")
    assert drafts.draft(4) == Draft(b"what", 32)
    drafts.push(b"what")
    assert drafts.draft(4) == Draft(b" may", 36)
    drafts.push(b" may follow")
    assert drafts.draft(4) is None  # it is over


def test_drafts_resume_behind_a_character_that_was_another():
    drafts = TextDrafts("začátek textu".encode(), resumes=True)
    assert drafts.draft(6).data == "začá".encode()
    drafts.push("zá".encode())
    assert drafts.draft(4).data == "čá".encode()
    drafts.push(b"c")
    assert drafts.draft(4).data == "áte".encode()


def test_drafts_end_a_character_as_it_ended_before():
    drafts = TextDrafts(b"aurea a b", resumes=True)
    assert drafts.draft(3).data == b"aur"
    drafts.push("á".encode()[:1])
    assert drafts.draft(6) is None  # nothing is known of what begins so
    drafts.push("á".encode()[1:])
    assert drafts.draft(3).data == b"ure"
    drafts.push("ureá".encode()[:4])
    assert drafts.draft(4).data == "á".encode()[1:] + b" a "
    drafts.push("á ".encode()[1:])
    assert drafts.draft(2).data == b"a "
    drafts.push("à".encode()[:1])
    assert drafts.draft(4).data == "á".encode()[1:] + b" b"
    drafts.push("à".encode()[1:])  # it ended otherwise
    assert drafts.draft(2).data == b" b"


def test_drafts_know_which_bytes_stay_what_they_are():
    drafts = TextDrafts(b"ab" * 20, resumes=True)
    for _ in range(8):
        drafts.draft(4)
        drafts.push(b"xb")
    changed, kept = drafts.draft(2).chances
    assert changed < 0.5 < 0.9 < kept
    assert worth_of([kept, changed, kept], lambda units: 0.3 * units) == 1
    assert worth_of([kept] * 5, lambda units: 0.3 * units) == 5


def test_the_first_rows_of_a_pass_may_be_cheaper():
    prices = Prices()
    for _ in range(30):
        prices.plain(1.0, 0.0, streams=1)
        prices.drafted(1.1, 0.0, streams=1, units=1)
        prices.drafted(2.6, 0.0, streams=1, units=4)
    assert abs(prices.cost(1) - 0.1) < 0.01 and abs(prices.cost(4) - 1.6) < 0.01
    assert prices.cost(1) < prices.cost(2) < prices.cost(4) < prices.cost(5)
    assert worth_of([0.3], prices.cost) == 1 and worth_of([0.3], lambda units: 0.3 * units) == 0


def test_what_cannot_be_asked_for():
    assert speculation_of("off").most == 0
    assert speculation_of("auto").adapts
    assert speculation_of(3) == speculation_of("3") == Speculation(3)
    for asked in ("on", "-1", -1, "1.5", "0", "257", "9" * 5000):
        with pytest.raises(UsageError):
            speculation_of(asked)


@pytest.mark.parametrize("patch_size", [4, 3, 6])
@pytest.mark.parametrize("layout", ["prefix", "megabyte_pytorch"])
def test_a_model_drafts_whatever_its_patches_are(random_network, small_sizes, layout, patch_size, exact_rows):
    network = random_network(MegaByteConfig(**small_sizes))
    other = random_network(MegaByteConfig(**{**small_sizes, "patch_size": patch_size, "layout": layout, "byte_dim": 16}))
    requests = mixed(10, seed=7)
    expected = run(scheduler_of(network, LIMITS), requests, at_random(10))
    asked = [replace(each, speculation=Speculation(2)) for each in requests]
    found = run(scheduler_of(network, LIMITS, draft_source=drafts_of(other)), asked, at_random(10))
    assert_same(found, expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("layout", ["prefix", "megabyte_pytorch"])
def test_a_model_drafts_for_itself_what_it_would_draw(random_network, small_sizes, layout, temperature, exact_rows):
    network = random_network(MegaByteConfig(**{**small_sizes, "layout": layout, "byte_dim": 16, "token_shift": True}))
    request = Request(b"some words", Stopping(60), Sampling(temperature, seed=3))
    (expected,) = run(scheduler_of(network), [request])
    scheduler = scheduler_of(network, draft_source=drafts_of(network))
    scheduler.admit(replace(request, speculation=Speculation(3)))
    data, told = b"", None
    while scheduler.running or scheduler.waiting:
        for piece in scheduler.advance():
            data, told = data + piece.data, piece.speculated or told
    assert data == expected.data
    assert told.accepted_bytes == told.drafted_bytes > 40


def test_what_cannot_draft_says_so(each_continuing):
    if each_continuing.config.model_type != "megabyte":
        with pytest.raises(UsageError, match="MegaByte"):
            drafts_of(each_continuing)


@pytest.mark.parametrize("wrong_every", [0, 5])
def test_what_is_kept_of_a_drafted_stream_is_what_it_wrote(each_config, random_network, wrong_every, exact_rows):
    network = random_network(each_config)
    store = PromptStore(kind_of(network), None, StoreLimits(fewest_rows=1))
    request = Request(b"a beginning", Stopping(45), Sampling(0.9, seed=1))
    (plain,) = run(scheduler_of(network), [request])
    drafted_too = replace(request, speculation=Speculation(3, prediction=plain.data))
    scheduler = StreamScheduler(network, streams_of(network, CacheBits(), store), LIMITS, draft_source=sources(wrong_every))
    (found,) = run(scheduler, [drafted_too])
    assert found.data == plain.data
    text = request.prompt + plain.data
    beginning = store.restore(text + bytes(20))
    assert beginning is not None
    assert beginning.units * network.config.patch_size >= len(text) - 2 * network.config.patch_size
    further = Request(text, Stopping(20), Sampling(0.9, seed=2))
    (again,) = run(scheduler_of(network, keeper=store), [further])
    (anew,) = run(scheduler_of(network), [further])
    assert again.data == anew.data
