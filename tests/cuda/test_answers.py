"""A decoder's steps in one launch against the network's own layers: on a GPU where there is one, else in the emulator."""

import mlx.core as mx
import numpy as np
import pytest
from cuda_emulator import compiler, emulate
from mlx.utils import tree_map

from marlin_cli.engine import answering, cuda_answers, encoder_decoder
from marlin_cli.engine.answer_requests import AnswerLimits
from marlin_cli.engine.answering import answer
from marlin_cli.engine.cuda_answers import CudaAnswers
from marlin_cli.engine.encoder_decoder import AnswerState, GraphAnswers
from marlin_cli.engine.sampling import Sampling
from marlin_cli.errors import CheckpointError
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.ops import cuda_answers as on_device
from marlin_cli.ops import cuda_stages
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import QuantizationSettings

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(compiler() is None, reason="no C++ compiler on Linux here")]
SMALL = {"d_model": 64, "ffn_dim": 96, "heads": 2, "head_dim": 32, "encoder_layers": 1, "decoder_layers": 2,
         "relative_buckets": 8, "relative_distance": 6}  # fmt: skip
LIMITS = AnswerLimits(12)
SOURCES = [[5, 90, 200, 7, 8, 9, 10, 11, 12, 1], [30, 31, 1], [100, 4, 4, 60, 70, 1]]


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate(monkeypatch)
    monkeypatch.setattr(encoder_decoder, "fuse_byt5", lambda network: None)
    monkeypatch.setattr(answering, "fuse_answers", lambda network: None)


def network_of(format=None, dtype=mx.float32, **options):
    mx.random.seed(0)
    network = ByT5(ByT5Config(**{**SMALL, **options}))
    draw = lambda a: mx.random.normal(a.shape) * (0.5 if a.ndim == 1 or min(a.shape) < 32 else a.shape[-1] ** -0.5)  # noqa: E731
    network.update(tree_map(draw, network.parameters()))
    if format is not None:
        group = 32 if format.startswith("int") else None
        settings = QuantizationSettings(
            encoder_format=format, decoder_format=format, cross_format=format, wo_format="mxfp8", group_size=group
        )
        network = quantize_network(network, settings, method="rtn").network
    network.set_dtype(dtype)
    mx.eval(network.parameters())
    return network


def both(network, sources, limits=LIMITS, sampling=None, **options):
    """What decoding gives by whole steps, and operation by operation."""
    outcomes = []
    for whole in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not whole:
                patch.setattr(encoder_decoder, "cuda_answers", lambda network, memory, answers: None)
            outcomes.append([each for news in answer(network, sources, limits, sampling, **options) for each in news])
    return outcomes


def alike(outcomes):
    """The same ids in the same order, and scores that differ by roundings."""
    (first, second), scores = outcomes, []
    for one, other in zip(first, second, strict=True):
        assert one[0] == other[0]
        if isinstance(one[1], int):
            assert one[1] == other[1]
        else:
            scores.append((one[1].score, other[1].score))
            assert (one[1].ids, one[1].stop_reason) == (other[1].ids, other[1].stop_reason)
    assert scores and all(abs(a - b) < 1e-3 * max(1, abs(b)) for a, b in scores)


CASES = [
    ("nvfp4", 16, 3, {}), (None, 4, 1, {"gated_ffn": False, "activation": "relu"}),
    (None, 8, 2, {"tied_head": True, "scaled_head": True}), ("mxfp8", 16, 9, {}), ("int4", 8, 1, {"activation": "silu"}),
    ("int8", 4, 2, {"activation": "gelu"}), ("mxfp4", 16, 17, {}),
]  # fmt: skip
EACH_CASE = pytest.mark.parametrize(
    ("format", "bits", "inputs", "options"),
    [pytest.param(*case, marks=[] if case in CASES[:1] or mx.cuda.is_available() else pytest.mark.slow) for case in CASES],
)


