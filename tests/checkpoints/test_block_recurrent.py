"""State dicts of block-recurrent-transformer-pytorch: read, wrapped or not, and refused in a line."""

import mlx.core as mx
import numpy as np
import pytest
from block_recurrent_cases import SIZES, random_block_recurrent, state_of
from mlx.utils import tree_flatten
from safetensors.numpy import save_file
from torch_writer import tensor, write_zip

from marlin_cli import load
from marlin_cli.checkpoints import ImportOptions, architecture_of, possible_heads, read_checkpoint
from marlin_cli.config import from_mapping
from marlin_cli.errors import AssumptionWarning, CheckpointError, ConfigError
from marlin_cli.models import build
from marlin_cli.models.block_recurrent import BlockRecurrentConfig

OPTIONS = ImportOptions(block_bytes=SIZES["block_bytes"], bos_byte=0)


def written(path, state):
    save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, path)
    return path


@pytest.mark.parametrize("changes", [{}, {"all_layers_qk_norm": True}, {"recurrent_layers": (1,)}])
def test_read_back(changes, tmp_path):
    network = random_block_recurrent(**changes)
    found = read_checkpoint(written(tmp_path / "model.safetensors", state_of(network)), OPTIONS)
    assert found.layout == "block_recurrent" and from_mapping(BlockRecurrentConfig, found.config, "here") == network.config
    weights = dict(tree_flatten(network.parameters()))
    assert found.weights.keys() == weights.keys()
    assert all(mx.array_equal(weights[name], each) for name, each in found.weights.items())


def test_as_its_wrapper_saves_it(tmp_path):
    state = {f"transformer.{name}": tensor(each) for name, each in state_of(random_block_recurrent()).items()}
    path = write_zip(tmp_path / "model.pt", {"model": state, "optim": {}})
    assert architecture_of(path) == "block_recurrent"
    with pytest.warns(AssumptionWarning, match="assumed block_bytes=6, bos_byte=0; if that is wrong"):
        model = load(path, device="cpu")
    assert len(model.generate(b"abc", 20)) == 20
    assert [heads for heads, _ in possible_heads(path, ImportOptions())] == [2]


def test_an_odd_feed_forward_is_filled_up_and_is_the_same_function(tmp_path):
    network = random_block_recurrent()
    for layer in network.layers:
        layer.ffn.down_proj.weight[:, 85:] = 0
    found = read_checkpoint(written(tmp_path / "model.safetensors", state_of(network, ffn_dim=85)), OPTIONS)
    again = build(found.config, found.weights, where="here")
    assert found.config["ffn_dim"] == 96
    ids = mx.array(np.arange(30, dtype=np.int32)[None])
    assert mx.allclose(again(ids), network(ids), atol=1e-6)


def without(*names):
    return lambda state: [state.pop(name) for name in names]


def setting(name, array):
    return lambda state: state.update({name: array})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("layers.1.0.to_q.weight"), "'layers.1.0.to_q.weight' is missing"),
        (lambda s: [s.pop(n) for n in list(s) if n.startswith("layers.1.")], "layer 1 is missing"),
        (setting("mem_manager.layers.0.1.1.weight", np.ones((32, 16, 4), "f4")), "compressed memories"),
        (setting("layers.1.0.to_out.weight", np.ones((32, 64), "f4")), "layer 2 reads 1 states and writes 0"),
        (lambda s: [s.pop(n) for n in list(s) if "state_container" in n], "no layer has states"),
        (setting("layers.0.0.norm.beta", np.ones(32, "f4")), "'layers.0.0.norm.beta' holds numbers"),
        (setting("layers.0.0.to_kv.weight", np.ones((30, 32), "f4")), "heads 15 wide do not divide queries 32 wide"),
        (setting("layers.0.0.to_kv.weight", np.ones((0, 32), "f4")), "has shape"),
        (setting("layers.2.0.to_q.weight", np.ones((16, 32), "f4")), "has shape"),
        (setting("more.weight", np.ones(2, "f4")), "no place for the tensor 'more.weight'"),
        (setting("layers.0.1.3.weight", np.full((32, 96), np.nan, "f4")), "holds NaN"),
        (setting("layers.9999.0.to_q.weight", np.ones((32, 32), "f4")), "layer 3 is missing"),
    ],
)  # fmt: skip
def test_wrong_ones_are_one_line(change, message, tmp_path):
    state = state_of(random_block_recurrent())
    change(state)
    path = written(tmp_path / "model.safetensors", state)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        read = read_checkpoint(path, OPTIONS)
        build(read.config, read.weights, where=str(path))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads is 2 by the checkpoint, but 3 was given"),
        ({"activation": "relu"}, "the import option activation has no meaning here"),
        ({"attention_window": 3}, "the import option attention_window has no meaning here"),
        ({"language": "en"}, "the import option language has no meaning here"),
        ({"block_bytes": -1}, "block_bytes must be at least 1"),
        ({"bos_byte": 300}, "start_id is 300, more than the 255"),
    ],
)
def test_wrong_options_are_one_line(options, message, tmp_path):
    path = written(tmp_path / "model.safetensors", state_of(random_block_recurrent()))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        read = read_checkpoint(path, ImportOptions(**{"block_bytes": 8, "bos_byte": 0, **options}))
        build(read.config, read.weights, where=str(path))
