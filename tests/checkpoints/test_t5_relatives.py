"""Folders of ByGPT5 and of GBST before ByT5: what their authors' code writes, and what is refused."""

import json

import mlx.core as mx
import numpy as np
import pytest
from decoder_cases import bygpt5_folder, gbst_folder, random_bygpt5, random_gbst
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

from marlin_cli.checkpoints import bygpt5, gbst, hugging_face, read_checkpoint
from marlin_cli.config import from_mapping
from marlin_cli.errors import AssumptionWarning, CheckpointError, ConfigError
from marlin_cli.models import config_as_mapping, fill
from marlin_cli.models.bygpt5 import ByGPT5Config
from marlin_cli.models.gbst import Gbst, GbstConfig


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def same_weights(found, network):
    weights = dict(tree_flatten(network.parameters()))
    return found.weights.keys() == weights.keys() and all(
        mx.allclose(weights[name], each) for name, each in found.weights.items()
    )


# ByGPT5


@pytest.mark.parametrize("tied", [False, True])
def test_a_bygpt5_is_read_back(tied, tmp_path):
    network = random_bygpt5(tied_head=tied, scaled_head=tied)
    found = read_checkpoint(bygpt5_folder(tmp_path / "model", network))
    assert found.layout == "bygpt5" and from_mapping(ByGPT5Config, found.config, "here") == network.config
    assert same_weights(found, network)


def test_a_t5_that_says_it_is_a_decoder_alone(tmp_path):
    folder = bygpt5_folder(tmp_path / "model", random_bygpt5(), model_type="t5")
    assert read_checkpoint(folder).layout == "bygpt5"
    whole = bygpt5_folder(tmp_path / "whole", random_bygpt5(), model_type="t5", is_encoder_decoder=True)
    assert not bygpt5.recognises(whole) and hugging_face.recognises(whole)


def test_the_rest_of_a_whole_byt5_is_not_read(tmp_path):
    network = random_bygpt5()
    folder = bygpt5_folder(tmp_path / "model", network)
    rewrite(
        folder,
        lambda tensors: tensors.update({
            "encoder.block.0.layer.0.layer_norm.weight": np.ones(32, dtype=np.float32),
            "decoder.block.0.layer.1.EncDecAttention.q.weight": np.ones((32, 32), dtype=np.float32),
            "decoder.embed_tokens.weight": tensors["shared.weight"],
        }),
    )  # fmt: skip
    assert same_weights(read_checkpoint(folder), network)


@pytest.mark.parametrize(
    ("tokenizer", "changes", "expected"),
    [
        (None, {}, (0, False)),
        ({"bos_token": "</s>", "add_bos_token": True}, {}, (1, True)),
        ({"bos_token": {"content": "<extra_id_5>"}}, {}, (264, False)),
        ({"bos_token": "<s>"}, {"decoder_start_token_id": 2}, (2, False)),
        ({"bos_token": "</s>"}, {"bos_token_id": 7}, (7, False)),
    ],
)
def test_what_comes_before_the_first_byte(tokenizer, changes, expected, tmp_path):
    folder = bygpt5_folder(tmp_path / "model", random_bygpt5(), **changes)
    if tokenizer is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        assert folder / "tokenizer_config.json" in bygpt5.files(folder)
    found = bygpt5.read(folder).config
    assert (found["start_id"], found["starts_all"]) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_decoder_layers": 3}, "decoder.block.2"),
        ({"num_decoder_layers": 1 << 40}, "asks for 1099511627776 layers"),
        ({"num_decoder_layers": 1}, "no place for the tensor 'decoder.block.1"),
        ({"vocab_size": 32128}, "pieces of words"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings should be true or false"),
        ({"bos_token_id": 400}, "id 400"),
        ({"bos_token_id": "a"}, "bos_token_id should be a number"),
        ({"feed_forward_proj": {"gated-gelu": 1}}, "feed_forward_proj"),
    ],
)
def test_a_bygpt5_that_does_not_fit(changes, message, tmp_path):
    with pytest.raises((ConfigError, CheckpointError), match=message) as found:
        read_checkpoint(bygpt5_folder(tmp_path / "model", random_bygpt5(), **changes))
    assert "\n" not in str(found.value) and str(tmp_path) in str(found.value)


# GBST


@pytest.mark.parametrize("changes", [{}, {"tied_head": True, "scaled_head": True}, {"block_offsets": (0, 1, 2, 0)}])
def test_a_gbst_is_read_back(changes, tmp_path):
    network = random_gbst(**changes)
    found = read_checkpoint(gbst_folder(tmp_path / "model", network))
    assert found.layout == "gbst"
    config = from_mapping(GbstConfig, found.config, "here")
    assert (config.block_kinds, config.bytes_in_row) == (network.config.block_kinds, 3)
    assert same_weights(found, network)


