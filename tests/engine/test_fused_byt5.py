"""ByT5's stacks in one call: equal to the graph of operations, dense and packed, ragged, over steps and under beams."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from marlin_cli.engine import encoder_decoder
from marlin_cli.engine.answer_requests import AnswerLimits
from marlin_cli.engine.answering import answer_with_beams
from marlin_cli.engine.beams import Beams
from marlin_cli.engine.encoder_decoder import AnswerState
from marlin_cli.engine.fused_byt5 import FusedAnswers, fuse_byt5
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.models.byt5_ids import padded
from marlin_cli.ops import cpu
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.formats import FORMATS
from marlin_cli.quantization.plan import QuantizationSettings

pytestmark = pytest.mark.skipif(cpu.kernels()[0] is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")

SMALL = {
    "d_model": 64, "ffn_dim": 96, "heads": 2, "head_dim": 32, "encoder_layers": 3, "decoder_layers": 2,
    "relative_buckets": 8, "relative_distance": 16,
}  # fmt: skip
SHAPES = {
    "gated": {},
    "relu, tied and scaled": {"activation": "relu", "gated_ffn": False, "tied_head": True, "scaled_head": True},
    "silu, wide heads": {"activation": "silu", "heads": 3},
    "pooling": {"downsample_factor": 4, "local_window": 5},
}
SOURCES = [list(range(3, 43)), [5, 1], list(range(60, 30, -1))]


def random_byt5(**changes):
    network = ByT5(ByT5Config(**{**SMALL, **changes}))
    mx.random.seed(1)
    network.update(
        tree_map(lambda a: mx.random.normal(a.shape) * (0.5 if a.ndim == 1 else a.shape[-1] ** -0.5), network.parameters())
    )
    for layer in network.decoder.layers:
        layer.cross.o_proj.weight = layer.cross.o_proj.weight * 8  # or all inputs would have one answer
    return network


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def network(request):
    return random_byt5(**request.param)


def both(run, monkeypatch):
    """What `run()` returns with the fused stacks, and with the graph."""
    fused = run()
    with monkeypatch.context() as patch:
        patch.setattr(encoder_decoder, "fuse_byt5", lambda network: None)
        return fused, run()


def steps_of(network, sources, ids, *, answers=1, bits=16, reorder=None):
    """Logits [steps, inputs x answers, vocab] of feeding `ids` [steps, inputs x answers]."""
    state = AnswerState(network, sources, answers=answers, memory_bits=bits)
    rows = [np.array(state.logits)]
    for step, values in enumerate(ids):
        if reorder is not None and step == len(ids) // 2:
            state.keep(*reorder)
        state.push(mx.array(values[: state.logits.shape[0]]))
        rows.append(np.array(state.logits))
    return rows


def close(first, second, tolerance=2e-5):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() < tolerance * np.abs(other).max()


def random_ids(steps, count):
    return np.random.default_rng(0).integers(0, 384, (steps, count)).astype(np.int32)


@pytest.mark.parametrize("sources", [SOURCES[:1], SOURCES], ids=["one", "ragged"])
def test_steps_equal_the_graph(network, sources, monkeypatch):
    """Beyond a page of the cache, and beyond the distances of the relative bias."""
    ids = random_ids(70, len(sources))
    close(*both(lambda: steps_of(network, sources, ids), monkeypatch))


def test_states_equal_the_graph(network):
    fused = fuse_byt5(network)
    for sources in ([SOURCES[0]], SOURCES, [[7] * 300, [9] * 280]):
        ids, lengths = padded(sources, 0)
        found, expected = np.array(fused.encode(ids, lengths)), np.array(network.encode(ids, lengths))
        for row, source in enumerate(sources):
            real = expected[row, : len(source)]
            assert np.abs(found[row, : len(source)] - real).max() < 2e-5 * np.abs(real).max()


@pytest.mark.parametrize("format", FORMATS.keys())
def test_packed_weights_equal_the_graph(format, monkeypatch):
    settings = QuantizationSettings(encoder_format=format, decoder_format=format, cross_format=format)
    packed = quantize_network(random_byt5(), settings).network
    close(*both(lambda: steps_of(packed, SOURCES, random_ids(5, 3)), monkeypatch), tolerance=1e-4)


def test_answers_move_and_inputs_leave(network, monkeypatch):
    """As beams do: 5 answers each, which take each other's place; the second input is done."""
    reorder = [1, 1, 0, 4, 2, 12, 11, 11, 14, 10], [0, 2]
    run = lambda: steps_of(network, SOURCES, random_ids(8, 15), answers=5, reorder=reorder)  # noqa: E731
    close(*both(run, monkeypatch))


def test_beams_equal_the_graph(network, monkeypatch):
    run = lambda: answer_with_beams(network, SOURCES, AnswerLimits(12), Beams(4, answers=3))  # noqa: E731
    fused, graph = both(run, monkeypatch)
    assert [[each.ids for each in answers] for answers in fused] == [[each.ids for each in answers] for answers in graph]
    assert len({answers[0].ids for answers in fused}) > 1


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.05), (4, 0.3)])
def test_a_packed_memory_is_as_close_as_that_of_the_graph(bits, tolerance, monkeypatch):
    network = random_byt5()
    exact = np.array(steps_of(network, SOURCES, random_ids(5, 3)))
    found, graph = (
        np.array(each) for each in both(lambda: steps_of(network, SOURCES, random_ids(5, 3), bits=bits), monkeypatch)
    )
    errors = [np.sqrt(((each - exact) ** 2).mean()) / exact.std() for each in (found, graph)]
    assert 0 < errors[0] < tolerance and errors[0] < 1.5 * errors[1]


def test_the_bytes_of_a_memory(monkeypatch):
    network = random_byt5()
    for bits, bytes_a_row in ((16, 4 * 32), (8, 32 + 1), (4, 16 + 2)):
        state = AnswerState(network, [SOURCES[0]] * 2, memory_bits=bits)
        assert isinstance(state._answers, FusedAnswers)
        assert state.memory_bytes == 2 * 2 * 2 * 2 * 40 * bytes_a_row  # layers, keys and values, inputs, heads, rows


def test_a_long_input_in_parts(monkeypatch):
    """More rows than a product takes at once."""
    network = random_byt5()
    ids = mx.array(np.random.default_rng(0).integers(3, 259, (1, 2300)))
    found, expected = np.array(fuse_byt5(network).encode(ids)), np.array(network.encode(ids))
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


def test_a_layer_of_another_kind_stays_with_the_graph():
    network = random_byt5()
    assert fuse_byt5(network) is not None
    network.decoder.layers[0].cross.q_proj = nn.Linear(64, 64)
    assert fuse_byt5(network) is None
    network = random_byt5()
    network.update(tree_map(lambda a: a.astype(mx.bfloat16), network.parameters()))
    assert fuse_byt5(network) is None
