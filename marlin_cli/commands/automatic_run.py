"""`marlin quantize --target-bpw`: measures what each format costs each layer, chooses, and writes the recipe."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from marlin_cli import console
from marlin_cli.checkpoints import ImportOptions, read_checkpoint
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.commands.calibration_bytes import CalibrationBytes
from marlin_cli.engine import answer_scoring, scoring
from marlin_cli.models import Capability, Network, architecture_of, build
from marlin_cli.quantization.apply import check_method, plan_network
from marlin_cli.quantization.automatic import (
    Predict,
    check_target,
    choose,
    log2_predictions,
    measure_choices,
    recipe_text,
    with_choices,
)
from marlin_cli.quantization.encoders import Packed
from marlin_cli.quantization.feeds import size_bytes
from marlin_cli.quantization.methods import METHODS
from marlin_cli.quantization.plan import LayerPlan, QuantizationSettings
from marlin_cli.statistics import load_statistics
from marlin_cli.writing import writing

# What a network predicts of a batch, where kernels take rows through a stage or an encoder in one call.
PREDICTIONS: dict[Capability, Predict] = {
    Capability.CONTINUES: scoring.log2_predictions,
    Capability.ANSWERS: answer_scoring.log2_predictions,
    Capability.ENCODES: log2_predictions,
}

# Bytes that every choice is scored on.
MEASURED_BYTES = 32 << 10


def automatic_settings(
    model: str,
    options: ImportOptions,
    settings: QuantizationSettings,
    target_bits_per_weight: float,
    measured_on: CalibrationBytes,
    recipe: Path,
    *,
    statistics_file: str | None,
    method: str,
    domain_weights: Mapping[str, float] | None,
) -> QuantizationSettings:
    """`settings` with a format for each layer, the mean of which is at most the target; written to `recipe`.

    Raises:
        UsageError: corpora that hold no window.
        QuantizationError: a target below what the smallest formats need; or an encoder alone.
    """
    statistics = None if statistics_file is None else load_statistics(Path(statistics_file))
    tried = {"awq": "mse", "awq+gptq": "gptq"}.get(method, method)  # awq's rescaling is not of one layer alone
    check_method(tried, statistics)
    checkpoint = read_checkpoint(locate_model(model), options)
    network = build(checkpoint.config, checkpoint.weights, checkpoint.quantization, where=model, dtype=mx.float32)
    check_target(network, target_bits_per_weight)
    batches = [batch for _, batch in measured_on.up_to(network, MEASURED_BYTES)]

    def pack(weight: mx.array, plan: LayerPlan) -> Packed:
        assert plan.format is not None
        importance = hessian = None
        if statistics is not None:
            importance = mx.array(statistics.mean_square(plan.path, domain_weights))
            hessian = statistics.hessian(plan.path, domain_weights)
        return METHODS[tried](weight, plan.format, plan.group_size, importance, hessian)

    predict = PREDICTIONS[architecture_of(network).capability]
    total = sum(array.size for path, array in checkpoint.weights.items() if array.ndim == 2)
    with console.byte_progress("measuring", total) as progress:
        choices = measure_choices(network, batches, pack, predict, on_choice=lambda choice: progress.advance(choice.weights))
    chosen = choose(choices, target_bits_per_weight)
    mixed = with_choices(settings, chosen)
    made = (
        f"Made by marlin quantize {model} --target-bpw {target_bits_per_weight:g}: {tried},"
        f" {sum(map(size_bytes, batches)):,} bytes of {measured_on.names}"
    )
    with writing(recipe) as file:
        file.write_text(recipe_text(mixed, choices, chosen, made), encoding="utf-8")
    expected = sum(choice.divergence[chosen[choice.paths[0]]] for choice in choices)
    in_all = _bits_of_all(network, mixed)
    if in_all > target_bits_per_weight:
        console.note(
            f"--target-bpw {target_bits_per_weight:g} is of the layers that a format is chosen for; with those that stay as"
            f" they are (the head) it is {in_all:.2f} bits a weight"
        )
    console.note(f"{recipe}: the formats chosen; together they should cost a KL divergence of {expected:.5f} bits a prediction")
    return mixed


def _bits_of_all(network: Network, settings: QuantizationSettings) -> float:
    """Bits a weight of all linear layers, the head's 16 among them."""
    plans = plan_network(network, settings)
    bits = {plan.path: 16.0 if plan.format is None else plan.format.bits_per_weight(plan.group_size) for plan in plans}
    weights = sum(plan.rows * plan.columns for plan in plans)
    return sum(bits[plan.path] * plan.rows * plan.columns for plan in plans) / weights
