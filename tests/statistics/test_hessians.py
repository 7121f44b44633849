"""Sums of x^T x: what one window gives against numpy, and merging, resuming and weighting by domain."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from small_networks import CONTINUING

from marlin_cli.api import ContinuingModel
from marlin_cli.corpus import open_corpus
from marlin_cli.errors import StatisticsError
from marlin_cli.models import linear_layers
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.ops import Linear
from marlin_cli.ops.device import choose_device
from marlin_cli.statistics import Statistics, load_statistics, merge, save_statistics
from marlin_cli.statistics.collect import hessian_channels, measure
from marlin_cli.statistics.data import Run
from marlin_cli.statistics.hessians import HessianAccumulator
from marlin_cli.statistics.run import calibrate

MODEL = "m" * 64


def measured(network: MegaByte, sources: list[str], output: Path, *, limit: int = 1 << 30, **options: object) -> Statistics:
    corpus = open_corpus(sources, sequence_bytes=96, max_bytes=options.pop("max_bytes", None), seed=options.pop("seed", 0))
    sums = HessianAccumulator(hessian_channels(network), 2, output.parent, limit)
    assert sums.spilled == (limit == 0)
    calibrate(network, corpus, output, model=MODEL, hessians=sums, **options)
    sums.close()
    return load_statistics(output)


def test_a_window_against_numpy(network: MegaByte, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    window = np.random.default_rng(3).integers(0, 256, 40, dtype=np.uint8)
    names = {id(module): path for path, module in linear_layers(network).items()}
    seen = {}
    original = Linear.__call__

    def spy(self: Linear, x: mx.array) -> mx.array:
        seen[names[id(self)]] = np.array(x).reshape(-1, x.shape[-1]).astype(np.float64)
        return original(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(Linear, "__call__", spy)
        mx.eval(network(mx.array(window.astype(np.int32))[None]))
    sums = HessianAccumulator(hessian_channels(network), 1, tmp_path)
    totals = measure(network, "code", window, sums)
    assert {path for path, _ in sums.sums} == totals.inputs.keys() - {"output"}
    for (path, domain), found in sums.sums.items():
        assert domain == "code"
        np.testing.assert_allclose(found, seen[path].T @ seen[path], rtol=1e-4, atol=1e-5)


def test_packed_layers_take_as_many_channels(random_network) -> None:
    plain = ContinuingModel(random_network(CONTINUING["megabyte"]), choose_device("cpu"))
    assert hessian_channels(plain.quantize().network) == hessian_channels(plain.network)


def test_the_diagonal_is_the_mean_square_whatever_the_domain_weights(network, sources, tmp_path) -> None:
    found = measured(network, sources, tmp_path / "a.safetensors")
    for weights in (None, {"code": 1.0}, {"code": 0.2, "binary": 0.8}):
        for path in linear_layers(network):
            hessian = found.hessian(path, weights)
            if path == "output":
                assert hessian is None
                continue
            np.testing.assert_allclose(np.diag(hessian), found.mean_square(path, weights), rtol=1e-4, atol=1e-9)
            np.testing.assert_allclose(hessian, hessian.T, rtol=1e-5, atol=1e-6)


def test_sums_in_files_are_those_in_memory(network, sources, tmp_path) -> None:
    measured(network, sources, tmp_path / "a.safetensors")
    measured(network, sources, tmp_path / "b.safetensors", limit=0)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*hess*")) == []


def test_an_interrupted_run_goes_on_to_the_same_file(network, sources, tmp_path, monkeypatch) -> None:
    from marlin_cli.statistics import run

    measured(network, sources, tmp_path / "whole.safetensors")
    monkeypatch.setattr(run, "SAVE_EVERY_BYTES", 1)
    monkeypatch.setattr(run, "SAVE_SHARE", 0)
    done = []

    def stop(count: int) -> None:
        done.append(count)
        if len(done) == 5:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        measured(network, sources, tmp_path / "parts.safetensors", on_bytes=stop)
    with pytest.raises(StatisticsError, match="with Hessians, this one without"):
        calibrate(
            network, open_corpus(sources, sequence_bytes=96, seed=0), tmp_path / "parts.safetensors", model=MODEL, resume=True
        )
    measured(network, sources, tmp_path / "parts.safetensors", resume=True)
    assert (tmp_path / "parts.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_merged_shards_hold_the_sums_of_the_whole(network, sources, tmp_path) -> None:
    whole = measured(network, sources, tmp_path / "whole.safetensors")
    halves = [measured(network, sources, tmp_path / f"{i}.safetensors", shard=(i, 2)) for i in range(2)]
    merged = merge(*halves)
    save_statistics(tmp_path / "merged.safetensors", merged)
    stored = load_statistics(tmp_path / "merged.safetensors")
    assert sorted(stored.hessians) == sorted(whole.hessians)
    for key in whole.hessians:
        np.testing.assert_allclose(stored.hessians[key], whole.hessians[key], rtol=1e-4, atol=1e-4)
    assert stored.fingerprint() == merged.fingerprint() != whole.fingerprint()


def test_statistics_with_and_without_do_not_merge(network, sources, tmp_path) -> None:
    one = measured(network, sources, tmp_path / "a.safetensors")
    other = Statistics(one.model, one.layers, (Run("c", 96, 9, None),), one.totals)
    with pytest.raises(StatisticsError, match="one of the statistics holds Hessians"):
        merge(one, other)
