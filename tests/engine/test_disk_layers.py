"""Models larger than memory are measured with layers that stay in their files: the same numbers, a layer at a time."""

import mlx.core as mx
import numpy as np
import pytest
from blt_cases import blt_folder, random_blt
from evabyte_cases import evabyte_folder, random_evabyte
from mlx.utils import tree_flatten

from marlin_cli import load
from marlin_cli.checkpoints.writer import write_model
from marlin_cli.engine import disk_layers, disk_tables
from marlin_cli.engine.disk_layers import DiskLinear
from marlin_cli.engine.disk_tables import DiskTable
from marlin_cli.errors import CheckpointError, UsageError
from marlin_cli.models import config_as_mapping, linear_layers
from marlin_cli.statistics.collect import hessian_channels, measure
from marlin_cli.statistics.hessians import HessianAccumulator

WINDOW = np.random.default_rng(0).integers(0, 256, 120, dtype=np.uint8)


@pytest.fixture
def short_memory(monkeypatch):
    """A machine without any memory left, from the call of it on."""

    def shorten():
        for module in (disk_layers, disk_tables):
            monkeypatch.setattr(module, "free_memory_bytes", lambda: 0)

    return shorten


def evabyte(folder):
    return evabyte_folder(folder / "model", random_evabyte())


def blt(folder):
    return blt_folder(folder / "model", random_blt())


def own_layout_in_16_bits(folder):
    network = random_evabyte()
    weights = {name: array.astype(mx.bfloat16) for name, array in tree_flatten(network.parameters())}
    write_model(folder / "model", config_as_mapping(network.config), weights, None, None, shard_bytes=40_000)
    return folder / "model"


def measured(folder, where):
    """Statistics of the window, and the network that they are of."""
    network = load(folder, device="cpu", dtype=mx.float32, streams=True).network
    sums = HessianAccumulator(hessian_channels(network), 1, where)
    return measure(network, "text", WINDOW, sums), {key: np.array(each) for key, each in sums.sums.items()}, network


@pytest.mark.parametrize("make", [evabyte, blt, own_layout_in_16_bits])
def test_the_same_numbers(make, tmp_path, short_memory, monkeypatch):
    folder = make(tmp_path)
    whole, sums, network = measured(folder, tmp_path)
    assert not any(isinstance(each, DiskLinear) for each in network.modules())
    short_memory()
    monkeypatch.setattr(disk_layers, "BLOCK_BYTES", 1000)
    again, sums_again, network = measured(folder, tmp_path)
    layers = linear_layers(network)
    left = {path for path, layer in layers.items() if isinstance(layer, DiskLinear)}
    assert set(layers) - left <= {"output", "drafts"}  # which are parts of one array in the hub's files
    assert ("hash_embedding" in network) == any(isinstance(each, DiskTable) for each in network.modules())
    found, expected = list(again.items()), list(whole.items())
    assert [each[:2] for each in found] == [each[:2] for each in expected] and len(found) > 5
    for (_, path, one), (_, _, other) in zip(found, expected, strict=True):
        for name in ("count", "sum_squares", "absolute_maximum"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), (path, name)
    assert sums_again.keys() == sums.keys() and all(np.array_equal(sums_again[key], sums[key]) for key in sums)


def test_a_layer_at_a_time_is_in_memory(tmp_path, short_memory):
    network = random_evabyte(d_model=256, ffn_dim=512, layers=12)
    folder = evabyte_folder(tmp_path / "model", network)
    size = sum(4 * layer.weight.size for layer in linear_layers(network).values())
    largest = max(4 * layer.weight.size for layer in linear_layers(network).values())
    del network
    short_memory()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    network = load(folder, device="cpu", dtype=mx.float32, streams=True).network
    measure(network, "text", WINDOW)
    taken = mx.get_peak_memory() - before
    assert taken < 0.4 * size and 12 * largest > taken, (taken, size)  # 3 prediction heads and embeddings are 0.03 of it


def test_what_stays_in_its_files_is_not_saved(tmp_path, short_memory):
    folder = evabyte(tmp_path)
    short_memory()
    with pytest.raises(UsageError, match="its layers stay in their files"):
        load(folder, device="cpu", dtype=mx.float32, streams=True).save(tmp_path / "again")


def test_a_file_that_was_cut(tmp_path, short_memory):
    folder = evabyte(tmp_path)
    short_memory()
    network = load(folder, device="cpu", dtype=mx.float32, streams=True).network
    mx.eval(network.parameters())
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as opened:
            opened.truncate(64)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        measure(network, "text", WINDOW)


def test_with_enough_memory_every_weight_is_looked_at(tmp_path):
    network = random_evabyte()
    network.layers[1].ffn.up_proj.weight = network.layers[1].ffn.up_proj.weight.at[3, 3].add(float("nan"))
    folder = evabyte_folder(tmp_path / "model", network)
    with pytest.raises(CheckpointError, match=r"'layers.1.ffn.up_proj.weight' holds NaN"):
        load(folder, device="cpu", dtype=mx.float32, streams=True)
