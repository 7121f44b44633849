"""CANINE in a few calls: equal to the graph of operations, dense and packed, padded and ragged, at the ends of blocks."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from canine_cases import batch, random_canine, random_la_canine
from packed_layers import packed

from marlin_cli.engine import characters
from marlin_cli.engine.fused_canine import FusedCanine, fuse_canine, runner_of
from marlin_cli.engine.sentences import SplitSettings, boundary_scores, ids_of_pieces
from marlin_cli.ops import cpu, round_activations
from marlin_cli.quantization.formats import FORMATS

pytestmark = pytest.mark.skipif(cpu.kernels()[0] is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")

ALONE = [((length,), length) for length in (4, 5, 7, 127, 128, 129, 131, 250)]
RAGGED = [((1, 3, 4), 4), ((3, 127, 128, 129), 132), ((250, 3, 100), 256)]
CASES = [*ALONE, *RAGGED]
# Whole molecules alone, an id of -1 for padding.
LA_CASES = [((1,), 4), ((4,), 4), ((11,), 12), ((250,), 256), ((129, 132, 60), 132), ((128, 1, 60), 128)]
NETWORKS = {
    "canine": (random_canine, {}, CASES),
    "gelu_tanh, one hash, wide molecules": (
        random_canine,
        {"activation": "gelu_tanh", "hash_functions": 1, "downsample_factor": 5, "upsample_width": 3},
        CASES[1:8],
    ),
    "relu, narrow blocks, one head": (
        random_canine,
        {"activation": "relu", "block_characters": 6, "heads": 1, "upsample_width": 1},
        CASES,
    ),
    "la-canine": (random_la_canine, {}, LA_CASES),
    "adapters, wider than the feed-forward": (random_la_canine, {"adapter_dim": 24, "ffn_dim": 16}, LA_CASES),
}


def given(network, lengths, total):
    """Ids, lengths and, of a CANINE, types; and which positions are real."""
    ids, mask = batch(lengths, total, network.config.padding)
    types = mx.array((np.arange(total) > total // 2).astype(np.int32) + np.zeros_like(ids)) if network.mark_leads else None
    return mx.array(ids), None if set(lengths) == {total} else mx.array(lengths), types, mask


def states_of(network, ids, lengths, types):
    deep = network.deep(ids, lengths, types)
    return network.states(deep, lengths), deep.molecules[:, 0]


def assert_equal(network, lengths, total, tolerance=1e-5):
    ids, real, types, mask = given(network, lengths, total)
    fused = fuse_canine(network)
    deep = fused.deep(ids, real, types)
    found = np.array(fused.states(deep, real))[mask]
    expected, first = states_of(network, ids, real, types)
    expected = np.array(expected)[mask]
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
    assert mx.abs(deep.molecules[:, 0] - first).max() < tolerance * mx.abs(first).max()  # what the pooler reads


@pytest.mark.parametrize(("make", "changes", "cases"), NETWORKS.values(), ids=NETWORKS.keys())
def test_states_equal_the_graph(make, changes, cases):
    network = make(**changes)
    for lengths, total in cases:
        assert_equal(network, lengths, total)


def test_one_sequence_and_many_are_the_same_rows():
    """More sequences than threads are spread over them; each is what it is alone."""
    network = random_canine()
    ids, *_ = given(network, (140,) * 7, 140)
    fused = fuse_canine(network)
    together = fused.states(fused.deep(ids))
    for row in range(7):
        alone = fused.states(fused.deep(ids[row : row + 1]))[0]
        assert mx.abs(together[row] - alone).max() < 1e-5


def test_more_rows_than_a_convolution_takes_at_once():
    assert_equal(random_canine(hash_buckets=2048, max_characters=2048), (1300, 1029), 1300)


@pytest.mark.parametrize(("total", "message"), [(3, "fewer characters"), (257, "more positions")])
def test_a_length_that_no_input_has_reads_no_memory(total, message):
    with pytest.raises(ValueError, match=message):
        fuse_canine(random_canine()).deep(mx.ones((1, total), dtype=mx.int32))


@pytest.mark.parametrize("format", FORMATS.keys())
@pytest.mark.parametrize(("lengths", "total"), [((131,), 131), ((3, 127, 129), 132)])
def test_packed_weights_equal_the_graph(format, lengths, total):
    assert_equal(packed(random_canine(d_model=64, ffn_dim=64), format), lengths, total, tolerance=1e-4)


@pytest.mark.parametrize("format", ["nvfp4", "int8"])
def test_rounded_activations_equal_the_graph(format):
    """A value that rounds the other way moves a sum by a part of a step, so means are compared."""
    network = packed(random_canine(d_model=64, ffn_dim=64), format, activation_bits=8)
    ids, _, types, _ = given(network, (131,), 131)
    fused = fuse_canine(network)
    found, (expected, _) = fused.states(fused.deep(ids, None, types)), states_of(network, ids, None, types)
    assert mx.abs(found - expected).mean() < 2e-3 * mx.abs(expected).max()
    round_activations(network, 16)
    exact, _ = states_of(network, ids, None, types)
    assert mx.abs(expected - exact).mean() > 2 * mx.abs(found - expected).mean()  # it is rounding that they share


def test_texts_run_in_the_kernels(monkeypatch):
    """Whatever is asked of a model: the same as by the graph, from one place that chooses."""
    texts = ["Žluťoučký kůň".encode(), b"a text of another length", b"texts"]
    labels = {"head": "token", "labels": ("O", "B-A", "I-A")}
    networks = random_canine(), random_canine(**labels), random_canine(head="sequence", labels=("A", "B")), random_la_canine()
    split = SplitSettings(window_characters=16, stride_characters=8)
    asked = (
        lambda: [np.array(rows) for rows in characters.encode(networks[0], texts)],
        lambda: [np.array(characters.pooled(networks[0], texts, pad_to=64))],
        lambda: [np.array([span.score for spans in characters.tag(networks[1], texts) for span in spans])],
        lambda: [np.array([each.score for found in characters.classify(networks[2], texts) for each in found])],
        lambda: [scores for _, scores in boundary_scores(networks[3], ids_of_pieces(texts), split)],
    )
    assert all(isinstance(runner_of(network), FusedCanine) for network in networks)
    fused = [ask() for ask in asked]
    monkeypatch.setattr("marlin_cli.engine.fused_canine.kernels", lambda: (None, "no compiler"))
    assert all(runner_of(network) is network for network in networks)
    for one, other in zip(fused, (ask() for ask in asked), strict=True):
        assert all(np.allclose(*pair, atol=1e-4) for pair in zip(one, other, strict=True))


def test_what_the_kernels_do_not_know_stays_with_the_graph(monkeypatch):
    assert fuse_canine(random_canine()) is not None
    assert fuse_canine(random_la_canine(lookahead=2)) is None
    half = random_canine()
    half.set_dtype(mx.bfloat16)
    assert fuse_canine(half) is None
    other = random_canine()
    other.local.up.conv = nn.Linear(256, 32)
    assert fuse_canine(other) is None
    # Positions of a window that share a group of scales cannot be told apart.
    assert fuse_canine(packed(random_canine(d_model=48, heads=4), "nvfp4")) is None
    with monkeypatch.context() as patch:
        patch.setattr("marlin_cli.engine.fused_canine.kernels", lambda: (None, "no compiler"))
        assert fuse_canine(random_canine()) is None
