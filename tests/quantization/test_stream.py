"""A checkpoint packed layer by layer: the same files as from the whole network, in less memory, and nothing from damage."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from blt_cases import blt_folder, random_blt
from canine_cases import random_canine
from mlx.utils import tree_flatten, tree_map

from marlin_cli import EncodingModel
from marlin_cli.checkpoints import read_checkpoint
from marlin_cli.checkpoints.stored_rows import StoredRows
from marlin_cli.checkpoints.writer import write_model
from marlin_cli.errors import CheckpointError
from marlin_cli.models import build, config_as_mapping, linear_layers, shared_inputs
from marlin_cli.models.blt_config import StackConfig
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops.device import choose_device
from marlin_cli.prediction.sizes import bytes_by_part
from marlin_cli.quantization import stream
from marlin_cli.quantization.apply import kept_bytes, plan_network, quantize_network
from marlin_cli.quantization.layers import planned, type_name
from marlin_cli.quantization.plan import QuantizationSettings
from marlin_cli.quantization.reports import by_part
from marlin_cli.quantization.stream import quantize_checkpoint
from marlin_cli.statistics.collect import hessian_channels, measure
from marlin_cli.statistics.data import Run, Statistics
from marlin_cli.statistics.hessians import HessianAccumulator

SETTINGS = QuantizationSettings("nvfp4", "int4", kv_bits=8, overrides={"local.*o_proj": "16bit", "global.*up_proj": "mxfp8"})


def write(folder: Path, network: MegaByte, shard_bytes: int = 1 << 30) -> Path:
    weights = dict(tree_flatten(network.parameters()))
    write_model(folder, config_as_mapping(network.config), weights, None, None, shard_bytes=shard_bytes)
    return folder


def statistics_of(network: MegaByte, folder: Path) -> Statistics:
    sums = HessianAccumulator(hessian_channels(network), 1, folder)
    totals = measure(network, "text", np.random.default_rng(3).integers(0, 256, 96, dtype=np.uint8), sums)
    return Statistics("m", shared_inputs(network), (Run("c", 96, 0, None),), totals, sums.sums)


@pytest.mark.parametrize("ffn_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("method", ["rtn", "mse", "awq", "gptq"])
def test_the_same_files_as_from_the_whole_network(method, ffn_bias, random_network, small_sizes, tmp_path):
    small_sizes |= {"global_dim": 64, "local_dim": 64, "global_layers": 1, "local_layers": 1}
    config = MegaByteConfig(**small_sizes, ffn="gelu" if ffn_bias else "swiglu", ffn_bias=ffn_bias)
    network = random_network(config)
    source = write(tmp_path / "source", network, shard_bytes=60_000)
    assert len(list(source.glob("*.safetensors"))) > 2
    statistics = statistics_of(network, tmp_path)
    whole = quantize_network(network, SETTINGS, statistics, method=method, domain_weights={"text": 1.0})
    write_model(
        tmp_path / "whole", config_as_mapping(config), dict(tree_flatten(whole.network.parameters())),
        whole.quantization, whole.marlin,
    )  # fmt: skip
    checkpoint = read_checkpoint(source, check_values=False)
    stored = sum(array.nbytes for array in checkpoint.weights.values())
    done: list[int] = []
    written = quantize_checkpoint(
        checkpoint, tmp_path / "streamed", SETTINGS, statistics,
        where="here", method=method, domain_weights={"text": 1.0}, on_bytes=done.append,
    )  # fmt: skip
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "streamed").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes(), name
    assert written.layers == whole.layers
    assert written.kept_bytes == kept_bytes(network)
    biases = sum(array.nbytes for name, array in tree_flatten(network.parameters()) if name.endswith("proj.bias"))
    assert stored - biases <= sum(done) <= stored


def test_less_memory_than_the_model_takes(random_network, small_sizes, tmp_path):
    config = MegaByteConfig(**small_sizes | {"global_layers": 12, "global_dim": 256, "local_dim": 32})
    source = write(tmp_path / "source", random_network(config))
    checkpoint = read_checkpoint(source, check_values=False)
    stored = sum(array.nbytes for array in checkpoint.weights.values())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    quantize_checkpoint(checkpoint, tmp_path / "packed", QuantizationSettings(), where="here", method="rtn")
    assert mx.get_peak_memory() - before < 0.6 * stored  # 0.15 of it is the packed model itself
    assert not checkpoint.weights


def test_a_weight_that_is_not_finite_leaves_nothing(random_network, small_sizes, tmp_path):
    network = random_network(MegaByteConfig(**small_sizes | {"local_dim": 32}))
    network.byte_embedding.weight = network.byte_embedding.weight.at[0, 0].add(float("nan"))
    source = write(tmp_path / "source", network)
    with pytest.raises(CheckpointError, match=r"source: the weight 'byte_embedding.weight' holds NaN or infinity"):
        quantize_checkpoint(
            read_checkpoint(source, check_values=False), tmp_path / "packed", QuantizationSettings(), where="here"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_packed_folder_runs(random_network, small_sizes, tmp_path):
    network = random_network(MegaByteConfig(**small_sizes | {"local_dim": 32}))
    source = write(tmp_path / "source", network)
    quantize_checkpoint(read_checkpoint(source, check_values=False), tmp_path / "packed", QuantizationSettings(), where="here")
    packed = read_checkpoint(tmp_path / "packed")
    again = build(packed.config, packed.weights, packed.quantization, where="here")
    data = mx.array(np.arange(24)[None])
    assert mx.allclose(again(data), network(data), atol=1.0).item()
    assert not mx.allclose(again(data), network(data), atol=1e-6).item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_sizes_are_those_of_the_files_tensors(dtype, tmp_path):
    """As bench counts them, before and after, biases among them; and parts that stay are named by their type."""
    network = random_canine(head="sequence", labels=("x", "y"))
    network.update(tree_map(lambda array: array.astype(dtype), network.parameters()))
    EncodingModel(network, choose_device("cpu")).save(tmp_path / "plain")
    stored = read_checkpoint(tmp_path / "plain")
    before = sum(bytes_by_part(stored.weights).values())
    written = quantize_checkpoint(stored, tmp_path / "packed", QuantizationSettings(), where="plain")
    after = sum(bytes_by_part(read_checkpoint(tmp_path / "packed").weights).values())
    kept = sum(written.kept_bytes.values())
    parts = by_part(written.layers)
    assert sum(part.bytes_before for part in parts) + kept == before
    assert sum(part.bytes_after for part in parts) + kept == after
    (head,) = (part for part in parts if part.part == "head")
    assert head.format == type_name(mx.zeros(1, dtype)) and head.bits_per_weight == 8 * dtype.size
    assert [*written.kept_bytes] == [head.format]
    # The plan says the same of the file before.
    layers = linear_layers(network)
    plans = [planned(plan, layers[plan.path].weight) for plan in plan_network(network, QuantizationSettings())]
    assert sum(report.bytes_before for report in plans) + kept == before and kept_bytes(network) == written.kept_bytes


@pytest.mark.parametrize("format", ["int8", "mxfp8", "16bit"])
def test_a_table_larger_than_a_block_is_packed_by_rows(format, monkeypatch, tmp_path):
    network = random_blt(encoder=StackConfig(64, 64, 2, 1), decoder=StackConfig(64, 64, 4, 1))
    folder, settings = blt_folder(tmp_path / "model", network), QuantizationSettings(hash_format=format)

    def packed(name: str) -> dict[str, mx.array]:
        written = quantize_checkpoint(
            read_checkpoint(folder, check_values=False), tmp_path / name, settings, where="here", method="mse"
        )
        reports.append({report.plan.path: report for report in written.layers}["hash_embedding"])
        return read_checkpoint(tmp_path / name).weights

    reports: list = []
    whole = packed("whole")
    read: list[int] = []
    blocks = StoredRows.blocks
    monkeypatch.setattr(stream, "ROWS_AT_ONCE_BYTES", 40 * 256)
    monkeypatch.setattr(
        StoredRows, "blocks", lambda rows, size: (read.append(each.nbytes) or each for each in blocks(rows, size))
    )
    by_rows = packed("by_rows")
    assert whole.keys() == by_rows.keys() and all(mx.array_equal(whole[name], by_rows[name]) for name in whole)
    assert len(read) == 5 and max(read) == 40 * 256 and sum(read) == 2 * 97 * 256
    assert reports[0].bytes_after == reports[1].bytes_after
    errors = [report.squared_error for report in reports]
    assert errors == [None, None] if format == "16bit" else errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_a_table_that_is_not_finite_leaves_nothing(monkeypatch, tmp_path):
    def spoil(tensors):
        tensors["model.encoder_hash_tok_embedding.weight"][150, 3] = np.nan

    folder = blt_folder(
        tmp_path / "model", random_blt(encoder=StackConfig(64, 64, 2, 1), decoder=StackConfig(64, 64, 4, 1)), spoil
    )
    monkeypatch.setattr(stream, "ROWS_AT_ONCE_BYTES", 40 * 256)
    with pytest.raises(CheckpointError, match=r"the weight 'hash_embedding.weight' holds NaN"):
        quantize_checkpoint(
            read_checkpoint(folder, check_values=False), tmp_path / "packed", QuantizationSettings(), where="here"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
