"""Numbers that no model has are refused by name before anything is built of them, whichever way they come."""

import dataclasses
import math
import time

import mlx.core as mx
import pytest

from marlin_cli.config import from_mapping
from marlin_cli.errors import CheckpointError, ConfigError
from marlin_cli.models import ARCHITECTURES, build, byt5_config, config_as_mapping, megabyte_config
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig, StageConfig

STAGE = {"length": 2, "layers": 1, "dim": 8, "heads": 1, "ffn_dim": 8}
NUMBERS = [
    (name, field.name)
    for name, architecture in ARCHITECTURES.items()
    for field in dataclasses.fields(architecture.config)
    if ("int" in str(field.type) or "float" in str(field.type)) and not field.name.endswith("_id")
]


@pytest.mark.parametrize(("architecture", "field"), NUMBERS)
@pytest.mark.parametrize("value", [10**13, -1, 10**300])
def test_every_number_of_a_configuration_has_bounds(architecture, field, value):
    with pytest.raises(ConfigError, match=field.removeprefix("global_").removeprefix("local_")) as caught:
        from_mapping(ARCHITECTURES[architecture].config, {field: value}, "config.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("field", STAGE)
@pytest.mark.parametrize("value", [10**12, 0])
def test_stages_between_have_bounds_too(field, value):
    with pytest.raises(ConfigError, match=rf"'middle'\[0\]: {field} "):
        from_mapping(MegaByteConfig, {"layout": "megabyte_pytorch", "middle": [{**STAGE, field: value}]}, "config.json")


@pytest.mark.parametrize(
    ("limits", "config"),
    [
        (megabyte_config.LIMITS, MegaByteConfig()),
        (byt5_config.LIMITS, ByT5Config()),
        (megabyte_config.STAGE_LIMITS, StageConfig(**STAGE)),
    ],
)
def test_nan_and_infinity_are_within_no_bounds(limits, config):
    for name in limits:
        for value in (math.nan, math.inf, -math.inf):
            with pytest.raises(ConfigError, match=name):
                dataclasses.replace(config, **{name: value})


@pytest.mark.parametrize("value", [0.0, -0.125, 1e9])
def test_a_scale_of_attention_that_cannot_be(value):
    with pytest.raises(ConfigError, match="attention_scale"):
        MegaByteConfig(attention_scale=value)


def test_thousands_of_stages():
    start = time.perf_counter()
    with pytest.raises(ConfigError, match="x: middle has 5,000 entries, more than 16"):
        from_mapping(MegaByteConfig, {"layout": "megabyte_pytorch", "middle": [{**STAGE, "length": 1}] * 5000}, "x")
    assert time.perf_counter() - start < 1


def test_numbers_that_are_large_together():
    with pytest.raises(ConfigError, match=r"ask for rows of 8,589,934,592 numbers"):
        MegaByteConfig(patch_size=1 << 16, byte_dim=1 << 17, max_bytes=1 << 20)
    with pytest.raises(ConfigError, match=r"ask for rows of"):
        MegaByteConfig(patch_size=1 << 16, byte_dim=1, max_bytes=1 << 20, local_dim=1 << 17)


def test_layers_that_the_file_has_not_are_never_drafted(small_sizes, monkeypatch):
    config = config_as_mapping(MegaByteConfig(**{**small_sizes, "global_layers": 200}))
    monkeypatch.setattr(MegaByte, "__init__", lambda *_: pytest.fail("was drafted"))
    with pytest.raises(CheckpointError, match=r"'global.layers.0.attention_norm.weight' is missing, with all of 20\d layers"):
        build(config, {f"{index}": mx.zeros(1) for index in range(300)}, where="x")


def test_the_blocks_of_a_configuration_are_those_of_its_network(each_config):
    networks = [MegaByte(each_config)]
    networks += [ByT5(ByT5Config(d_model=8, ffn_dim=8, heads=1, head_dim=8, downsample_factor=factor))
                 for factor in (1, 2)]  # fmt: skip
    for network in networks:
        norms = [path for path, _ in network.named_modules() if path.endswith("attention_norm")]
        assert sorted(norms) == sorted(f"{path}.attention_norm" for path in network.config.blocks)
