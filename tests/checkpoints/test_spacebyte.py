"""Checkpoints of SpaceByte as its train.py saves them, with options and without; and what is refused."""

import warnings

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from refusals import refused
from spacebyte_cases import random_spacebyte, spacebyte_file, tensors_of

from marlin_cli import load
from marlin_cli.checkpoints import ImportOptions, architecture_of, possible_heads, read_checkpoint
from marlin_cli.config import from_mapping
from marlin_cli.errors import AssumptionWarning, CheckpointError
from marlin_cli.models.spacebyte_config import SpaceByteConfig

NETWORK = random_spacebyte()
UNREVEALED = random_spacebyte(qk_norm=False, local_window=32)


def as_written(config):
    """With the widths and numbers of heads that a file says."""
    found = vars(config).copy()
    for stage in ("global", "local"):
        found[f"{stage}_head_dim"] = getattr(config, f"{stage}_stage").width_of_head
        found[f"{stage}_kv_heads"] = found[f"{stage}_kv_heads"] or found[f"{stage}_heads"]
    return SpaceByteConfig(**{name: value for name, value in found.items() if not name.endswith("_stage")})


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"positions": "learned+rope", "ffn": "silu", "norm": "variance"}, {"patch_rule": "periodic"},
        {"global_kv_heads": 2, "local_kv_heads": 2, "local_heads": 2, "global_heads": 4}, {"initial_layers": 0},
        {"qk_norm": False, "local_window": None, "global_window": 5, "start_id": 0},
    ],
)  # fmt: skip
def test_read_back(changes, tmp_path):
    network = random_spacebyte(**changes)
    path = spacebyte_file(tmp_path / "ckpt.pt", network)
    with warnings.catch_warnings(action="error"):  # the file tells all
        found = read_checkpoint(path)
    assert found.layout == "spacebyte" == architecture_of(path)
    assert from_mapping(SpaceByteConfig, found.config, "here") == as_written(network.config)
    weights = dict(tree_flatten(network.parameters()))
    assert found.weights.keys() == weights.keys()
    assert all(mx.array_equal(weights[name], each) for name, each in found.weights.items())


def test_a_saved_copy_is_marlins_own(tmp_path):
    model = load(spacebyte_file(tmp_path / "ckpt.pt", NETWORK), device="cpu")
    model.save(tmp_path / "own")
    assert architecture_of(tmp_path / "own") == "spacebyte"
    assert load(tmp_path / "own", device="cpu").generate(b"abc", 40) == model.generate(b"abc", 40)


def test_a_bare_state_dict_says_what_was_assumed(tmp_path):
    path = tmp_path / "weights.safetensors"
    mx.save_safetensors(str(path), {name: mx.array(array) for name, array in tensors_of(UNREVEALED).items()})
    with pytest.warns(AssumptionWarning, match="assumed activation=relu, attention_scale=0.25, attention_window=32,"):
        found = read_checkpoint(path, ImportOptions(heads=4))
    assert found.config["local_heads"] == 2 and found.config["patch_rule"] == "utf8"
    assert [heads for heads, _ in possible_heads(path, ImportOptions())] == [2, 4, 8, 16]
    given = ImportOptions(
        head_dim=16, activation="silu", norm="variance", rope=True, attention_window=0, patch_rule="periodic", bos_byte=0,
        attention_scale=0.5,
    )  # fmt: skip
    with warnings.catch_warnings(action="error"):
        config = read_checkpoint(path, given).config
    assert config["local_window"] is None and config["patch_rule"] == "periodic" and config["attention_scale"] == 0.5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"heads": 8}, "heads is 4 by the checkpoint, but 8 was given"),
        ({"patch_rule": "periodic"}, "patch_rule is utf8 by the checkpoint, but 'periodic' was given"),
        ({"rope": True}, "rope is False by the checkpoint, but True was given"),
        ({"block_bytes": 4}, "the import option block_bytes has no meaning here"),
        ({"head_dim": 5}, "head_dim is 16 by the checkpoint, but 5 was given"),
    ],
)
def test_options_that_contradict_the_checkpoint(options, says, tmp_path):
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint(spacebyte_file(tmp_path / "ckpt.pt", NETWORK), ImportOptions(**options))


def without(name):
    return lambda tensors: tensors.pop(name)


def without_blocks(start):
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(start)]


def setting(name, array):
    return lambda tensors: tensors.update({name: array})


@pytest.mark.parametrize(
    ("change", "changes", "message"),
    [
        (without("global_blocks.1.attention.linear.weight"), {}, "'global_blocks.1.attention.linear.weight' is missing"),
        (without("logits.logits_linear.weight"), {}, "'logits.logits_linear.weight' is missing"),
        (without("global_position_encoding"), {}, "of no known layout"),
        (without("initial_blocks.0.feedforward.linear_1.weight"), {}, "linear_1.weight' is missing"),
        (setting("mixer.weight", np.ones((2, 2), "f4")), {}, "no place for the tensor 'mixer.weight'"),
        (setting("local_position_encoding", np.ones((0, 32), "f4")), {}, "local_position_encoding' has shape [0, 32]"),
        (setting("local_position_encoding", np.ones((128, 48), "f4")), {}, "has shape"),
        (setting("local_position_encoding", np.ones((1, 32), "f4")), {}, "'local_position_encoding' has one row"),
        (setting("token_embedding.weight", np.full((256, 32), np.nan, "f4")), {}, "holds NaN"),
        (setting("logits.layer_norm.scale", np.ones(31, "f4")), {}, "has shape [31]"),
        (setting("final_blocks.0.attention.QKV_linear.weight", np.ones((95, 32), "f4")), {}, "has shape [95, 32]"),
        (None, {"d_key": 48}, "heads 48 wide do not divide 64 and 32; give head_dim"),
        (None, {"d_key": 0}, "heads 0 wide do not divide 64 and 32"),
        (None, {"patch_method": "words"}, "patch_method"),
        (None, {"local_attention_window": -1}, "local_window must be at least 1"),
        (None, {"local_attention_window": "wide"}, "local_attention_window"),
        (None, {"sparse_attention": True}, "was trained with sparse_attention, which marlin does not run"),
        (None, {"tokenizer": "gpt2"}, "was trained on tokens of 'gpt2'; marlin runs models of bytes"),
        (None, {"BOS": 256}, "start_id is 256, more than the 255"),
        (None, {"vocab_size": 1 << 40}, "vocab_size of model_config is 1099511627776, the embeddings have 256 rows"),
        (None, {"vocab_size": -1}, "vocab_size of model_config is -1"),
        (None, {"nonlinear": ["ReLU"]}, "its model_config has a list as 'nonlinear'"),
        (None, {"layer_norm": "x\n" * 200}, "layer_norm"),
        (without_blocks("global_blocks.1."), {}, "n_layers of model_config is 2, its tensors have 1 layers"),
        (without_blocks("final_blocks.1."), {}, "n_local_layers of model_config is"),
        (None, {"n_layers": 10**9}, "n_layers of model_config is 1000000000, its tensors have 2 layers"),
    ],
)
def test_wrong_ones_are_one_line(change, changes, message, tmp_path):
    assert message in refused(spacebyte_file(tmp_path / "ckpt.pt", NETWORK, change, **changes))
