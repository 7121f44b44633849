"""Folders of Byte Latent Transformers as transformers writes them; and what is refused."""

import mlx.core as mx
import numpy as np
import pytest
from blt_cases import blt_folder, document_of, random_blt
from mlx.utils import tree_flatten
from refusals import refused

from marlin_cli import load
from marlin_cli.checkpoints import architecture_of, blt, read_checkpoint
from marlin_cli.config import from_mapping
from marlin_cli.models.blt_config import BltConfig, StackConfig

NETWORK = random_blt()
DOCUMENT = document_of(NETWORK.config)


def part(name, **changes):
    return {name: {**DOCUMENT[name], **changes}}


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"end_ids": (2, 0)}, {"patches": StackConfig(48, 96, 2, 1)}, {"local_window": None, "patcher_window": None},
        {"cross_every_layer": False, "max_patch_bytes": 9},
    ],
)  # fmt: skip
def test_read_back(changes, tmp_path):
    network = random_blt(**changes)
    own = {"eos_token_id": list(network.config.end_ids)} if "end_ids" in changes else {}
    folder = blt_folder(tmp_path / "model", network, **own)
    found = read_checkpoint(folder)
    assert found.layout == "blt" == architecture_of(folder)
    assert from_mapping(BltConfig, found.config, "here") == network.config
    weights = dict(tree_flatten(network.parameters()))
    assert found.weights.keys() == weights.keys()
    assert all(mx.array_equal(weights[name], each) for name, each in found.weights.items())
    assert [file.name for file in blt.files(folder)] == ["config.json", "model.safetensors"]


def test_a_saved_copy_is_marlins_own(tmp_path):
    model = load(blt_folder(tmp_path / "model", NETWORK), device="cpu")
    model.save(tmp_path / "own")
    assert not blt.recognises(tmp_path / "own") and architecture_of(tmp_path / "own") == "blt"
    assert load(tmp_path / "own", device="cpu").generate(b"abc", 40) == model.generate(b"abc", 40)


def test_hash_tables_keep_their_type(tmp_path):
    folder = blt_folder(tmp_path / "model", NETWORK)
    arrays = {name: each.astype(mx.bfloat16) for name, each in mx.load(str(folder / "model.safetensors")).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    model = load(folder, device="cpu")
    assert model.network.hash_embedding.weight.dtype == mx.bfloat16
    assert model.network.byte_encoder.embedding.weight.dtype == mx.float32 == model.logits(b"ab").dtype


def test_attentions_of_the_encoder_that_nothing_reads_are_left_out(tmp_path):
    network = random_blt(encoder=StackConfig(32, 48, 2, 2))

    def every_layer(tensors):
        for name in [name for name in tensors if "local_encoder.cross_attn_layers.0." in name]:
            tensors[name.replace("layers.0.", "layers.1.")] = tensors[name]
            tensors[name] = np.zeros_like(tensors[name])

    document = document_of(network.config)
    folder = blt_folder(
        tmp_path / "model", network, every_layer,
        encoder_config={**document["encoder_config"], "cross_attn_all_layers": True},
    )  # fmt: skip
    assert mx.array_equal(
        read_checkpoint(folder).weights["byte_encoder.reader.q_proj.weight"], network.byte_encoder.reader.q_proj.weight
    )


def test_a_width_that_config_leaves_open_is_that_of_the_weights(tmp_path):
    folder = blt_folder(tmp_path / "model", NETWORK, **part("encoder_config", intermediate_size=None))
    assert read_checkpoint(folder).config["encoder"]["ffn_dim"] == 48


def without(name):
    return lambda tensors: tensors.pop(name)


def setting(name, array):
    return lambda tensors: tensors.update({name: array})


@pytest.mark.parametrize(
    ("change", "changes", "message"),
    [
        (without("model.patcher.layers.1.mlp.up_proj.weight"), {}, "'patcher.layers.1.mlp.up_proj.weight' is missing"),
        (without("lm_head.weight"), {}, "'lm_head.weight' is missing"),
        (without("model.encoder_hash_tok_embedding.weight"), {}, "'encoder_hash_tok_embedding.weight' is missing"),
        (without("model.local_decoder.cross_attn_layers.1.q_norm.weight"), {}, "cross_attn_layers.1.q_norm.weight' is missing"),
        (setting("model.local_decoder.layers.2.mlp.up_proj.weight", np.ones((64, 32), "f4")), {}, "no place for the tensor"),
        (setting("model.encoder_hash_tok_embedding.weight", np.ones((97, 32), "f4")), {}, "has shape [97, 32]"),
        (setting("model.patcher.norm.weight", np.full(32, np.nan, "f4")), {}, "holds NaN"),
        (setting("model.local_encoder.layers.0.mlp.up_proj.weight", np.ones((47, 32), "f4")), {}, "has shape [47, 32]"),
        (None, {"patching_mode": "bpe"}, "patching_mode is 'bpe'; marlin knows a BLT with 'entropy' there"),
        (None, {"patch_in_forward": False}, "patch_in_forward is False"),
        (None, {"patch_size": None}, "patch_size is null"),
        (None, {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        (None, {"patching_threshold": "high"}, "patching_threshold should be a number"),
        (None, {"patching_threshold": -1.0}, "threshold must be at least 0"),
        (None, {"encoder_hash_byte_group_vocab": 96}, "has shape [194, 32]"),
        (None, {"encoder_hash_byte_group_size": "3"}, "encoder_hash_byte_group_size should be a list of numbers"),
        (None, {"encoder_hash_byte_group_nb_functions": 12}, "has shape [194, 32]"),
        (None, {"cross_attn_k": 3}, "cross_attn_k of encoder_config is 2, that of the model 3"),
        (None, {"patcher_config": 7}, "patcher_config should be a table"),
        (None, {"local_attention_window_len": 1}, "local_window must be at least 2"),
        (None, {"eos_token_id": 400}, "end_ids must be ids below 260"),
        (None, {"max_patch_length": -2}, "max_patch_bytes must be at least 1"),
        (None, part("global_config", num_hidden_layers=1 << 40), "layers, the file holds"),
        (None, part("global_config", num_hidden_layers=-9), "no place for the tensor"),
        (None, part("global_config", num_key_value_heads=1), "num_key_value_heads of global_config is 1"),
        (None, part("global_config", num_attention_heads=3, num_key_value_heads=3), "is not made of 3 heads"),
        (None, part("patcher_config", rope_parameters={"rope_type": "yarn"}), "rope_parameters of patcher_config"),
        (None, part("patcher_config", rope_scaling={"type": "linear"}), "rope_scaling of patcher_config"),
        (None, part("decoder_config", hidden_act="relu"), "hidden_act of decoder_config is 'relu'"),
        (None, part("decoder_config", cross_attn_all_layers="yes"), "cross_attn_all_layers should be true or false"),
        (None, part("encoder_config", num_attention_heads=0, num_key_value_heads=0), "heads must be at least 1"),
        (None, part("encoder_config", max_position_embeddings=1), "max_bytes must be at least 1"),
        (None, part("encoder_config", cross_attn_all_layers=7), "cross_attn_all_layers should be true or false"),
    ],
)
def test_wrong_ones_are_one_line(change, changes, message, tmp_path):
    assert message in refused(blt_folder(tmp_path / "model", NETWORK, change, **changes))
