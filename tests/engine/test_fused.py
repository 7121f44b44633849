"""Whole stages in one call: equal to the graph of operations, in every layout, with every cache; sampled bytes too."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.engine import decoding, scoring
from marlin_cli.engine.continuation import way_of
from marlin_cli.engine.decoding import CacheBits, Lockstep
from marlin_cli.engine.fused import fuse
from marlin_cli.engine.generation import generate
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.stopping import Stopping
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops import cpu
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.formats import FORMATS
from marlin_cli.quantization.plan import QuantizationSettings

pytestmark = pytest.mark.skipif(cpu.kernels()[0] is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")


def random_bytes(seed, count):
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8).tobytes()


def both(network, prompts, sampling, monkeypatch, max_bytes=30, bits=None, stop=()):
    """What the fused stages generate, and what the graph does."""
    outputs = []
    for fused in (True, False):
        with monkeypatch.context() as patch:
            if not fused:
                patch.setattr(decoding, "fuse", lambda network: None)
            streams = [b""] * len(prompts)
            reasons = {}
            for piece in generate(network, prompts, Stopping(max_bytes, stop), sampling, bits):
                streams[piece.stream] += piece.data
                reasons[piece.stream] = piece.stop_reason or reasons.get(piece.stream)
            outputs.append((streams, reasons))
    return outputs


def test_a_pass_over_windows_equals_the_graph(each_network):
    fused = fuse(each_network)
    for length in (1, 7, 40):
        ids = mx.array(np.random.default_rng(length).integers(0, 256, (3, length)))
        assert mx.abs(each_network(ids) - each_network(ids, fused.run_stage)).max().item() < 1e-5


def test_costs_equal_those_of_the_graph(each_network, monkeypatch):
    """Every layout; one patch, some, and more sequences than a thread takes at once; an end inside a patch."""
    for windows, length in ((1, 1), (3, 7), (2, 40), (5, 1023)):
        if length > each_network.config.max_bytes:
            length = each_network.config.max_bytes - 1
        ids = mx.array(np.random.default_rng(length).integers(0, 256, (windows, length)))
        found = np.array(scoring.costs(each_network, ids))
        with monkeypatch.context() as patch:
            patch.setattr(scoring, "way_of", lambda network: dataclasses.replace(way_of(network), fuse=lambda network: None))
            expected = np.array(scoring.costs(each_network, ids))
        assert found.shape == (windows, length) and (expected.std() > 0.01 or length == 1)
        assert np.abs(found - expected).max() < 2e-5 * expected.max()


def test_costs_of_logits_that_overflow_are_no_numbers(random_network, small_sizes):
    network = random_network(MegaByteConfig(**small_sizes))
    network.output.weight = network.output.weight * 1e38 * 100
    assert not np.isfinite(np.array(scoring.costs(network, mx.array([list(range(20))])))).all()


@pytest.mark.parametrize("prompt_bytes", [0, 1, 3, 4, 8, 17])
def test_greedy_bytes_equal_the_graph(each_network, prompt_bytes, monkeypatch):
    prompts = [random_bytes(prompt_bytes + seed, prompt_bytes) for seed in range(3)]
    fused, graph = both(each_network, prompts, Sampling(), monkeypatch)
    assert fused == graph and all(len(stream) == 30 for stream in fused[0])


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}]
)
def test_drawn_bytes_equal_the_graph(each_network, filters, monkeypatch):
    fused, graph = both(each_network, [b"ab", b"abcdef"], Sampling(1.3, seed=5, **filters), monkeypatch)
    assert fused == graph
    assert len(set(fused[0][0])) > 3


def test_streams_that_stop_in_a_patch_leave_the_others_alone(each_network, monkeypatch):
    prompts = [random_bytes(seed, 9) for seed in range(4)]
    [whole] = both(each_network, prompts[:1], Sampling(), monkeypatch)[0][0]
    stop = (whole[5:7],)
    fused, graph = both(each_network, prompts, Sampling(), monkeypatch, stop=stop)
    assert fused == graph and fused[1][0] == "stop" and len(fused[0][0]) <= 5


def test_the_end_of_the_context(each_network, monkeypatch):
    most = each_network.config.max_bytes
    for left in (1, 2, 5):
        fused, graph = both(each_network, [random_bytes(left, most - left)], Sampling(), monkeypatch)
        assert fused == graph and len(fused[0][0]) == left and fused[1] == {0: "context"}


@pytest.mark.parametrize("format", FORMATS.keys())
def test_packed_weights(random_network, small_sizes, format, monkeypatch):
    network = random_network(MegaByteConfig(**{**small_sizes, "global_dim": 64, "local_dim": 64}))
    packed = quantize_network(network, QuantizationSettings(global_format=format, local_format=format)).network
    ids = mx.array(np.random.default_rng(0).integers(0, 256, (2, 33)))
    assert mx.abs(packed(ids) - packed(ids, fuse(packed).run_stage)).max().item() < 1e-5
    fused, graph = both(packed, [b"some", b"bytes"], Sampling(), monkeypatch)
    assert fused == graph


@pytest.mark.parametrize(("bits", "tolerance"), [((8, 8), 0.02), ((4, 16), 0.15), ((16, 4), 0.15), ((4, 4), 0.2)])
def test_packed_caches_are_as_close_as_those_of_the_graph(random_network, small_sizes, bits, tolerance, monkeypatch):
    network = random_network(MegaByteConfig(**{**small_sizes, "global_dim": 64, "max_bytes": 800}))
    data = random_bytes(5, 700)
    exact = np.array(Lockstep(network, [data]).logits)
    packed = Lockstep(network, [data], CacheBits(*bits))
    monkeypatch.setattr(decoding, "fuse", lambda network: None)
    graph = Lockstep(network, [data], CacheBits(*bits))
    errors = [np.sqrt(((np.array(state.logits) - exact) ** 2).mean()) for state in (packed, graph)]
    assert 0 < errors[0] < tolerance * np.abs(exact).max()
    assert errors[0] < 1.5 * errors[1]
    assert packed.cache_bytes["global"] == graph.cache_bytes["global"]


def test_a_layer_of_another_kind_stays_with_the_graph(random_network, small_sizes):
    import mlx.nn as nn

    network = random_network(MegaByteConfig(**small_sizes))
    assert fuse(network) is not None
    network.local.layers[0].ffn.up_proj = nn.Linear(32, 32)
    assert fuse(network) is None
