"""`marlin quantize --target-bpw`: measures what each format costs each layer, chooses, and writes the recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from marlin_cli import console
from marlin_cli.checkpoints import ImportOptions, read_checkpoint
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.corpus import open_corpus
from marlin_cli.engine.scoring import log2_predictions
from marlin_cli.errors import UsageError
from marlin_cli.files import writing
from marlin_cli.models import build
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.quantization.apply import check_method
from marlin_cli.quantization.automatic import check_target, choose, measure_choices, recipe_text, with_choices
from marlin_cli.quantization.encoders import Packed
from marlin_cli.quantization.methods import METHODS
from marlin_cli.quantization.plan import LayerPlan, QuantizationSettings
from marlin_cli.quantization.windows import whole_windows, window_bytes_of
from marlin_cli.statistics import load_statistics

# Bytes that every choice is scored on, in windows.
MEASURED_BYTES = 32 << 10


def automatic_settings(
    model: str,
    options: ImportOptions,
    settings: QuantizationSettings,
    target_bits_per_weight: float,
    corpora: Sequence[str],
    recipe: Path,
    *,
    statistics_file: str | None,
    method: str,
    domain_weights: Mapping[str, float] | None,
) -> QuantizationSettings:
    """`settings` with a format for each layer, the mean of which is at most the target; written to `recipe`.

    Raises:
        UsageError: the model is no MegaByte, or the corpora hold no window.
        QuantizationError: a target below what the smallest formats need.
    """
    statistics = None if statistics_file is None else load_statistics(Path(statistics_file))
    tried = {"awq": "mse", "awq+gptq": "gptq"}.get(method, method)  # awq's rescaling is not of one layer alone
    check_method(tried, statistics)
    checkpoint = read_checkpoint(locate_model(model), options)
    network = build(checkpoint.config, checkpoint.weights, checkpoint.quantization, where=model, dtype=mx.float32)
    if not isinstance(network, MegaByte):
        raise UsageError(f"--target-bpw: {model} holds a {network.config.model_type}; name a MegaByte")
    check_target(network, target_bits_per_weight)
    window = window_bytes_of(network)
    corpus = open_corpus(corpora, sequence_bytes=window, seed=0, max_bytes=MEASURED_BYTES)
    windows = [found for _, found in whole_windows(corpus, window)]
    if not windows:
        raise UsageError(f"--calibration-corpus: no window of {window} bytes in {', '.join(corpora)}")

    def pack(weight: mx.array, plan: LayerPlan) -> Packed:
        assert plan.format is not None
        importance = hessian = None
        if statistics is not None:
            importance = mx.array(statistics.mean_square(plan.path, domain_weights))
            hessian = statistics.hessian(plan.path, domain_weights)
        return METHODS[tried](weight, plan.format, plan.group_size, importance, hessian)

    total = sum(array.size for path, array in checkpoint.weights.items() if array.ndim == 2)
    with console.byte_progress("measuring", total) as progress:
        choices = measure_choices(
            network, [np.stack(windows)], pack, log2_predictions, on_choice=lambda choice: progress.advance(choice.weights)
        )
    chosen = choose(choices, target_bits_per_weight)
    mixed = with_choices(settings, chosen)
    made = (
        f"Made by marlin quantize {model} --target-bpw {target_bits_per_weight:g}: {tried}, {len(windows)} windows of"
        f" {window} bytes of {', '.join(corpora)}"
    )
    with writing(recipe) as file:
        file.write_text(recipe_text(mixed, choices, chosen, made), encoding="utf-8")
    expected = sum(choice.divergence[chosen[choice.paths[0]]] for choice in choices)
    console.note(f"{recipe}: the formats chosen; together they should cost a KL divergence of {expected:.5f} bits per byte")
    return mixed
