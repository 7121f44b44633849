"""Mixed precision under a budget: what each layer costs in each format, measured, and the best choice of formats.

A layer's cost is the KL divergence of the network's predictions when that layer alone is packed. Costs of several
layers are taken to add up, which makes the choice a knapsack; it is solved exactly, up to the step of the budget.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.errors import QuantizationError
from marlin_cli.models import Network, architecture_of, linear_layers, part_of, shared_inputs
from marlin_cli.ops import Linear
from marlin_cli.quantization.apply import copy_with
from marlin_cli.quantization.encoders import Packed, decode
from marlin_cli.quantization.formats import FORMATS
from marlin_cli.quantization.plan import KEEP, LayerPlan, QuantizationSettings, plan_layers

# Formats that a layer is tried in, next to staying in 16 bits.
CANDIDATES = ("nvfp4", "mxfp8")

# The budget is divided into so many steps, and sizes are rounded up to them.
BUDGET_STEPS = 4096

# (network, batch) -> base-2 logarithms of the probabilities [.., vocab] of every id, at each place that is predicted.
Predict = Callable[[Any, Any], mx.array]


def log2_predictions(network: Network, batch: Any) -> mx.array:
    """Base-2 logarithms of the probabilities [predictions, vocab] of a batch, see `feeds`."""
    logits = architecture_of(network).logits(network, batch)
    return (logits - mx.logsumexp(logits, axis=-1, keepdims=True)) / math.log(2)


@dataclass(frozen=True)
class Choice:
    """Layers that are decided together, as they see one input, and what each format costs them.

    Attributes:
        bits: format -> bits of all their weights.
        divergence: format -> KL divergence in bits a prediction (of a byte, or of an answer's end) when they alone are
            packed.
    """

    paths: tuple[str, ...]
    weights: int
    bits: dict[str, float]
    divergence: dict[str, float]


def measure_choices(
    network: Network,
    batches: Sequence[Any],
    pack: Callable[[mx.array, LayerPlan], Packed],
    predict: Predict = log2_predictions,
    formats: Sequence[str] = CANDIDATES,
    *,
    on_choice: Callable[[Choice], None] = lambda choice: None,
) -> list[Choice]:
    """What each format costs the layers of a network that is in float32.

    Args:
        batches: calibration bytes as `predict` takes them; each is scored once a group of layers and format.
        pack: the method.
    """
    layers = linear_layers(network)
    wanted = [np.array(predict(network, each)) for each in batches]
    choices = []
    for choice in _unmeasured(network, formats):
        divergence = dict(choice.divergence)
        for name in [name for name in choice.bits if name not in divergence]:
            shapes = {path: _shape(layers[path]) for path in choice.paths}
            plans = plan_layers(shapes, QuantizationSettings(overrides={".": name}))
            swapped = [(plan.path, _unpacked(layers[plan.path], pack(layers[plan.path]["weight"], plan))) for plan in plans]
            divergence[name] = _divergence(copy_with(network, swapped), batches, wanted, predict)
        choices.append(dataclasses.replace(choice, divergence=divergence))
        on_choice(choices[-1])
    return choices


def check_target(network: Network, target_bits_per_weight: float, formats: Sequence[str] = CANDIDATES) -> None:
    """Refuses what `choose` would, before anything is measured.

    Raises:
        QuantizationError: a budget below what the smallest formats need; it says how much that is.
    """
    _spare_steps(_unmeasured(network, formats), target_bits_per_weight)


def choose(choices: Sequence[Choice], target_bits_per_weight: float) -> dict[str, str]:
    """The format of each layer that leaves the least divergence within the budget (multiple-choice knapsack).

    Raises:
        QuantizationError: a budget below what the smallest formats need; it says how much that is.
    """
    step, spare = _spare_steps(choices, target_bits_per_weight)
    best = np.zeros(spare + 1)
    taken: list[tuple[list[str], list[int], npt.NDArray[np.intp]]] = []
    for choice in choices:
        names = sorted(choice.bits, key=lambda name: (choice.bits[name], name))
        sizes = [int(np.ceil((choice.bits[name] - choice.bits[names[0]]) / step - 1e-9)) for name in names]
        table = np.full((len(names), spare + 1), np.inf)
        for row, (name, size) in enumerate(zip(names, sizes, strict=True)):
            if size <= spare:
                table[row, size:] = best[: spare + 1 - size] + choice.divergence[name]
        taken.append((names, sizes, table.argmin(axis=0)))
        best = table.min(axis=0)
    left, chosen = spare, {}
    for choice, (names, sizes, rows) in zip(reversed(choices), reversed(taken), strict=True):
        row = int(rows[left])
        left -= sizes[row]
        chosen.update(dict.fromkeys(choice.paths, names[row]))
    return {path: chosen[path] for choice in choices for path in choice.paths}


def with_choices(settings: QuantizationSettings, chosen: Mapping[str, str]) -> QuantizationSettings:
    """Settings that say of each layer what was chosen; overrides that were there still win."""
    exact = {f"^{re.escape(path)}$": name for path, name in chosen.items()}
    return dataclasses.replace(settings, overrides={**exact, **settings.overrides})


def recipe_text(settings: QuantizationSettings, choices: Sequence[Choice], chosen: Mapping[str, str], made: str) -> str:
    """A recipe (YAML) that packs the same formats again, with the table of what was measured as comments.

    Args:
        made: a line that says how it was made.
    """
    import yaml

    lines = [f"# {made}", "# KL divergence in bits a prediction when these layers alone are packed; * is what was chosen:"]
    for choice in choices:
        costs = [
            f"{name}{'*' if chosen[choice.paths[0]] == name else ''} {choice.divergence[name]:.6f}"
            for name in sorted(choice.bits, key=lambda name: choice.bits[name])
        ]
        lines.append(f"#   {', '.join(choice.paths)}: {'; '.join(costs)}")
    fields = {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}
    return "\n".join(lines) + "\n" + yaml.safe_dump(fields, sort_keys=False, width=200)


def _unmeasured(network: Network, formats: Sequence[str]) -> list[Choice]:
    """Every choice that a network has, with the sizes of its formats; only staying as it is has a known cost."""
    layers = linear_layers(network)
    groups: dict[str, list[str]] = {}
    for path, source in shared_inputs(network).items():
        if part_of(path) != "head":
            groups.setdefault(source, []).append(path)
    choices = []
    for paths in groups.values():
        shapes = [_shape(layers[path]) for path in paths]
        weights = sum(rows * columns for rows, columns in shapes)
        bits = {KEEP: 16.0 * weights}
        for name in formats:
            groups_of = [FORMATS[name].group_size_for(columns) for _, columns in shapes]
            sizes = [
                rows * columns * FORMATS[name].bits_per_weight(group)
                for (rows, columns), group in zip(shapes, groups_of, strict=True)
                if group is not None
            ]
            if len(sizes) == len(shapes):
                bits[name] = sum(sizes)
        choices.append(Choice(tuple(paths), weights, bits, {KEEP: 0.0}))
    return choices


def _spare_steps(choices: Sequence[Choice], target_bits_per_weight: float) -> tuple[float, int]:
    """The step of the budget in bits, and how many of them the smallest formats leave; QuantizationError if they do not fit."""
    if not 0 < target_bits_per_weight < math.inf:
        raise QuantizationError(f"bits a weight must be a number above 0, found {target_bits_per_weight:g}")
    weights = sum(choice.weights for choice in choices)
    least = sum(min(choice.bits.values()) for choice in choices)
    step = target_bits_per_weight * weights / BUDGET_STEPS
    # What has to be spent is not rounded: only what each choice adds to its smallest format is.
    spare = int((target_bits_per_weight * weights - least) / step + 1e-9)
    if spare < 0:
        needed = least / weights
        raise QuantizationError(f"{target_bits_per_weight:g} bits a weight are too few; the smallest formats need {needed:.2f}")
    return step, spare


def _shape(layer: Linear) -> tuple[int, int]:
    rows, columns = layer["weight"].shape
    return int(rows), int(columns)


def _divergence(network: Network, batches: Sequence[Any], wanted: Sequence[npt.NDArray[np.float32]], predict: Predict) -> float:
    total, count = 0.0, 0
    for each, expected in zip(batches, wanted, strict=True):
        found = np.array(predict(network, each))
        total += float((np.exp2(expected) * (expected - found)).sum(dtype=np.float64))
        count += expected.size // expected.shape[-1]
    return total / count


def _unpacked(layer: Linear, packed: Packed) -> Linear:
    plain = Linear(layer["weight"].shape[1], layer["weight"].shape[0], bias="bias" in layer)
    plain.update({**layer.parameters(), "weight": decode(packed)})
    return plain
