"""What packing cost a model: byte by byte on held-out bytes, and layer by layer on the inputs of each domain."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.engine.scoring import log2_probabilities, of_bytes
from marlin_cli.models import Network, linear_layers
from marlin_cli.ops import QuantizedLinear
from marlin_cli.quality.held_out import Window
from marlin_cli.quality.quality import check_windows_fit, kl_divergence
from marlin_cli.quantization.encoders import decode
from marlin_cli.quantization.layers import LayerReport, packed_of
from marlin_cli.statistics import Statistics

# A packed weight further from the original than this many times its reported error was made from a rescaled one.
RESCALED = 2.0


@dataclass(frozen=True)
class DomainLoss:
    """The bytes of one domain, by both models.

    Attributes:
        bits_before, bits_after: bits that all bytes cost the original and the packed model.
        window_losses: bits per byte that each window costs the packed model more: [windows].
        divergences: KL(original || packed) of each byte's prediction, in bits: [bytes].
    """

    bits_before: float
    bits_after: float
    window_losses: npt.NDArray[np.float64]
    divergences: npt.NDArray[np.float32]

    @property
    def bytes(self) -> int:
        """Bytes scored."""
        return len(self.divergences)

    @property
    def standard_error(self) -> float | None:
        """Of the mean of `window_losses`; None of a single window."""
        windows = len(self.window_losses)
        return float(self.window_losses.std(ddof=1)) / math.sqrt(windows) if windows > 1 else None


def loss_by_domain(
    original: Network,
    packed: Network,
    windows: Mapping[str, Sequence[Window]],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> dict[str, DomainLoss]:
    """Score windows (by domain), each from an empty context, with both models.

    Raises:
        UsageError: a window longer than the context.
    """
    check_windows_fit({"the packed model": packed}, windows, original)
    losses = {}
    for domain, part in sorted(windows.items()):
        bits: list[tuple[float, float]] = []
        divergences = []
        for window in part:
            ids = mx.array(window.read().astype(np.int32))[None]
            expected, predicted = log2_probabilities(original, ids), log2_probabilities(packed, ids)
            bits.append((_cost(original, expected, ids), _cost(packed, predicted, ids)))
            divergences.append(np.array(kl_divergence(expected, predicted)[0]))
            on_bytes(window.length)
        costs, lengths = np.array(bits), np.array([window.length for window in part])
        before, after = costs.sum(axis=0).tolist()
        losses[domain] = DomainLoss(before, after, (costs[:, 1] - costs[:, 0]) / lengths, np.concatenate(divergences))
    return losses


def _cost(network: Network, log2_predictions: mx.array, window: mx.array) -> float:
    """Bits that the bytes of a window [1, length] cost."""
    return -float(np.array(of_bytes(network, log2_predictions, window)).sum(dtype=np.float64))


def output_errors(
    original: Network, packed: Network, layers: Sequence[LayerReport], statistics: Statistics
) -> dict[str, dict[str, float]]:
    """By layer and domain: squared error of the output over its square, on the calibration's inputs of that domain.

    With Hessians it is that of x^T x, else that of the mean square of each channel, which takes channels as unrelated.
    Layers whose weights the method rescaled or rotated before it packed them are left out: their inputs have changed.
    """
    plain, swapped = linear_layers(original), linear_layers(packed)
    errors: dict[str, dict[str, float]] = {}
    for layer in layers:
        path, module = layer.plan.path, swapped.get(layer.plan.path)
        if not isinstance(module, QuantizedLinear):
            continue
        weight = np.array(plain[path]["weight"].astype(mx.float32))
        error = weight - np.array(decode(packed_of(module)))
        if _is_rescaled(layer, error):
            continue
        errors[path] = {domain: _relative(weight, error, statistics, path, domain) for domain in statistics.domains}
    return errors


def _is_rescaled(layer: LayerReport, error: npt.NDArray[np.float32]) -> bool:
    return layer.squared_error is not None and float(np.square(error).sum()) > RESCALED**2 * layer.squared_error


def _relative(
    weight: npt.NDArray[np.float32], error: npt.NDArray[np.float32], statistics: Statistics, path: str, domain: str
) -> float:
    hessian = statistics.hessian(path, {domain: 1.0})
    if hessian is not None:
        wide = hessian.astype(np.float32)
        lost, whole = (float(np.einsum("ij,ij->", each @ wide, each, dtype=np.float64)) for each in (error, weight))
    else:
        mean_square = statistics.mean_square(path, {domain: 1.0})
        lost, whole = (float((np.square(each) @ mean_square).sum(dtype=np.float64)) for each in (error, weight))
    return lost / whole if whole > 0 and math.isfinite(lost) else 0.0
