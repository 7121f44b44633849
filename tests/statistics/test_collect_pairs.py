"""Sums of one input with its answer in a ByT5, against activations that are captured in another way; whole runs of them."""

import json

import byt5_cases
import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.corpus import CorruptedCorpus, Pair, PairCorpus, open_corpus
from marlin_cli.errors import StatisticsError
from marlin_cli.models import linear_layers, shared_inputs
from marlin_cli.ops import Linear
from marlin_cli.statistics import load_statistics, merge
from marlin_cli.statistics.collect import hessian_channels, measure_pair
from marlin_cli.statistics.hessians import HessianAccumulator
from marlin_cli.statistics.run import calibrate, unfinished_path
from marlin_cli.statistics.show import summarise, tables

KINDS = {
    "gated": {}, "relu, tied": {"gated_ffn": False, "activation": "relu", "tied_head": True},
    "pooling": {"downsample_factor": 4}, "encoder alone": {"decoder_layers": 0},
}  # fmt: skip
SOURCE, TARGET = b"\xff source of bytes", b"target"
PAIRS = [("pairs", Pair(bytes([65 + n]) * (n + 3), b"answer %d" % n)) for n in range(9)]


def random_byt5(**changes):
    return byt5_cases.random_byt5(**{"head_dim": 16, **changes})


@pytest.fixture
def network():
    return random_byt5()


def captured(network, monkeypatch):
    """(input, output) of every linear layer in a plain teacher-forced pass, by patching the class."""
    names = {id(module): path for path, module in linear_layers(network).items()}
    seen = {}
    original = Linear.__call__

    def spy(self, x):
        out = original(self, x)
        seen[names[id(self)]] = np.array(x).astype(np.float64), np.array(out).astype(np.float64)
        return out

    source = mx.array([[*(byte + 3 for byte in SOURCE), 1]])
    with monkeypatch.context() as patch:
        patch.setattr(Linear, "__call__", spy)
        if network.config.decoder_layers:
            mx.eval(network(source, mx.array([[0, *(byte + 3 for byte in TARGET)]])))
        else:
            mx.eval(network.encode(source))
    return seen


def check(found, rows):
    np.testing.assert_array_equal(found.count, np.full((1, rows.shape[1]), rows.shape[0]))
    np.testing.assert_allclose(found.sum_squares[0], np.square(rows).sum(axis=0), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(found.absolute_maximum[0], np.abs(rows).max(axis=0), rtol=1e-4)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
def test_inputs_keys_and_values(changes, monkeypatch, tmp_path):
    network = random_byt5(**changes)
    seen = captured(network, monkeypatch)
    hessians = HessianAccumulator(hessian_channels(network), 1, tmp_path)
    totals = measure_pair(network, "pairs", SOURCE, TARGET, None, hessians)
    sources = shared_inputs(network)
    assert sources.keys() == seen.keys() and totals.inputs.keys() == set(sources.values())
    assert totals.domains == {"pairs": len(SOURCE) + len(TARGET)}
    for path, source in sources.items():
        rows = seen[path][0].reshape(-1, seen[path][0].shape[-1])
        check(totals.inputs[source], rows[:, None])
        if path != "output":
            np.testing.assert_allclose(hessians.sums[source, "pairs"], rows.T @ rows, rtol=1e-3, atol=1e-3)
    attentions = [f"decoder.layers.{n}.{kind}" for n in range(network.config.decoder_layers) for kind in ("cross", "attention")]
    assert totals.keys.keys() == totals.values.keys() == set(attentions)
    for path in attentions:
        for kind, name in ((totals.keys, "k_proj"), (totals.values, "v_proj")):
            check(kind[path], seen[f"{path}.{name}"][1].reshape(-1, 2, 16))


def test_the_network_is_as_it_was(network):
    before = {path: id(module) for path, module in linear_layers(network).items()}
    measure_pair(network, "pairs", b"", b"")
    assert {path: id(module) for path, module in linear_layers(network).items()} == before


def test_activations_that_overflow(network):
    network.encoder.layers[1].ffn.down_proj.weight = mx.full((32, 64), float("inf"))
    with pytest.raises(StatisticsError, match="not finite"):
        measure_pair(network, "pairs", SOURCE, TARGET)


def corrupted(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(np.random.default_rng(1).integers(0, 256, 900, dtype=np.uint8).tobytes())
    return CorruptedCorpus(open_corpus([f"binary={path}"], sequence_bytes=100))


@pytest.mark.parametrize("kind", ["pairs", "spans"])
@pytest.mark.parametrize("with_hessians", [False, True])
def test_interrupted_runs_and_shards_give_the_whole(kind, with_hessians, network, tmp_path):
    def corpus():
        return PairCorpus(PAIRS, sequence_bytes=50) if kind == "pairs" else corrupted(tmp_path)

    def run(name, shard=(0, 1), resume=False, on_bytes=lambda count: None):
        sums = HessianAccumulator(hessian_channels(network), 1, tmp_path) if with_hessians else None
        output = tmp_path / f"{name}.safetensors"
        calibrate(network, corpus(), output, model="m" * 64, shard=shard, resume=resume, hessians=sums, on_bytes=on_bytes)
        return output

    whole = run("whole")
    calls = []

    def interrupt(count):
        calls.append(count)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("again", on_bytes=interrupt)
    assert unfinished_path(tmp_path / "again.safetensors").exists()
    assert run("again", resume=True).read_bytes() == whole.read_bytes()
    shards = [load_statistics(run(f"shard{index}", (index, 2))) for index in (0, 1)]
    merged, found = merge(*shards), load_statistics(whole)
    assert merged.domains == found.domains == ({"pairs": corpus().total_bytes} if kind == "pairs" else {"binary": 900})
    for path in shared_inputs(network):
        np.testing.assert_allclose(merged.mean_square(path), found.mean_square(path), rtol=1e-6)
        if with_hessians and path != "output":
            np.testing.assert_allclose(merged.hessian(path), found.hessian(path), rtol=1e-4, atol=1e-6)
    with pytest.raises(StatisticsError, match="counted already"):
        merge(found, shards[0])


def test_what_is_shown_has_no_rows_of_patches(network, tmp_path):
    output = tmp_path / "s.safetensors"
    found = calibrate(network, PairCorpus(PAIRS, sequence_bytes=50), output, model="m" * 64)
    summary = summarise(found)
    json.dumps(summary.domains)
    shown = tables(summary)
    assert [len(table.rows) > 0 for table in shown] == [True, True, True]
    names = [row[0] for row in shown[1].rows]
    assert "decoder.layers.0.cross.k/v_proj (2 blocks)" in names
    assert "encoder.layers.1.attention.q/k/v_proj" in names


def test_a_network_takes_its_own_kind_of_corpus(network, tmp_path):
    windows = open_corpus([f"code={tmp_path / 'data'}"], sequence_bytes=100) if corrupted(tmp_path) else None
    with pytest.raises(TypeError, match="inputs with answers"):
        calibrate(network, windows, tmp_path / "s.safetensors", model="m" * 64)
