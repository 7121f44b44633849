"""With exact rows, much text: the same bytes alone as in batches that change on the way."""

import random

import mlx.core as mx
import pytest
from byt5_cases import random_byt5
from packed_layers import packed
from small_networks import FIRST_DEMO

from marlin_cli import MegaByteModel
from marlin_cli.engine.answering import Answer, AnswerLimits, answer
from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.schedulers import scheduler_of
from marlin_cli.engine.scheduling import Request, SchedulerLimits
from marlin_cli.engine.stopping import Stopping
from marlin_cli.ops import cpu

MODULE = cpu.kernels()[0]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MODULE is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")]
SIZES = (2, 5, 16)


@pytest.fixture(autouse=True)
def exact_rows():
    MODULE.set_exact_rows(True)
    yield
    MODULE.set_exact_rows(cpu.rows_are_exact())


@pytest.mark.parametrize("activation_bits", [16, 8])
def test_64_kib_of_a_megabyte_are_the_same_bytes_alone_and_in_batches(activation_bits):
    """96 streams of unlike prompts, lengths and settings: as one ends, the next comes in."""
    rng = random.Random(0)
    text = bytes(range(32, 127)) * 8
    requests = [
        Request(
            text[rng.randrange(96) :][: rng.randrange(1, 600)],
            Stopping(rng.randrange(500, 880)),
            Sampling(rng.choice([0.0, 0.8, 1.0]), top_p=rng.choice([0.9, 1.0]), seed=seed),
        )
        for seed in range(96)
    ]
    network = packed(MegaByteModel.from_pretrained(FIRST_DEMO, dtype=mx.float32).network, "nvfp4", activation_bits)

    def generated(streams):
        scheduler = scheduler_of(network, SchedulerLimits(max_streams=streams), CacheBits(8, 4))
        numbers = [scheduler.admit(request) for request in requests]
        found = dict.fromkeys(numbers, b"")
        while scheduler.running or scheduler.waiting:
            for piece in scheduler.advance():
                found[piece.stream] += piece.data
        return [found[number] for number in numbers]

    alone = generated(1)
    assert sum(map(len, alone)) >= 64 << 10
    for streams in SIZES:
        assert generated(streams) == alone


@pytest.mark.parametrize("name", ["nvfp4", "int8"])
def test_200_answers_are_the_same_alone_and_in_batches(name):
    """Inputs of unlike lengths; answers end one after another, and the others go on closer together."""
    rng = random.Random(0)
    network = packed(random_byt5(d_model=64), name)
    sources = [[3 + byte for byte in rng.randbytes(rng.randrange(1, 90))] for _ in range(200)]
    limits = AnswerLimits(max_length=48, stop=tuple(bytes([byte]) for byte in range(0, 256, 16)))

    def answers(some):
        news = (new for step in answer(network, some, limits) for new in step)
        found = {stream: (one.ids, one.score, one.stop_reason) for stream, one in news if isinstance(one, Answer)}
        return [found[stream] for stream in range(len(some))]

    alone = [answers([source])[0] for source in sources]
    lengths = {len(ids) for ids, _, _ in alone}
    assert len(lengths) > 9, lengths
    for size in SIZES:
        assert [one for start in range(0, 200, size) for one in answers(sources[start : start + size])] == alone
