"""Inputs that are answered side by side as they come: each as if it were alone, whatever stands beside it."""

import random
from dataclasses import replace

import mlx.core as mx
import pytest
from byt5_cases import KINDS, random_byt5
from decoder_cases import random_gbst

from marlin_cli.engine import answer_scheduler, answering
from marlin_cli.engine.answer_requests import AnswerLimits, AnswerPiece, AnswerRequest
from marlin_cli.engine.answer_scheduler import AnsweringScheduler
from marlin_cli.engine.answering import answer, answer_with_beams
from marlin_cli.engine.beams import Beams
from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.schedulers import scheduler_of
from marlin_cli.engine.scheduling import NOT_FINITE, SchedulerLimits
from marlin_cli.engine.speculation import AUTO, Speculation
from marlin_cli.errors import UsageError
from marlin_cli.models.byt5_ids import FIRST_BYTE, ids_of_bytes
from marlin_cli.ops import cpu, round_activations
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import QuantizationSettings

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
    return request.param


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


@pytest.mark.parametrize("slice_rows", [1, 8, 1000])
def test_requests_that_come_at_random_are_answered_as_alone(network, way, slice_rows):
    rng = random.Random(5)
    requests = [random_request(rng) for _ in range(60 if way == "kernels" else 25)]
    limits = SchedulerLimits(max_streams=6, cache_bytes=400_000, slice_rows=slice_rows)
    scheduler = AnsweringScheduler(network, limits)
    together = [told(each) for each in ran(scheduler, requests, rng)]
    assert together == [told(ran(AnsweringScheduler(network), [each])[0]) for each in requests]
    assert len({data for data, _, _ in together}) > len(together) // 3
    assert way == "graph" or {reason for _, reason, _ in together} >= {"stop", "length"}
    assert scheduler.cache_bytes == scheduler.running == scheduler.waiting == 0


