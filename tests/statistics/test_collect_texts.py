"""Sums of one text in a network that encodes, against activations that are captured in another way; whole runs of them."""

import mlx.core as mx
import numpy as np
import pytest
from canine_cases import random_canine, random_la_canine

from marlin_cli.corpus import TextCorpus, open_corpus
from marlin_cli.errors import StatisticsError
from marlin_cli.models import linear_layers, shared_inputs
from marlin_cli.ops import Linear
from marlin_cli.statistics import load_statistics, merge
from marlin_cli.statistics.collect import hessian_channels, measure_text
from marlin_cli.statistics.hessians import HessianAccumulator
from marlin_cli.statistics.run import calibrate, unfinished_path
from marlin_cli.statistics.show import summarise, tables

TEXT = "Kůň a pes, 東京は大きい. ".encode() * 9  # 171 characters, of which 3 fill no molecule
KINDS = {
    "no head": random_canine,
    "characters": lambda: random_canine(head="token", labels=("O", "A")),
    "texts": lambda: random_canine(head="sequence", labels=("x", "y")),
    "sentences": lambda: random_la_canine(adapter_dim=16, language="cs"),
}


def captured(network, monkeypatch):
    """Inputs of every linear layer in a plain pass over whole molecules, by patching the class."""
    names = {id(module): path for path, module in linear_layers(network).items()}
    seen = {}
    original = Linear.__call__

    def spy(self, x):
        seen[names[id(self)]] = np.array(x, dtype=np.float64).reshape(-1, x.shape[-1])
        return original(self, x)

    characters = [*map(ord, TEXT.decode())]
    with monkeypatch.context() as patch:
        patch.setattr(Linear, "__call__", spy)
        if network.config.marks:
            ids = mx.array([[0xE000, *characters, 0xE001]])
            mx.eval(network.encode(ids), network(ids) if network.config.head_rows else [])
        else:
            mx.eval(network(mx.array([characters[:168]])))
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_every_layer(kind, monkeypatch, tmp_path):
    network = KINDS[kind]()
    sums = HessianAccumulator(hessian_channels(network), 1, tmp_path)
    totals = measure_text(network, "multilingual", TEXT, sums)
    assert totals.domains == {"multilingual": len(TEXT)} and not totals.keys and not totals.values
    seen = captured(network, monkeypatch)
    assert set(totals.inputs) == set(shared_inputs(network).values()) and len(TEXT.decode()) == 171
    for path, moments in totals.inputs.items():
        rows = seen[path]
        assert moments.count.tolist() == [[len(rows)]]
        np.testing.assert_allclose(moments.sum_squares[0, 0], np.square(rows).sum(axis=0), rtol=1e-3, atol=1e-6)
        if path != "output":
            np.testing.assert_allclose(sums.sums[path, "multilingual"], rows.T @ rows, rtol=1e-3, atol=1e-2)
    for path, source in shared_inputs(network).items():
        assert np.array_equal(seen[path], seen[source])


def texts(tmp_path):
    folder = tmp_path / "data"
    if not folder.exists():
        folder.mkdir()
        (folder / "a.txt").write_bytes(TEXT * 4)
        (folder / "b.bin").write_bytes(bytes(range(255, 127, -1)) * 4)
        (folder / "c.txt").write_bytes(b"plain text of one byte a character. " * 20)
    return TextCorpus(open_corpus([f"text={folder}"], sequence_bytes=100))


@pytest.mark.parametrize("with_hessians", [False, True])
def test_interrupted_runs_and_shards_give_the_whole(with_hessians, tmp_path):
    network = KINDS["characters"]()

    def run(name, shard=(0, 1), resume=False, on_bytes=lambda count: None):
        sums = HessianAccumulator(hessian_channels(network), 1, tmp_path) if with_hessians else None
        output, corpus = tmp_path / f"{name}.safetensors", texts(tmp_path)
        calibrate(network, corpus, output, model="m" * 64, shard=shard, resume=resume, hessians=sums, on_bytes=on_bytes)
        return output, corpus.left_out

    whole, left_out = run("whole")
    assert left_out == 5
    for last in (1, 4):
        calls = []

        def interrupt(count, calls=calls, last=last):
            calls.append(count)
            if len(calls) == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(f"again{last}", on_bytes=interrupt)
        assert unfinished_path(tmp_path / f"again{last}.safetensors").exists()
        again, count = run(f"again{last}", resume=True)
        assert again.read_bytes() == whole.read_bytes() and count == left_out
    shards = [load_statistics(run(f"shard{index}", (index, 2))[0]) for index in (0, 1)]
    merged, found = merge(*shards), load_statistics(whole)
    assert merged.domains == found.domains
    for path in shared_inputs(network):
        np.testing.assert_allclose(merged.mean_square(path), found.mean_square(path), rtol=1e-6)


def test_what_is_shown_has_no_keys(tmp_path):
    found = calibrate(KINDS["sentences"](), texts(tmp_path), tmp_path / "s.safetensors", model="m" * 64)
    shown = tables(summarise(found))
    assert [len(table.rows) > 0 for table in shown][:2] == [True, True]
    names = [row[0] for row in shown[1].rows]
    assert "local.down.conv" in names and "layers.1.attention.q/k/v_proj" in names


def test_a_corpus_without_texts(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.bin").write_bytes(bytes(range(255, 127, -1)))
    with pytest.raises(StatisticsError, match=r"nothing to measure: the corpus has no text \(UTF-8\) of 4 characters"):
        calibrate(KINDS["no head"](), texts(tmp_path), tmp_path / "s.safetensors", model="m" * 64)


def test_a_network_that_encodes_takes_texts(tmp_path):
    texts(tmp_path)
    windows = open_corpus([f"text={tmp_path / 'data'}"], sequence_bytes=100)
    with pytest.raises(TypeError, match="measured on texts"):
        calibrate(KINDS["no head"](), windows, tmp_path / "s.safetensors", model="m" * 64)
