"""Plans: which layer gets which format, and what is refused."""

import pytest

from marlin_cli.errors import ConfigError, QuantizationError
from marlin_cli.files import shipped
from marlin_cli.quantization.plan import (
    QuantizationSettings,
    load_recipe,
    plan_layers,
    quantization_table,
    settings_from_bits,
)

SHAPES = {
    "patch_projection": (32, 64),
    "global.layers.0.ffn.up_proj": (64, 32),
    "global_to_local": (16, 32),
    "middle.0.layers.0.ffn.up_proj": (32, 64),
    "local.layers.0.ffn.up_proj": (64, 128),
    "output": (256, 16),
}


def formats(settings):
    return {plan.path: plan.format.name if plan.format else None for plan in plan_layers(SHAPES, settings)}


def test_parts_get_their_formats_and_the_head_is_kept():
    assert formats(settings_from_bits(4, 8)) == {
        "patch_projection": "nvfp4", "global.layers.0.ffn.up_proj": "nvfp4", "global_to_local": "nvfp4",
        "middle.0.layers.0.ffn.up_proj": "mxfp8", "local.layers.0.ffn.up_proj": "mxfp8", "output": None,
    }  # fmt: skip
    assert formats(settings_from_bits(16, 8))["patch_projection"] is None


def test_the_last_override_that_matches_wins():
    settings = QuantizationSettings(overrides={"ffn": "mxfp4", r"^local\.": "16bit"})
    found = formats(settings)
    assert found["global.layers.0.ffn.up_proj"] == "mxfp4" and found["local.layers.0.ffn.up_proj"] is None


def test_a_group_that_does_not_fit_names_the_layer_and_what_fits():
    with pytest.raises(QuantizationError) as caught:
        plan_layers({"global.layers.0.ffn.up_proj": (8, 48)}, QuantizationSettings("mxfp4"))
    assert "'global.layers.0.ffn.up_proj' has 48 input channels" in str(caught.value)
    assert "formats that fit: nvfp4, 16bit" in str(caught.value)


def test_a_wanted_group_size_holds_for_integers_alone():
    plans = plan_layers({"local.x": (8, 64)}, QuantizationSettings("nvfp4", "int4", group_size=32))
    assert plans[0].group_size == 32
    plans = plan_layers({"global.x": (8, 64)}, QuantizationSettings("nvfp4", "int4", group_size=32))
    assert plans[0].group_size == 16


def test_the_table_has_the_commonest_format_as_its_default():
    table = quantization_table(plan_layers(SHAPES, settings_from_bits(4, 8)), ["byte_embedding"])
    assert {key: table[key] for key in ("group_size", "bits", "mode")} == {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    assert table["local.layers.0.ffn.up_proj"] == {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    assert table["output"] is False and table["byte_embedding"] is False and "patch_projection" not in table


@pytest.mark.parametrize("file", sorted(shipped("configs/recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_are_settings(file):
    assert load_recipe(file.stem) == load_recipe(str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("global_formt: nvfp4", "did you mean 'global_format'"),
        ("global_format: nvfp5", "did you mean 'nvfp4'"),
        ("kv_bits: 3", "kv_bits must be 4, 8 or 16"),
        ("kv_bits: '8'", "expected int, found str '8'"),
        ("overrides: {'(': int4}", "not a regular expression"),
        ("[1, 2]", "expected a table"),
        ("a: [", "cannot read as YAML"),
    ],
)
def test_bad_recipes_are_refused(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(str(file))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