@pytest.mark.skipif(cpu.kernels()[0] is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")
@pytest.mark.parametrize("format", [None, "nvfp4", "int8"])
def test_hundreds_of_requests_with_packed_weights_twice(format):
    network = random_byt5(**SHAPE, d_model=64, ffn_dim=128)
    if format is not None:
        settings = QuantizationSettings(**{f"{part}_format": format for part in ("encoder", "decoder", "cross", "wo")})
        network = quantize_network(network, settings).network
        round_activations(network, 8)
    rng = random.Random(9)
    requests = [random_request(rng) for _ in range(500)]
    alone = [told(ran(AnsweringScheduler(network), [each])[0]) for each in requests]
    for _ in range(2):
        scheduler = AnsweringScheduler(network, SchedulerLimits(max_streams=24, slice_rows=16))
        assert [told(each) for each in ran(scheduler, requests, rng)] == alone


def test_several_bytes_that_make_a_row_and_slices_of_the_front_end(way):
    network = random_gbst(head_dim=32)
    rng = random.Random(7)
    requests = [random_request(rng) for _ in range(20)]
    together = [told(each) for each in ran(AnsweringScheduler(network, SchedulerLimits(5, slice_rows=4)), requests, rng)]
    assert together == [told(ran(AnsweringScheduler(network), [each])[0]) for each in requests]


def test_answers_are_those_of_inputs_in_step(network, way, monkeypatch):
    """By another way through the same network: padded, all at the same place."""
    rng = random.Random(1)
    prompts = [bytes(rng.randrange(256) for _ in range(rng.randint(0, 40))) for _ in range(7)]
    sources = [[*ids_of_bytes(prompt), 1] for prompt in prompts]
    limits = AnswerLimits(12, 4, prefix=b"p")
    monkeypatch.setattr(answering, "fuse_answers", lambda network: None)
    for sampling in (Sampling(), Sampling(0.9, top_k=9, seed=4)):
        found = ran(AnsweringScheduler(network), [AnswerRequest(prompt, limits, sampling) for prompt in prompts])
        in_step = {s: new for step in answer(network, sources, limits, sampling) for s, new in step if not isinstance(new, int)}
        for stream, pieces in enumerate(found):
            assert pieces[-1].answers[0].ids == in_step[stream].ids
            assert pieces[-1].answers[0].score == pytest.approx(in_step[stream].score, rel=1e-4)
            assert b"".join(piece.data for piece in pieces) == in_step[stream].data
    beams = Beams(3, answers=2, length_penalty=0.7)
    found = ran(AnsweringScheduler(network), [AnswerRequest(prompt, limits, beams=beams) for prompt in prompts])
    for pieces, expected in zip(found, answer_with_beams(network, sources, limits, beams), strict=True):
        assert [each.ids for each in pieces[-1].answers] == [each.ids for each in expected]
        assert len(pieces) == 1 and pieces[0].data == expected[0].data


def test_what_runs_goes_on_while_an_input_enters(way):
    network = random_byt5(**SHAPE)
    scheduler = AnsweringScheduler(network, SchedulerLimits(slice_rows=16))
    first = scheduler.admit(AnswerRequest(b"ab", AnswerLimits(40, 40), sentinels=True))
    while not scheduler.news():
        pass
    scheduler.admit(AnswerRequest(bytes(range(200)), AnswerLimits(2, 2)))
    written = 0
    while all(new.stream == first for new in scheduler.news()):
        written += 1
    assert written >= (8 if way == "kernels" else 1)  # a step between any two slices of 16 rows of 200, or of a layer of two


def test_short_inputs_enter_together(way):
    scheduler = AnsweringScheduler(random_byt5(**SHAPE), SchedulerLimits(slice_rows=1000))
    numbers = [scheduler.admit(AnswerRequest(b"abc", AnswerLimits(4, 4), sentinels=True)) for _ in range(5)]
    assert (scheduler.running, scheduler.waiting) == (0, 5)
    assert [new.stream for new in scheduler.news()] == numbers
    assert (scheduler.running, scheduler.waiting) == (5, 0)


@pytest.mark.parametrize("beams", [None, Beams(3)])
def test_release_in_each_state(way, beams):
    """Waiting, entering (alone, first, in the middle), deciding, ended: what is left has the answers that it has alone."""
    network = random_byt5(**SHAPE)
    prompts = [bytes([65 + n]) * (n + 1) for n in range(5)]
    requests = [AnswerRequest(prompt, AnswerLimits(6, 6), beams=beams) for prompt in prompts]
    alone = [told(ran(AnsweringScheduler(network), [each])[0]) for each in requests]
    for steps in range(0, 12, 1 if way == "kernels" else 3):
        for gone in ([0], [1, 3], [4], [0, 1, 2, 3]):
            scheduler = AnsweringScheduler(network, SchedulerLimits(max_streams=4, slice_rows=10))
            numbers = [scheduler.admit(each) for each in requests]
            pieces = {number: [] for number in numbers}
            for step in range(40):
                for number in gone if step == steps else []:
                    scheduler.release(number)
                for piece in scheduler.advance():
                    assert step < steps or piece.stream not in gone
                    pieces[piece.stream].append(piece)
            assert scheduler.running == scheduler.waiting == scheduler.cache_bytes == 0
            for number in numbers:
                if number not in gone:
                    assert told(pieces[number]) == alone[number]
    scheduler.release(numbers[0])  # one that is gone is not missed


def test_all_that_enter_may_go(way):
    scheduler = AnsweringScheduler(random_byt5(**SHAPE), SchedulerLimits(slice_rows=1))
    number = scheduler.admit(AnswerRequest(bytes(100)))
    scheduler.advance()
    assert scheduler.running == 1
    scheduler.release(number)
    assert scheduler.running == scheduler.waiting == 0 and scheduler.advance() == []


def test_the_caches_stay_within_their_bytes(way):
    network = random_byt5(**SHAPE)
    request = AnswerRequest(b"0123456789", AnswerLimits(70, 70))
    # 2 layers, keys and values, 2 heads, 32 channels: 11 states and 128 rows (two pages) of 4 bytes.
    needs = 2 * 2 * 2 * 32 * 4 * (11 + 128)
    with pytest.raises(UsageError, match=rf"an input of 11 ids .* up to 70 may need {needs:,} bytes .* \({needs - 1:,}\)"):
        AnsweringScheduler(network, SchedulerLimits(cache_bytes=needs - 1)).admit(request)
    scheduler = AnsweringScheduler(network, SchedulerLimits(cache_bytes=2 * needs + 5000))
    small = replace(request, prompt=b"", limits=AnswerLimits(2), memory_bits=4)
    numbers = [scheduler.admit(each) for each in (request, request, request, small)]
    order, most = [], 0
    while scheduler.running or scheduler.waiting:
        order += [piece.stream for piece in scheduler.advance() if piece.stop_reason is not None]
        most = max(most, scheduler.cache_bytes)
        assert scheduler.running <= 2
    assert order[:2] == numbers[:2], "the third waits for room, and the small one behind it for its turn"
    assert needs < most <= 2 * needs
    assert scheduler.cache_bytes == 0


def test_packed_memories_take_fewer_bytes(way):
    network = random_byt5(**SHAPE)
    taken = []
    for bits in (16, 8, 4):
        scheduler = AnsweringScheduler(network)
        scheduler.admit(AnswerRequest(bytes(49), AnswerLimits(3, 3), memory_bits=bits))
        scheduler.advance()
        taken.append(scheduler.cache_bytes - 2 * 2 * 2 * 32 * 4)  # but for the row of the start
    assert taken == [2 * 2 * 2 * 50 * row for row in (128, 33, 18)]


def test_costs_stand_beside_the_bytes_that_they_are_of(way):
    network = random_byt5(**SHAPE)
    request = AnswerRequest(b"what", AnswerLimits(12, 12, prefix=b"p"), logprobs=3)
    plain = ran(AnsweringScheduler(network), [request])[0]
    costs = [cost for piece in plain for cost in piece.costs]
    data = b"".join(piece.data for piece in plain)
    assert data[:1] == b"p" and [cost.id - 3 for cost in costs] == list(data[1:])
    for cost in costs:
        likeliest = [score for _, score in cost.likeliest]
        assert len(likeliest) == 3 and likeliest == sorted(likeliest, reverse=True)
        assert cost.id not in (1,) and (cost.id, pytest.approx(cost.log_probability)) in cost.likeliest
    mean = sum(cost.log_probability for cost in costs) / max(1, len(costs))
    assert mean == pytest.approx(plain[-1].answers[0].score, rel=1e-5) or len(costs) < 12
    # What is held back has its costs held back.
    stop = data[3:5] + bytes([data[5] ^ 1])
    held = ran(AnsweringScheduler(network), [replace(request, limits=replace(request.limits, stop=(stop,)))])[0]
    assert [len(piece.costs) for piece in held[1:]] == [len(piece.data) for piece in held[1:]]
    assert [cost for piece in held for cost in piece.costs] == costs
    assert [len(piece.data) for piece in held] != [len(piece.data) for piece in plain]


def test_an_answer_of_no_length_needs_no_place(way):
    scheduler = AnsweringScheduler(random_byt5(**SHAPE), SchedulerLimits(max_streams=1))
    for beams in (None, Beams(2)):
        number = scheduler.admit(AnswerRequest(b"x", AnswerLimits(0, prefix=b"yz"), beams=beams))
        assert (scheduler.running, scheduler.waiting) == (0, 1)
        (piece,) = scheduler.advance()
        assert (piece.stream, piece.data, piece.stop_reason) == (number, b"yz", "length")
        assert scheduler.waiting == 0


def test_a_stream_without_numbers_ends_and_its_neighbours_go_on(way, monkeypatch):
    network = random_byt5(**SHAPE)
    requests = [AnswerRequest(b"ab", AnswerLimits(5, 5)), AnswerRequest(b"cd", AnswerLimits(5, 5), beams=Beams(2))]
    alone = [told(ran(AnsweringScheduler(network), [each])[0]) for each in requests]
    network.embedding.weight[FIRST_BYTE + 0xFF] = mx.nan
    spoiled = [replace(each, limits=replace(each.limits, prefix=b"\xff")) for each in requests]
    found = ran(AnsweringScheduler(network), [*spoiled, *requests])
    assert [pieces[-1].stop_reason for pieces in found] == [NOT_FINITE, NOT_FINITE, "length", "length"]
    assert all(pieces[-1].answers == () for pieces in found[:2])
    assert [told(pieces) for pieces in found[2:]] == alone


def test_what_cannot_be_answered(way):
    network = random_byt5(**SHAPE, max_bytes=8)
    scheduler = AnsweringScheduler(network)
    with pytest.raises(UsageError, match="9 bytes do not fit the model's max_bytes of 8"):
        scheduler.admit(AnswerRequest(bytes(9)))
    with pytest.raises(UsageError, match="--kv-bits must be 4, 8 or 16, found 5"):
        scheduler.admit(AnswerRequest(b"", memory_bits=5))
    assert scheduler.waiting == 0
    with pytest.raises(UsageError, match="an encoder alone and cannot answer"):
        AnsweringScheduler(random_byt5(**SHAPE, decoder_layers=0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beams": Beams(2), "sampling": Sampling(1.0)}, "beams and a temperature do not go together"),
        ({"beams": Beams(2), "limits": AnswerLimits(stop=(b"x",))}, "stop sequences do not go with beams"),
        ({"beams": Beams(2), "logprobs": 0}, "logprobs do not go with beams"),
        ({"logprobs": -1}, "logprobs must be 0 or more, found -1"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(UsageError, match=message):
        AnswerRequest(b"", **settings)


def test_it_is_the_scheduler_of_its_networks():
    network = random_byt5(**SHAPE)
    assert isinstance(scheduler_of(network), AnsweringScheduler)
    assert isinstance(scheduler_of(random_gbst()), AnsweringScheduler)
    taken = []
    for bits, request in ((4, AnswerRequest(b"x")), (16, AnswerRequest(b"x", memory_bits=4)), (16, AnswerRequest(b"x"))):
        scheduler = scheduler_of(network, None, CacheBits(bits, bits))
        scheduler.admit(request)
        scheduler.advance()
        taken.append(scheduler.cache_bytes)
    assert taken[0] == taken[1] < taken[2], "bits are the scheduler's, or the request's own"
    with pytest.raises(UsageError, match="one width"):
        scheduler_of(network, None, CacheBits(4, 8))


@pytest.mark.skipif(cpu.kernels()[0] is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")
@pytest.mark.parametrize("wrong_every", [0, 3, 1], ids=["right", "sometimes wrong", "wrong"])
def test_answers_that_are_drafted_are_those_that_are_not(network, wrong_every):
    rng = random.Random(wrong_every)
    requests = [random_request(rng) for _ in range(40)]
    requests = [replace(each, limits=replace(each.limits, max_length=2 * each.limits.max_length)) for each in requests]
    limits = SchedulerLimits(max_streams=6, slice_rows=8)
    plain = ran(AnsweringScheduler(network, limits), requests)
    asked = []
    for request, pieces in zip(requests, plain, strict=True):
        data = b"".join(each.data for each in pieces)[len(request.limits.prefix) :]
        guess = bytes(byte ^ (wrong_every > 0 and rng.randrange(wrong_every) == 0) for byte in data)
        most = rng.choice([1, 3, 7]) if request.beams is None else 0
        asked.append(replace(request, speculation=Speculation(most, prediction=guess)))
    found = ran(AnsweringScheduler(network, limits), asked, rng)
    assert [told(each) for each in found] == [told(each) for each in plain]
    drafts = [each[-1].speculated for each in found if each[-1].speculated is not None]
    assert len(drafts) == sum(request.beams is None and request.limits.max_length > 0 for request in requests)
    drafted, accepted = (sum(getattr(each, name) for each in drafts) for name in ("drafted_bytes", "accepted_bytes"))
    assert {0: accepted > 0.5 * drafted, 3: 0 < accepted < drafted, 1: accepted < drafted}[wrong_every]
    assert wrong_every or sum(each.passes for each in drafts) < sum(len(data) for data, _, _ in map(told, plain))


def test_an_input_is_a_draft_of_its_answer(network):
    """Nothing is known of what random weights answer, so that what is drafted is wrong, and nothing changes."""
    request = AnswerRequest(b"some input that is read", AnswerLimits(30, 30))
    drafted = replace(request, speculation=AUTO)
    (plain,), (found,) = (ran(AnsweringScheduler(network), [each]) for each in (request, drafted))
    assert told(found) == told(plain)


def test_beams_are_not_drafted(network, way):
    beams = AnswerRequest(b"abc", AnswerLimits(9), beams=Beams(2))
    assert told(ran(AnsweringScheduler(network), [replace(beams, speculation=AUTO)])[0])
    with pytest.raises(UsageError, match="beams"):
        replace(beams, speculation=Speculation(2))
    if way == "graph":
        with pytest.raises(UsageError, match="kernels verify drafts"):
            AnsweringScheduler(network).admit(AnswerRequest(b"abc", speculation=Speculation(2)))
