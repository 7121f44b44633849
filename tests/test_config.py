"""A configuration that was asked for, against the one that a checkpoint has."""

import pytest

from marlin_cli.checkpoints import ImportOptions
from marlin_cli.config import check_same, from_mapping
from marlin_cli.errors import ConfigError
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.models.megabyte_config import MegaByteConfig


def test_fields_that_were_not_asked_for_may_differ():
    check_same(MegaByteConfig(patch_size=4, global_dim=64), MegaByteConfig(patch_size=4), "model")
    check_same(ByT5Config(d_model=64), ByT5Config(), "model")


def test_a_field_that_differs_is_named():
    with pytest.raises(ConfigError, match="^model: global_dim is 64 in the checkpoint, but 128 was asked for$"):
        check_same(MegaByteConfig(global_dim=64), MegaByteConfig(global_dim=128), "model")


def test_a_value_of_one_of_several_kinds():
    assert from_mapping(ImportOptions, {"heads": "auto"}, "x").heads == "auto"
    assert from_mapping(ImportOptions, {"heads": 3}, "x").heads == 3
    for value in ("many", True, 1.5, [3]):
        with pytest.raises(ConfigError, match="^x: key 'heads': expected int or auto, found"):
            from_mapping(ImportOptions, {"heads": value}, "x")
