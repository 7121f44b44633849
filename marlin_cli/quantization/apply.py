"""Packs a network's linear layers as planned, or unpacks them, and reports what it cost."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from marlin_cli.errors import QuantizationError
from marlin_cli.models import Network, linear_layers, set_modules
from marlin_cli.ops import Linear, QuantizedLinear
from marlin_cli.quantization.encoders import Packed, decode, encode, mlx_encode, scalar, squared_error
from marlin_cli.quantization.formats import format_of
from marlin_cli.quantization.plan import (
    LayerPlan,
    QuantizationSettings,
    plan_layers,
    quantization_table,
)
from marlin_cli.statistics import Statistics

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LayerReport:
    """What packing did to one layer. Squared errors are sums over its weights; None where nothing was packed."""

    plan: LayerPlan
    bytes_before: int
    bytes_after: int
    squared_weight: float | None = None
    squared_error: float | None = None
    mlx_squared_error: float | None = None  # of MLX's own encoder in the same format


@dataclass(frozen=True)
class PartReport:
    """Layers of one part and format together. Relative errors are RMS error over RMS weight."""

    part: str
    format: str
    layers: int
    weights: int
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    relative_error: float | None
    mlx_relative_error: float | None


@dataclass(frozen=True)
class Quantized:
    """A packed copy of a network, its tables for config.json, and a report by layer."""

    network: Network
    quantization: dict[str, Any]
    marlin: dict[str, Any]
    layers: list[LayerReport]


def plan_network(network: Network, settings: QuantizationSettings) -> list[LayerPlan]:
    """The decisions for the layers of a network.

    Raises:
        QuantizationError: see `plan_layers`; or a layer is packed already.
    """
    layers = linear_layers(network)
    packed = [path for path, module in layers.items() if isinstance(module, QuantizedLinear)]
    if packed:
        raise QuantizationError(f"{packed[0]!r} is packed already; unpack the model first (marlin quantize --dequantize)")
    return plan_layers({path: (module.weight.shape[0], module.weight.shape[1]) for path, module in layers.items()}, settings)


def quantize_network(
    network: Network,
    settings: QuantizationSettings,
    statistics: Statistics | None = None,
    *,
    on_layer: Callable[[LayerReport], None] | None = None,
) -> Quantized:
    """A copy of `network` with its layers packed by `settings`; errors are weighted by `statistics` when given.

    Args:
        on_layer: called after each layer, for progress.

    Raises:
        QuantizationError: a layer that cannot be packed as asked, or that holds NaN or infinite weights.
        StatisticsError: statistics that lack a layer.
    """
    plans = plan_network(network, settings)
    modules = linear_layers(network)
    swapped: list[tuple[str, nn.Module]] = []
    reports = []
    for plan in plans:
        module = modules[plan.path]
        if plan.format is not None:
            packed = _packed(module.weight, plan, statistics)
            swapped.append((plan.path, _layer(packed, module.get("bias"))))
            report = _report(module.weight, packed, plan)
        else:
            report = planned(plan)
        reports.append(report)
        if on_layer is not None:
            on_layer(report)
    result = copy_with(network, swapped)
    embeddings = [path for path, module in network.named_modules() if isinstance(module, nn.Embedding)]
    marlin = {
        "format_version": FORMAT_VERSION,
        "method": "mse" if statistics is None else "mse, weighted by statistics",
        "formats": settings.formats_of({plan.part for plan in plans}),
        "kv_bits": settings.kv_bits,
        "statistics": None if statistics is None else statistics.fingerprint(),
    }
    return Quantized(result, quantization_table(plans, sorted(embeddings)), marlin, reports)


def planned(plan: LayerPlan) -> LayerReport:
    """The sizes of a layer before (in 16 bits) and after, from its plan alone."""
    before = 2 * plan.rows * plan.columns
    if plan.format is None:
        return LayerReport(plan, before, before)
    return LayerReport(plan, before, round(plan.rows * plan.columns * plan.format.bits_per_weight(plan.group_size) / 8))


def dequantize_network(network: Network, dtype: mx.Dtype = mx.bfloat16) -> Network:
    """A copy of `network` with every packed layer as a plain one in `dtype`.

    Raises:
        QuantizationError: no layer is packed.
    """
    swapped: list[tuple[str, nn.Module]] = []
    for path, module in linear_layers(network).items():
        if isinstance(module, QuantizedLinear):
            weight = decode(packed_of(module), mx.float32).astype(dtype)
            plain = Linear(weight.shape[1], weight.shape[0], bias="bias" in module)
            plain.weight = weight
            if "bias" in module:
                plain.bias = module["bias"]
            swapped.append((path, plain))
    if not swapped:
        raise QuantizationError("no layer of the model is packed; there is nothing to unpack")
    return copy_with(network, swapped)


def packed_of(module: QuantizedLinear) -> Packed:
    """The packed weight inside a layer."""
    scale = module.get("global_scale")
    return Packed(
        weight=module["weight"],
        scales=module["scales"],
        biases=module.get("biases"),
        global_scale=None if scale is None else float(scale.item()),
        format=format_of(module.mode, module.bits),
        group_size=module.group_size,
    )


def copy_with(network: Network, modules: Sequence[tuple[str, nn.Module]]) -> Network:
    """A network that shares the arrays of `network`, except in the modules given by path."""
    copy: Network = type(network)(network.config)  # type: ignore[arg-type]  # its own configuration
    set_modules(copy, [(path, module) for path, module in linear_layers(network).items()])
    set_modules(copy, list(modules))
    replaced = tuple(f"{path}." for path, _ in modules)
    kept = [(path, array) for path, array in tree_flatten(network.parameters()) if not path.startswith(replaced)]
    copy.load_weights(kept, strict=False)
    copy.eval()
    return copy


def by_part(layers: Sequence[LayerReport]) -> list[PartReport]:
    """Layer reports gathered by part and format, in the order of the layers."""
    groups: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in layers:
        name = layer.plan.format.name if layer.plan.format else "16-bit"
        groups.setdefault((layer.plan.part, name), []).append(layer)
    return [_part(part, name, members) for (part, name), members in groups.items()]


def kept_bytes(network: Network) -> int:
    """Bytes of everything that is not a linear layer: embeddings, positions, norms, start vectors."""
    inside = tuple(f"{path}." for path in linear_layers(network))
    return sum(array.nbytes for path, array in tree_flatten(network.parameters()) if not path.startswith(inside))


def _part(part: str, name: str, members: Sequence[LayerReport]) -> PartReport:
    weights = sum(layer.plan.rows * layer.plan.columns for layer in members)
    after = sum(layer.bytes_after for layer in members)
    return PartReport(
        part=part,
        format=name,
        layers=len(members),
        weights=weights,
        bits_per_weight=after * 8 / weights,
        bytes_before=sum(layer.bytes_before for layer in members),
        bytes_after=after,
        relative_error=_relative([(layer.squared_error, layer.squared_weight) for layer in members]),
        mlx_relative_error=_relative([(layer.mlx_squared_error, layer.squared_weight) for layer in members]),
    )


def _relative(squares: Sequence[tuple[float | None, float | None]]) -> float | None:
    """RMS error over RMS weight from (squared error, squared weight) of each layer; None unless all were packed."""
    known = [(error, weight) for error, weight in squares if error is not None and weight is not None]
    if len(known) < len(squares):
        return None
    total = sum(weight for _, weight in known)
    return math.sqrt(sum(error for error, _ in known) / total) if total else 0.0


def _packed(weight: mx.array, plan: LayerPlan, statistics: Statistics | None) -> Packed:
    assert plan.format is not None
    importance = None if statistics is None else mx.array(statistics.mean_square(plan.path))
    if importance is not None and importance.shape != (plan.columns,):
        raise QuantizationError(
            f"{plan.path!r} has {plan.columns} input channels, the statistics have {importance.shape[0]}; they belong"
            " to another model"
        )
    try:
        return encode(weight, plan.format, plan.group_size, importance)
    except QuantizationError as error:
        raise QuantizationError(f"{plan.path!r}: {error}") from None


def _layer(packed: Packed, bias: mx.array | None) -> QuantizedLinear:
    arrays = {"weight": packed.weight, "scales": packed.scales, "biases": packed.biases, "bias": bias}
    if packed.global_scale is not None:
        arrays["global_scale"] = mx.array(packed.global_scale, dtype=mx.float32)
    present = {name: array for name, array in arrays.items() if array is not None}
    settings = packed.format
    return QuantizedLinear(present, group_size=packed.group_size, bits=settings.bits, mode=settings.mode)


def _report(weight: mx.array, packed: Packed, plan: LayerPlan) -> LayerReport:
    baseline = mlx_encode(weight, packed.format, packed.group_size)
    return LayerReport(
        plan=plan,
        bytes_before=weight.nbytes,
        bytes_after=packed.nbytes,
        squared_weight=scalar(mx.square(weight.astype(mx.float32)).sum()),
        squared_error=squared_error(weight, packed),
        mlx_squared_error=squared_error(weight, baseline),
    )