@EACH_CASE
@pytest.mark.parametrize(("dtype", "looks"), [(mx.float32, 50_000), (mx.bfloat16, 0)], ids=["float32", "bfloat16"])
def test_steps(format, bits, inputs, options, dtype, looks, monkeypatch):
    """Logits of what follows ids that are pushed, and inputs of unequal lengths; with values looked at and with barriers."""
    monkeypatch.setattr(cuda_stages, "MOST_LOOKS", looks)
    monkeypatch.setattr(cuda_stages, "MOST_BROUGHT", looks)
    monkeypatch.setattr(cuda_stages, "NARROW", 0)
    network = network_of(format, dtype, **options)
    sources = [SOURCES[i % 3] for i in range(inputs)]
    state = AnswerState(network, sources, memory_bits=bits)
    assert isinstance(state._answers, CudaAnswers)
    graph = AnswerState.__new__(AnswerState)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_decoder, "cuda_answers", lambda network, memory, answers: None)
        graph = AnswerState(network, sources, memory_bits=bits)
    assert isinstance(graph._answers, GraphAnswers)
    assert state.memory_bytes == graph.memory_bytes
    rng = np.random.default_rng(1)
    for _ in range(3):
        ids = rng.integers(3, 259, inputs)
        found, expected = np.array(state.logits), np.array(graph.logits)
        assert np.isfinite(found).all()
        assert np.abs(found - expected).max() <= (3e-5 if dtype == mx.float32 else 5e-2) * np.abs(expected).max()
        state.push(ids.tolist())
        graph.push(ids.tolist())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.1, top_k=60, top_p=0.9, min_p=0.01, seed=3),
        pytest.param(Sampling(), marks=pytest.mark.slow),
        pytest.param(Sampling(1.0), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_answers_are_those_of_operations(sampling, monkeypatch):
    """Prefixes, ends barred at first, stop sequences, answers that end before others; more rows than there is room."""
    monkeypatch.setattr(on_device, "ROOM", 4)
    ends = {"answer_end_ids": tuple(range(0, 40))}  # some id is an end soon
    network = network_of("mxfp8", **ends)
    outcomes = both(network, SOURCES, AnswerLimits(24, min_length=3, prefix=b"0123456789a"), sampling)
    alike(outcomes)
    if sampling.temperature:
        assert len({len(each.ids) for _, each in outcomes[0] if not isinstance(each, int)}) > 1
    longest = max((each for _, each in outcomes[0] if not isinstance(each, int)), key=lambda each: len(each.ids))
    stop = longest.data[-3:-1]
    if stop:
        alike(both(network, SOURCES, AnswerLimits(24, min_length=3, prefix=b"0123456789a", stop=(stop,)), sampling))


@pytest.mark.slow
def test_groups_of_answers(monkeypatch):
    """More answers than one launch takes, and a group that ends before the others."""
    monkeypatch.setattr(cuda_answers, "MOST_STREAMS", 2)
    network = network_of("mxfp8", answer_end_ids=tuple(range(0, 120)))
    alike(both(network, SOURCES + SOURCES[:2], AnswerLimits(16, min_length=1)))


def test_what_is_no_number_is_an_error():
    network = network_of("mxfp8")
    network.decoder.norm.weight = network.decoder.norm.weight * mx.nan
    with pytest.raises(CheckpointError, match="not finite"):
        list(answer(network, SOURCES, AnswerLimits(8)))


def test_what_is_left_to_operations(monkeypatch):
    network = network_of()
    assert isinstance(AnswerState(network, SOURCES)._answers, CudaAnswers)
    assert isinstance(AnswerState(network, SOURCES, answers=2)._answers, GraphAnswers)
    assert isinstance(AnswerState(network, SOURCES * 22)._answers, GraphAnswers)
    assert isinstance(AnswerState(network_of(dtype=mx.float16), SOURCES)._answers, GraphAnswers)
    assert isinstance(AnswerState(network_of(head_dim=24), SOURCES)._answers, GraphAnswers)
    monkeypatch.setenv("MARLIN_PATCHES", "operations")
    assert isinstance(AnswerState(network, SOURCES)._answers, GraphAnswers)
