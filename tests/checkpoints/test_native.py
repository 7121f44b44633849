"""Marlin's own folders: single and sharded, keys of other tools, fingerprints."""

import json
import shutil

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from marlin_cli.checkpoints import ImportOptions, fingerprint, read_checkpoint
from marlin_cli.checkpoints.writer import write_model
from marlin_cli.errors import CheckpointError
from marlin_cli.models import build, config_as_mapping
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig

TINY = MegaByteConfig(
    patch_size=4, max_bytes=64, global_layers=1, global_dim=16, global_heads=2, global_ffn_dim=16,
    local_layers=1, local_dim=8, local_heads=2, local_ffn_dim=16,
)  # fmt: skip


@pytest.fixture
def weights():
    mx.random.seed(0)
    return dict(tree_flatten(MegaByte(TINY).parameters()))


@pytest.fixture
def folder(tmp_path, weights):
    write_model(tmp_path / "model", config_as_mapping(TINY), weights, None, None)
    return tmp_path / "model"


def edit_config(folder, **changes):
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | changes))


def test_a_folder_and_the_file_in_it(folder, weights):
    for path in (folder, folder / "model.safetensors"):
        checkpoint = read_checkpoint(path)
        assert checkpoint.layout == "native"
        assert checkpoint.weights.keys() == weights.keys()
        assert all(mx.array_equal(checkpoint.weights[name], array) for name, array in weights.items())
        assert build(checkpoint.config, checkpoint.weights, where="here").config == TINY
    assert fingerprint(folder) == fingerprint(folder / "model.safetensors")


def test_shards(tmp_path, weights):
    write_model(tmp_path / "sharded", config_as_mapping(TINY), weights, None, None, shard_bytes=20_000)
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    read = read_checkpoint(tmp_path / "sharded").weights
    assert read.keys() == weights.keys()
    assert all(mx.array_equal(read[name], array) for name, array in weights.items())


def test_a_fingerprint_follows_the_content_alone(folder, tmp_path):
    first = fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("a card")
    assert fingerprint(tmp_path / "copy") == first
    edit_config(tmp_path / "copy", max_bytes=128)
    assert fingerprint(tmp_path / "copy") != first


def test_keys_of_other_tools_and_an_older_name(folder):
    table = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    document = json.loads((folder / "config.json").read_text())
    document["conditioning"] = document.pop("layout")
    document |= {"architectures": ["MegaByte"], "torch_dtype": "bfloat16", "transformers_version": "4.0"}
    document |= {"quantization": table, "quantization_config": table, "marlin": {"format": 1}}
    (folder / "config.json").write_text(json.dumps(document))
    checkpoint = read_checkpoint(folder)
    assert checkpoint.config == config_as_mapping(TINY) | {"middle": []}
    assert checkpoint.quantization == table
    assert checkpoint.marlin == {"format": 1}


def test_bfloat16_is_kept(tmp_path, weights):
    weights = {name: array.astype(mx.bfloat16) for name, array in weights.items()}
    write_model(tmp_path / "model", config_as_mapping(TINY), weights, None, None)
    assert {array.dtype for array in read_checkpoint(tmp_path / "model").weights.values()} == {mx.bfloat16}


def test_options_of_an_import_are_refused(folder):
    with pytest.raises(CheckpointError, match="import option heads has no meaning here"):
        read_checkpoint(folder, ImportOptions(heads=2))


def test_a_fingerprint_of_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        fingerprint(tmp_path / "absent")
