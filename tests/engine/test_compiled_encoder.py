"""ByT5's encoder as compiled graphs gives what the network gives, and notices other weights."""

import copy

import mlx.core as mx
import pytest

from marlin_cli.engine import compiled_encoder
from marlin_cli.engine.compiled_encoder import CompiledEncoder
from marlin_cli.engine.cuda_layers import prepared
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.byt5_config import ByT5Config

SMALL = {"d_model": 32, "ffn_dim": 48, "heads": 2, "head_dim": 16, "encoder_layers": 2, "decoder_layers": 1}


@pytest.fixture
def network():
    mx.random.seed(0)
    made = ByT5(ByT5Config(**SMALL))
    mx.eval(made.parameters())
    return made


def near(found, expected):
    assert found.shape == expected.shape
    assert mx.abs(found - expected).max().item() < 1e-4


@pytest.mark.parametrize("lengths", [None, [5, 3]])
def test_states_and_memory_are_the_networks(network, lengths):
    ids = mx.array([[5, 6, 7, 8, 1], [9, 10, 1, 0, 0]])
    real = None if lengths is None else mx.array(lengths)
    states = CompiledEncoder(network).encode(ids, real)
    expected = network.encode(ids, real)
    for row in range(2):
        count = 5 if lengths is None else lengths[row]
        near(states[row, :count], expected[row, :count])
    for found, plain in zip(CompiledEncoder(network).memory(expected, real), network.memory(expected, real), strict=True):
        near(found.keys, plain.keys)
        near(found.values, plain.values)
        assert (found.lengths is None) == (lengths is None)


def test_other_weights_are_noticed(network):
    """Graphs are kept with the network, and traced anew for other weights or after many shapes."""
    ids = mx.array([[5, 6, 1]])
    before = CompiledEncoder(network).encode(ids, None)
    kept = vars(network)["_graphs"]
    CompiledEncoder(network).encode(ids, None)
    assert vars(network)["_graphs"] is kept
    network.embedding.weight = network.embedding.weight * 2 + 1
    after = CompiledEncoder(network).encode(ids, None)
    near(after, network.encode(ids))
    assert mx.abs(after - before).max().item() > 1e-3


def test_shapes_do_not_pile_up(network, monkeypatch):
    monkeypatch.setattr(compiled_encoder, "MOST_SHAPES", 2)
    for count in range(1, 6):
        CompiledEncoder(network).encode(mx.ones((1, count), dtype=mx.int32), None)
        assert len(vars(network)["_graphs"].shapes) <= 2


def test_what_is_prepared_is_kept_while_weights_are_the_same(network):
    made = []

    def make():
        made.append(1)
        return object()

    first = prepared(network, [network.decoder], make)
    assert prepared(network, [network.decoder], make) is first and len(made) == 1
    network.decoder.norm.weight = network.decoder.norm.weight + 1
    assert prepared(network, [network.decoder], make) is not first and len(made) == 2
    assert "_prepared" not in dict(network.parameters())


def test_a_copy_of_the_network_begins_anew(network):
    CompiledEncoder(network).encode(mx.array([[5, 1]]), None)
    prepared(network, [network.decoder], object)
    other = copy.deepcopy(network)
    assert vars(other)["_graphs"] is None and vars(other)["_prepared"] is None
    near(CompiledEncoder(other).encode(mx.array([[5, 1]]), None), network.encode(mx.array([[5, 1]])))
