"""The network: configuration errors, causality, and golden logits of both demos."""

import dataclasses
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.config import from_mapping
from marlin_cli.errors import CheckpointError, ConfigError
from marlin_cli.models import build, config_as_mapping, linear_layers
from marlin_cli.models.megabyte_config import MegaByteConfig, default_ffn_dim

DATA = Path(__file__).parents[1] / "data"
GOLDEN_LENGTHS = (1, 7, 8, 9, 100, 511, 1500)


@pytest.mark.parametrize("domain", ["multilingual", "code", "binary"])
def test_the_demo_gives_the_golden_logits(demo, domain):
    """256 bytes of each domain through its network.py in PyTorch, float32, on a CPU."""
    golden = mx.load(str(DATA / "megabyte_demo_golden.safetensors"))
    ours = demo.logits(np.array(golden[f"{domain}0.bytes"]).tobytes())
    assert mx.abs(ours - golden[f"{domain}0.logits"]).max().item() < 1e-3


@pytest.mark.parametrize("length", GOLDEN_LENGTHS)
def test_the_first_demo_gives_the_golden_logits(first_demo, length):
    golden = mx.load(str(DATA / "megabyte-demo" / "golden.safetensors"))
    data = np.array(golden[f"n{length}.bytes"]).tobytes()
    ours = first_demo.logits(data)
    assert ours.shape == (length, 256) and ours.dtype == mx.float32
    assert mx.abs(ours - golden[f"n{length}.logits"]).max().item() < 1e-3


def test_no_norm_is_asked_about_no_rows(each_network, monkeypatch):
    """MLX's CUDA backend fails to launch layer norm's kernel on empty arrays."""
    asked = []
    stage = each_network.stages[0]
    for kind in {type(part) for part in (stage.patch_norm, stage.projected_norm) if part is not None}:
        plain = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda layer, x, plain=plain: asked.append(x.size) or plain(layer, x))
    width = each_network.config.patch_size
    rows = each_network.token_rows(0, mx.zeros((2, 0, width), dtype=mx.int32), 0, None)
    assert rows.shape == (2, 0, stage.config.dim) and not asked
    each_network.token_rows(0, mx.zeros((2, 1, width), dtype=mx.int32), 0, None)
    assert bool(asked) == (each_network.config.layout == "megabyte_pytorch")


def test_a_byte_changes_only_what_follows(each_network):
    ids = mx.array(np.random.default_rng(0).integers(0, 256, (1, 30)))
    changed = mx.array(ids)
    changed[0, 13] = (ids[0, 13] + 1) % 256
    difference = mx.abs(each_network(ids) - each_network(changed)).max(axis=-1)[0]
    assert difference[:14].max().item() == 0
    assert difference[14:].max().item() > 0


def test_filler_of_a_ragged_last_patch_changes_nothing(each_network):
    ids = mx.array(np.random.default_rng(1).integers(0, 256, (2, 21)))
    whole = each_network(ids)
    for length in (1, 4, 7, 8, 9, 16, 17):
        assert mx.abs(each_network(ids[:, :length]) - whole[:, :length]).max().item() < 1e-5


def test_no_bytes_give_no_logits(each_network):
    assert each_network(mx.zeros((1, 0), dtype=mx.int32)).shape == (1, 0, 256)


def test_the_design_documents_example_is_a_configuration():
    config = MegaByteConfig(
        patch_size=8, global_layers=12, global_dim=4096, global_heads=32,
        local_layers=4, local_dim=512, local_heads=8, max_bytes=65536,
    )  # fmt: skip
    assert config.byte_width == 512
    assert [stage.length for stage in config.stages] == [8192, 8]
    assert config.stages[0].ffn_dim == default_ffn_dim("swiglu", 4096) == 10944


def test_a_configuration_survives_config_json(each_config):
    assert from_mapping(MegaByteConfig, config_as_mapping(each_config), "x") == each_config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 0}, "patch_size must be at least 1"),
        ({"global_heads": 3}, "3 heads do not divide"),
        ({"global_kv_heads": 3, "global_heads": 4, "global_dim": 32}, "kv_heads do not divide"),
        ({"max_bytes": 97}, "not a multiple of patch_size"),
        ({"vocab_size": 255}, "vocab_size must hold every byte"),
        ({"norm_eps": -1.0}, "norm_eps must be at least 1e-30"),
        ({"norm_eps": float("nan")}, "'norm_eps': expected a finite number"),
        ({"rope_theta": 0.0}, "rope_theta must be at least 0.001"),
        ({"rope_theta": float("nan")}, "'rope_theta': expected a finite number"),
        ({"global_layers": 10**9}, "more than the 256"),
        ({"layout": "paper", "byte_dim": 5}, "no patch projection"),
        ({"start_tokens": False}, "needs start_tokens"),
        ({"global_head_dim": 15}, "even head_dim"),
        ({"global_dim": 34, "global_heads": 2}, "give byte_dim"),
        ({"middle": ({"length": 2, "layers": 1, "dim": 8, "heads": 1, "ffn_dim": 8},)}, "has two stages"),
        ({"patchsize": 4}, "unknown key 'patchsize'; did you mean 'patch_size'?"),
        ({"layout": "papper"}, "is not one of prefix, paper, megabyte_pytorch"),
        ({"global_dim": "32"}, "expected int, found str '32'"),
        ({"ffn_bias": 1}, "expected bool, found int 1"),
    ],
)
def test_an_impossible_configuration_is_refused_by_name(small_sizes, change, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")) as caught:
        from_mapping(MegaByteConfig, {**small_sizes, **change}, "config.json")
    assert str(caught.value).startswith("config.json: ") and "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_named(random_network, small_sizes):
    from mlx.utils import tree_flatten

    network = random_network(MegaByteConfig(**small_sizes))
    config = config_as_mapping(network.config)
    weights = dict(tree_flatten(network.parameters()))
    assert build(config, weights, where="x").config == network.config
    missing = {name: array for name, array in weights.items() if name != "output.weight"}
    with pytest.raises(CheckpointError, match="x: the weight 'output.weight' is missing"):
        build(config, missing, where="x")
    with pytest.raises(CheckpointError, match="x: no place for the weight 'extra'"):
        build(config, {**weights, "extra": mx.zeros(1)}, where="x")
    with pytest.raises(CheckpointError, match=r"'output.weight' has shape \[256, 1\]"):
        build(config, {**weights, "output.weight": mx.zeros((256, 1))}, where="x")
    with pytest.raises(ConfigError, match="model_type 'gpt2' is not supported"):
        build({**config, "model_type": "gpt2"}, weights, where="x")


def test_linear_layers_are_all_found_in_order(random_network, small_sizes):
    network = random_network(MegaByteConfig(**small_sizes))
    paths = list(linear_layers(network))
    assert paths[0] == "patch_projection" and paths[-1] == "output"
    assert len(paths) == 3 + 7 * (network.config.global_layers + network.config.local_layers)


def test_configurations_cannot_be_changed_in_place(small_sizes):
    with pytest.raises(dataclasses.FrozenInstanceError):
        MegaByteConfig(**small_sizes).patch_size = 2  # type: ignore[misc]
