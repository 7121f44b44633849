"""Folders of EvaByte as the hub has them: shards, norms minus one, eight heads in one; and what is refused."""

import json

import mlx.core as mx
import numpy as np
import pytest
from evabyte_cases import evabyte_folder, random_evabyte
from mlx.utils import tree_flatten
from refusals import refused

from marlin_cli import load
from marlin_cli.checkpoints import architecture_of, evabyte, read_checkpoint
from marlin_cli.config import from_mapping
from marlin_cli.models.evabyte import EvaByteConfig


@pytest.mark.parametrize("changes", [{}, {"prediction_heads": 1}, {"end_ids": (11,)}])
@pytest.mark.parametrize("offset", [True, False])
def test_read_back(changes, offset, tmp_path):
    network = random_evabyte(**changes)
    folder = evabyte_folder(tmp_path / "model", network, norm_add_unit_offset=offset)
    found = read_checkpoint(folder)
    assert found.layout == "evabyte" == architecture_of(folder)
    assert from_mapping(EvaByteConfig, found.config, "here") == network.config
    weights = dict(tree_flatten(network.parameters()))
    assert found.weights.keys() == weights.keys()
    assert all(mx.allclose(weights[name], each, atol=1e-6) for name, each in found.weights.items())
    assert [file.name for file in evabyte.files(folder)][0] == "config.json"


def test_gains_in_16_bits_keep_their_digits(tmp_path):
    network = random_evabyte()
    network.norm.weight = mx.full((64,), 1 + 2.0**-10)
    folder = evabyte_folder(tmp_path / "model", network)
    path = folder / "model-00002-of-00002.safetensors"
    mx.save_safetensors(str(path), {name: each.astype(mx.bfloat16) for name, each in mx.load(str(path)).items()})
    assert read_checkpoint(folder).weights["norm.weight"].tolist() == [1 + 2.0**-10] * 64


def test_a_saved_copy_is_marlins_own(tmp_path):
    model = load(evabyte_folder(tmp_path / "model", random_evabyte()), device="cpu")
    model.save(tmp_path / "own")
    assert not evabyte.recognises(tmp_path / "own") and architecture_of(tmp_path / "own") == "evabyte"
    assert load(tmp_path / "own", device="cpu").generate(b"abc", 40) == model.generate(b"abc", 40)


def test_a_list_of_ends(tmp_path):
    folder = evabyte_folder(tmp_path / "model", random_evabyte(), eos_token_id=[2, 11])
    assert read_checkpoint(folder).config["end_ids"] == [2, 11]


def without(name):
    return lambda tensors: tensors.pop(name)


def setting(name, array):
    return lambda tensors: tensors.update({name: array})


@pytest.mark.parametrize(
    ("change", "changes", "message"),
    [
        (without("model.layers.1.mlp.up_proj.weight"), {}, "'layers.1.mlp.up_proj.weight' is missing"),
        (without("lm_head.weight"), {}, "'lm_head.weight' is missing"),
        (setting("model.layers.2.mlp.up_proj.weight", np.ones((96, 64), "f4")), {}, "no place for the tensor"),
        (setting("model.layers.0.self_attn.adaptive_phi", np.ones((1, 2, 32), "f4")), {}, "has shape [1, 2, 32], 2 heads ask"),
        (setting("lm_head.weight", np.ones((320, 64), "f4")), {}, "has shape [320, 64], the other tensors ask for [960, 64]"),
        (setting("model.norm.weight", np.full(64, np.nan, "f4")), {}, "holds NaN"),
        (setting("model.layers.0.mlp.up_proj.weight", np.ones((95, 64), "f4")), {}, "has shape [95, 64]"),
        (None, {"num_hidden_layers": 1 << 20}, "asks for 1048576 layers"),
        (None, {"num_hidden_layers": 0}, "no place for the tensor"),
        (None, {"num_hidden_layers": -1}, "no place for the tensor"),
        (None, {"num_attention_heads": 0, "num_key_value_heads": 0}, "has shape"),
        (None, {"num_key_value_heads": 1}, "num_key_value_heads is 1"),
        (None, {"attention_class": "mha"}, "attention_class is 'mha'; marlin knows EvaByte with 'eva' there"),
        (None, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "marlin knows EvaByte with nothing there"),
        (None, {"attention_bias": 0}, "attention_bias is 0"),
        (None, {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        (None, {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        (None, {"chunk_size": 5}, "window_bytes 32 is not made of chunks of 5"),
        (None, {"chunk_size": "16"}, "chunk_size should be a number"),
        (None, {"num_pred_heads": 0}, "'lm_head.weight' has shape"),
        (None, {"vocab_size": 300}, "has shape"),
        (None, {"eos_token_id": [11, "x"]}, "end_ids"),
        (None, {"eos_token_id": 400}, "end_ids must be ids below 320"),
        (None, {"norm_add_unit_offset": False, "rms_norm_eps": "tiny"}, "rms_norm_eps should be a number"),
    ],
)
def test_wrong_ones_are_one_line(change, changes, message, tmp_path):
    assert message in refused(evabyte_folder(tmp_path / "model", random_evabyte(), change, **changes))


@pytest.mark.parametrize("value", [1, "yes", None])
def test_an_offset_that_is_none(value, tmp_path):
    folder = evabyte_folder(tmp_path / "model", random_evabyte())
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {"norm_add_unit_offset": value}))
    assert "norm_add_unit_offset should be true or false" in refused(folder)


def test_shards_that_hold_a_tensor_twice_or_are_missing(tmp_path):
    folder = evabyte_folder(tmp_path / "model", random_evabyte())
    second = folder / "model-00002-of-00002.safetensors"
    tensors = mx.load(str(second)) | {"model.embed_tokens.weight": mx.zeros((320, 64))}
    mx.save_safetensors(str(second), tensors)
    assert "stands" in refused(folder)
    second.unlink()
    assert "is missing" in refused(folder)