def test_a_batch_norm_goes_into_the_convolution(tmp_path):
    network = random_gbst()
    folder = gbst_folder(tmp_path / "model", network)
    rng = np.random.default_rng(0)
    names = ("running_mean", "weight", "bias", "running_var")
    mean, weight, shift, variance = values = rng.standard_normal((4, 32)).astype(np.float32)
    np.abs(variance, out=variance)
    prefix = "encoder.embed_tokens.positional_convol.2.bn."
    more = {prefix + name: value.copy() for name, value in zip(names, values, strict=True)}
    rewrite(folder, lambda tensors: tensors.update(more | {f"{prefix}num_batches_tracked": np.array(3)}))
    found = read_checkpoint(folder).weights
    x = rng.standard_normal((5, 32)).astype(np.float32)  # rows of a convolution's sum before its bias
    plain = x @ np.diag(np.array(network.front.kernel[0])) + np.array(network.front.kernel_bias)
    expected = (plain - mean) / np.sqrt(variance + 1e-5) * weight + shift
    folded = x @ np.diag(np.array(found["front.kernel"][0])) + np.array(found["front.kernel_bias"])
    assert np.abs(folded - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"subword_blocks": None, "max_subword_block_size": 4}, (1, 2, 3, 4)),
        ({"subword_blocks": [1, 2, 4]}, (1, 2, 4)),
    ],
)
def test_ways_to_say_the_blocks(changes, sizes, tmp_path):
    folder = gbst_folder(tmp_path / "model", random_gbst(block_sizes=sizes), **changes)
    config = from_mapping(GbstConfig, gbst.read(folder).config, "here")
    assert config.block_kinds == tuple((size, 0) for size in sizes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subword_blocks": "all"}, "subword_blocks should be a list"),
        ({"subword_blocks": [[1, 2, 3]]}, "subword_blocks should be a list"),
        ({"subword_blocks": [[True, 0]]}, "subword_blocks should be a list"),
        ({"score_consensus_attn": 1}, "score_consensus_attn should be true or false"),
        ({"downsample_factor": 1.5}, "downsample_factor should be a number"),
        ({"num_layers": 1 << 40}, "layers, the file holds"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings should be true or false"),
    ],
)
def test_a_gbst_that_does_not_fit(changes, message, tmp_path):
    with pytest.raises((ConfigError, CheckpointError), match=message) as found:
        read_checkpoint(gbst_folder(tmp_path / "model", random_gbst(), **changes))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(("make", "write"), [(random_bygpt5, bygpt5_folder), (random_gbst, gbst_folder)])
def test_a_head_is_read_by_the_rules_of_t5(make, write, tmp_path):
    """transformers 4 leaves out a head that its flag ties to the table, 5 takes one that differs."""
    network = make()
    with pytest.warns(AssumptionWarning, match=r"'lm_head.weight' is left out"):
        found = read_checkpoint(write(tmp_path / "tied", network, tie_word_embeddings=True))
    assert found.config["tied_head"] and found.config["scaled_head"] and "output.weight" not in found.weights
    by_5 = {"tie_word_embeddings": True, "scale_decoder_outputs": False, "transformers_version": "5.24.0"}
    found = read_checkpoint(write(tmp_path / "own", network, **by_5))
    assert not found.config["tied_head"] and not found.config["scaled_head"] and same_weights(found, network)
    folder = write(tmp_path / "missing", network)
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is missing"):
        read_checkpoint(folder)


def test_two_tables_that_should_be_one(tmp_path):
    folder = gbst_folder(tmp_path / "model", random_gbst())
    rewrite(folder, lambda tensors: tensors.update({"encoder.embed_tokens.embeds.weight": tensors["shared.weight"] + 1}))
    with pytest.raises(CheckpointError, match="should be the same table"):
        read_checkpoint(folder)


@pytest.mark.parametrize("network", [random_bygpt5(), random_gbst()])
def test_marlins_own_folder_stays_its_own(network, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_as_mapping(network.config)))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(network.parameters())))
    found = read_checkpoint(tmp_path)
    assert found.layout == "native"
    assert from_mapping(type(network.config), found.config, "here") == network.config
    again = type(network)(network.config)
    fill(again, found.weights, where="here")
    assert isinstance(again, Gbst) or mx.array_equal(again(mx.array([[4, 5]])), network(mx.array([[4, 5]])))
