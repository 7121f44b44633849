"""ByT5's step as one compiled graph: the logits of decoding operation by operation. Its kernels have tests of their own."""

import mlx.core as mx
import numpy as np
import pytest
from byt5_cases import random_byt5

from marlin_cli.engine import encoder_decoder
from marlin_cli.engine.answer_requests import AnswerLimits
from marlin_cli.engine.answering import answer
from marlin_cli.engine.compiled_answers import TAIL_ROWS, CompiledAnswers
from marlin_cli.engine.encoder_decoder import AnswerState, GraphAnswers
from marlin_cli.engine.fused_byt5 import SELF_CACHE_ROWS
from marlin_cli.engine.sampling import Sampling
from marlin_cli.ops.metal_few_rows import MOST_STREAMS
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import QuantizationSettings

SHAPES = {
    "gated": {},
    "relu, tied and scaled": {"activation": "relu", "gated_ffn": False, "tied_head": True, "scaled_head": True},
    "pooling": {"downsample_factor": 4, "local_window": 5},
}
SOURCES = [list(range(3, 43)), [5, 1], list(range(60, 30, -1))]
COMPILE = mx.compile


@pytest.fixture
def by_steps(monkeypatch):
    """Lets the step be that of Metal whatever the device is, but not compiled."""
    monkeypatch.setattr(encoder_decoder, "fuse_byt5", lambda network: None)
    monkeypatch.setattr(encoder_decoder, "gpu", lambda: "metal")
    monkeypatch.setattr(mx, "compile", lambda function: function)


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def network(request):
    return random_byt5(**request.param)


def steps(network, count, *, sources=SOURCES, bits=16, keep=None):
    """Logits of each step for ids that are given, some answers kept alone in the midst of them."""
    state = AnswerState(network, sources, memory_bits=bits)
    ids = np.random.default_rng(0).integers(3, 259, (count, len(sources)))
    rows, found = list(range(len(sources))), [np.array(state.logits)]
    for number, each in enumerate(ids):
        if keep is not None and number == count // 2:
            state.keep(keep, keep)
            rows = keep
        state.push(mx.array(each[rows]))
        found.append(np.array(state.logits))
    return state, found


def both(monkeypatch, network, count, **how):
    state, found = steps(network, count, **how)
    assert isinstance(state._answers, CompiledAnswers)
    with monkeypatch.context() as patch:
        patch.setattr(encoder_decoder, "gpu", lambda: None)
        other, expected = steps(network, count, **how)
    assert isinstance(other._answers, GraphAnswers) and state.memory_bytes == other.memory_bytes
    for one, another in zip(found, expected, strict=True):
        assert one.shape == another.shape and np.abs(one - another).max() < 2e-5 * np.abs(another).max()


def test_steps(network, by_steps, monkeypatch):
    """More of them than the tail takes."""
    both(monkeypatch, network, 2 * TAIL_ROWS + 5)


def test_more_steps_than_the_storage_had_room_for(by_steps, monkeypatch):
    both(monkeypatch, random_byt5(), SELF_CACHE_ROWS + 2 * TAIL_ROWS + 1, sources=SOURCES[1:2])


@pytest.mark.parametrize("count", [8, 2 * TAIL_ROWS + 6])
def test_answers_that_end_leave_the_others_alone(count, network, by_steps, monkeypatch):
    both(monkeypatch, network, count, keep=[2, 0])


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_memory(bits, network, by_steps, monkeypatch):
    both(monkeypatch, network, 5, bits=bits, keep=[1, 2])


def test_packed_weights(by_steps, monkeypatch):
    settings = QuantizationSettings(encoder_format="nvfp4", decoder_format="mxfp8", cross_format="int4")
    packed = quantize_network(random_byt5(d_model=64), settings).network
    both(monkeypatch, packed, 5)


@pytest.mark.slow
def test_compiled(by_steps, monkeypatch):
    """On a CPU a C++ compiler takes its time for it, so there is one of these."""
    monkeypatch.setattr(mx, "compile", COMPILE)
    both(monkeypatch, random_byt5(), TAIL_ROWS + 3, keep=[1, 2])


def test_whole_answers(network, by_steps, monkeypatch):
    def answers():
        pieces = answer(network, SOURCES, AnswerLimits(max_length=20), Sampling(1.0, top_k=30, seed=4))
        return list(pieces)

    found = answers()
    monkeypatch.setattr(encoder_decoder, "gpu", lambda: None)
    ids = [[(stream, new) for stream, new in news if isinstance(new, int)] for news in found]
    assert ids == [[(stream, new) for stream, new in news if isinstance(new, int)] for news in answers()]


def test_what_goes_operation_by_operation(by_steps, monkeypatch):
    network = random_byt5()
    assert isinstance(AnswerState(network, SOURCES, answers=2)._answers, GraphAnswers)
    assert isinstance(AnswerState(network, [[5, 1]] * (MOST_STREAMS + 1))._answers, GraphAnswers)
    monkeypatch.setenv("MARLIN_PATCHES", "operations")
    assert isinstance(AnswerState(network, SOURCES)._answers, GraphAnswers)
