"""ByGPT5 in single calls: equal to the graph of operations, dense and packed, over prompts and steps, as streams leave."""

import mlx.core as mx
import numpy as np
import pytest
from decoder_cases import random_bygpt5
from packed_layers import packed

from marlin_cli.engine import fused_bygpt5
from marlin_cli.engine.byte_decoding import ByteByByte, GraphRows
from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.fused_bygpt5 import FusedRows, fuse_bygpt5
from marlin_cli.engine.generation import generate
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.scoring import bits_of
from marlin_cli.engine.stopping import Stopping
from marlin_cli.ops import cpu
from marlin_cli.quantization.formats import FORMATS

pytestmark = pytest.mark.skipif(cpu.kernels()[0] is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")

KINDS = {
    "gated": {},
    "relu, tied and scaled": {"activation": "relu", "gated_ffn": False, "tied_head": True, "scaled_head": True},
    "near rows": {"relative_buckets": 8, "relative_distance": 16, "heads": 3},
}
EACH_KIND = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())


def ids_of(streams, rows):
    return mx.array(np.random.default_rng(rows).integers(0, 384, (streams, rows)).astype(np.int32))


def close(found, expected, tolerance=2e-5):
    assert found.shape == expected.shape
    assert mx.abs(found - expected).max() < tolerance * mx.abs(expected).max()


@EACH_KIND
@pytest.mark.parametrize(("streams", "rows"), [(1, 1), (1, 300), (3, 70)])
def test_logits_equal_the_graph(changes, streams, rows):
    network = random_bygpt5(**changes)
    close(fuse_bygpt5(network).logits(ids_of(streams, rows)), network(ids_of(streams, rows)))


@EACH_KIND
@pytest.mark.parametrize("bits", [CacheBits(), CacheBits(8, 8)], ids=["float32", "8 bits"])
@pytest.mark.parametrize(("streams", "prompt"), [(1, 1), (1, 130), (4, 63)])
def test_steps_equal_the_graph(changes, bits, streams, prompt, monkeypatch):
    """A prompt, in parts too, then row by row, beyond a page of the cache; streams leave and change places half-way."""
    monkeypatch.setattr(fused_bygpt5, "ROWS_AT_ONCE", 50)
    network = random_bygpt5(**changes, head_dim=32)
    ids = ids_of(streams, prompt + 70)
    state, graph = fuse_bygpt5(network).new_rows(streams, bits), GraphRows(network, bits)
    tolerance = 2e-5 if bits == CacheBits() else 1e-2  # a key that rounds the other way
    close(state.read(ids[:, :prompt]), graph.read(ids[:, :prompt]), tolerance)
    for step in range(prompt, prompt + 70):
        if streams > 1 and step == prompt + 40:
            kept = [2, 0]
            ids = ids[mx.array(kept)]
            state.keep(kept)
            graph.keep(kept)
        close(state.read(ids[:, step : step + 1]), graph.read(ids[:, step : step + 1]), tolerance)
        assert state.nbytes == graph.nbytes


@EACH_KIND
@pytest.mark.parametrize("starts_all", [False, True])
@pytest.mark.parametrize(("streams", "length"), [(1, 1), (3, 1), (1, 2), (3, 40), (5, 150)])
def test_predictions_and_costs_equal_the_graph(changes, starts_all, streams, length):
    network = random_bygpt5(**changes, starts_all=starts_all)
    windows = mx.array(np.random.default_rng(length).integers(0, 256, (streams, length)).astype(np.int32))
    fused, expected = fuse_bygpt5(network), network.predictions(windows)
    close(fused.predictions(windows), expected)
    chosen = mx.take_along_axis(expected, windows[..., None] + 3, axis=-1)[..., 0]
    close(fused.costs(windows), mx.logsumexp(expected, axis=-1) - chosen)


@pytest.mark.parametrize("format", FORMATS.keys())
def test_packed_weights_equal_the_graph(format):
    network = packed(random_bygpt5(d_model=64), format)
    ids = ids_of(2, 40)
    expected = network(ids)
    close(fuse_bygpt5(network).logits(ids), expected, tolerance=1e-4)
    state = fuse_bygpt5(network).new_rows(2, CacheBits())
    state.read(ids[:, :39])
    close(state.read(ids[:, 39:]), expected[:, -1], tolerance=1e-4)


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.05), (4, 0.4)])
def test_packed_caches_are_near_and_smaller(bits, tolerance):
    network = random_bygpt5(head_dim=32)
    ids = ids_of(2, 90)
    plain, state = (fuse_bygpt5(network).new_rows(2, CacheBits(each, each)) for each in (16, bits))
    expected, found = plain.read(ids), state.read(ids)
    assert 0 < mx.abs(found - expected).max() < tolerance * mx.abs(expected).max()
    assert state.nbytes < plain.nbytes * (bits + 1) / 32


def test_streams_and_scores_run_in_the_kernels(monkeypatch):
    """Prompts of two lengths and bits of windows: the same as by the graph, from the places that choose."""
    network, prompts = random_bygpt5(), [b"one prompt", b"a longer one", b"ten  bytes"]
    data = np.frombuffer(b"bytes that are scored, in windows", dtype=np.uint8)

    def run():
        pieces = list(generate(network, prompts, Stopping(20), Sampling()))
        return [b"".join(piece.data for piece in pieces if piece.stream == stream) for stream in range(3)], bits_of(
            network, data, 10
        )

    assert isinstance(ByteByByte(network, [[5, 6]])._rows, FusedRows)
    texts, bits = run()
    monkeypatch.setattr("marlin_cli.engine.fused_bygpt5.kernels", lambda: (None, "no compiler"))
    assert isinstance(ByteByByte(network, [[5, 6]])._rows, GraphRows)
    expected, costs = run()
    assert texts == expected and any(texts)
    assert np.allclose(bits, costs, atol=1e-4)


def test_what_the_kernels_do_not_know_stays_with_the_graph():
    assert fuse_bygpt5(random_bygpt5()) is not None
    half = random_bygpt5()
    half.set_dtype(mx.bfloat16)
    assert fuse_bygpt5(half) is None
