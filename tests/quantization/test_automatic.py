"""Mixed precision: the knapsack against all combinations, and a recipe that can be run again."""

import itertools

import byt5_cases
import numpy as np
import pytest

from marlin_cli.errors import QuantizationError
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.automatic import Choice, check_target, choose, measure_choices, recipe_text, with_choices
from marlin_cli.quantization.methods.mse import mse
from marlin_cli.quantization.plan import QuantizationSettings, load_recipe

CONFIG = MegaByteConfig(
    patch_size=4, max_bytes=96, global_layers=1, global_dim=32, global_heads=2, global_ffn_dim=64,
    local_layers=1, local_dim=32, local_heads=2, local_ffn_dim=64,
)  # fmt: skip


BYT5_PARTS = "encoder_format", "decoder_format", "cross_format", "wo_format"


def random_choices(seed: int, count: int = 6) -> list[Choice]:
    rng = np.random.default_rng(seed)
    choices = []
    for number in range(count):
        weights = int(rng.integers(1, 20)) * 1024
        four, eight = sorted(rng.random(2), reverse=True)
        choices.append(
            Choice(
                (f"layers.{number}",),
                weights,
                {"nvfp4": 4.5 * weights, "mxfp8": 8.25 * weights, "16bit": 16.0 * weights},
                {"nvfp4": four, "mxfp8": 0.1 * eight, "16bit": 0.0},
            )
        )
    return choices


def cost(choices, chosen) -> tuple[float, float]:
    named = [(choice, chosen[choice.paths[0]]) for choice in choices]
    weights = sum(choice.weights for choice in choices)
    return sum(c.divergence[name] for c, name in named), sum(c.bits[name] for c, name in named) / weights


@pytest.mark.parametrize("target", [4.5, 5.0, 6.7, 9.0, 16.0])
@pytest.mark.parametrize("seed", range(4))
def test_no_combination_within_the_budget_is_better(target, seed):
    choices = random_choices(seed)
    divergence, bits = cost(choices, choose(choices, target))
    assert bits <= target + 1e-9
    # Sizes are rounded up, so combinations that fill the last steps of the budget may be missed.
    combinations = itertools.product(*[[(choice.paths[0], name) for name in choice.bits] for choice in choices])
    found = [cost(choices, dict(combination)) for combination in combinations]
    assert divergence <= min(value for value, used in found if used <= target * (1 - 6 / 4096) or used == 4.5) + 1e-12


def test_a_budget_that_nothing_meets():
    with pytest.raises(QuantizationError, match=r"4 bits a weight are too few; the smallest formats need 4\.50"):
        choose(random_choices(0), 4.0)


def test_a_budget_that_nothing_meets_is_refused_before_anything_is_measured(random_network):
    network = random_network(CONFIG)
    check_target(network, 4.5)
    with pytest.raises(QuantizationError, match=r"4\.4 bits a weight are too few; the smallest formats need 4\.50"):
        check_target(network, 4.4)


def test_a_byt5_is_measured_on_its_answers_and_packed_again_from_the_recipe(tmp_path):
    network = byt5_cases.random_byt5()
    batches = [batch for _, batch in byt5_cases.batches(1, network)]
    choices = measure_choices(network, batches, lambda weight, plan: mse(weight, plan.format, plan.group_size))
    reading = [choice.paths for choice in choices if "decoder.layers.1.cross.k_proj" in choice.paths]
    assert len(reading) == 1 and "decoder.layers.0.cross.v_proj" in reading[0]  # they see one input: the encoder's states
    # Each cost is that of packing these layers alone, over all places that are real.
    first = choices[0]
    alone = QuantizationSettings(**dict.fromkeys(BYT5_PARTS, "16bit"), overrides=dict.fromkeys(first.paths, "nvfp4"))
    expected = byt5_cases.divergence(network, quantize_network(network, alone).network, 1) / np.log(2)
    assert first.divergence["nvfp4"] == pytest.approx(expected, rel=1e-3)
    for choice in choices:
        assert choice.divergence["nvfp4"] > choice.divergence["mxfp8"] > choice.divergence["16bit"] == 0
    chosen = choose(choices, 6.0)
    assert {"nvfp4", "mxfp8"} <= set(chosen.values()) and cost(choices, chosen)[1] <= 6.0
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_text(with_choices(QuantizationSettings(), chosen), choices, chosen, "made by a test"))
    again = quantize_network(network, load_recipe(str(file)))
    assert sum(layer.bytes_after for layer in again.layers if layer.plan.path != "output") * 8 <= 6.0 * sum(
        choice.weights for choice in choices
    )
    assert {layer.plan.path: layer.plan.format.name for layer in again.layers if layer.plan.format} == {
        path: name for path, name in chosen.items() if name != "16bit"
    }


def test_measured_choices_make_a_recipe_that_runs_again(random_network, tmp_path):
    network = random_network(CONFIG)
    windows = [np.random.default_rng(0).integers(0, 256, (4, 48), dtype=np.uint8)]
    choices = measure_choices(network, windows, lambda weight, plan: mse(weight, plan.format, plan.group_size))
    assert ("local.layers.0.attention.q_proj", "local.layers.0.attention.k_proj", "local.layers.0.attention.v_proj") in [
        choice.paths for choice in choices
    ]
    for choice in choices:
        assert choice.divergence["nvfp4"] > choice.divergence["mxfp8"] > choice.divergence["16bit"] == 0
    chosen = choose(choices, 6.0)
    assert {"nvfp4", "mxfp8"} <= set(chosen.values())
    settings = with_choices(QuantizationSettings(overrides={"patch_projection": "16bit"}), chosen)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_text(settings, choices, chosen, "made by a test"))
    again = load_recipe(str(file))
    assert again == settings and list(again.overrides)[-1] == "patch_projection"
    assert "local.layers.0.attention.v_proj: nvfp4" in file.read_text()
