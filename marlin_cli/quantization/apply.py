"""Packs a network's linear layers as planned, or unpacks them, and reports what it cost."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from marlin_cli.config import did_you_mean
from marlin_cli.errors import ConfigError, QuantizationError, UsageError
from marlin_cli.models import Network, linear_layers, set_modules
from marlin_cli.ops import Linear, QuantizedLinear
from marlin_cli.quantization.balanced_keys import with_balanced_keys
from marlin_cli.quantization.encoders import Packed, decode, mlx_encode, scalar, squared_error
from marlin_cli.quantization.formats import format_of
from marlin_cli.quantization.methods import METHODS, NEED_HESSIANS, NEED_SEQUENTIAL, NEED_STATISTICS, RESCALING
from marlin_cli.quantization.methods.gptq import output_error
from marlin_cli.quantization.plan import (
    LayerPlan,
    QuantizationSettings,
    plan_layers,
    quantization_table,
)
from marlin_cli.quantization.scaled import Factors, rescaled
from marlin_cli.statistics import Statistics

FORMAT_VERSION = 1

AnyNetwork = TypeVar("AnyNetwork", bound=Network)


@dataclass(frozen=True)
class LayerReport:
    """What packing did to one layer. Squared errors are sums over its weights; None where nothing was packed."""

    plan: LayerPlan
    bytes_before: int
    bytes_after: int
    squared_weight: float | None = None
    squared_error: float | None = None
    mlx_squared_error: float | None = None  # of MLX's own encoder in the same format
    output_error: float | None = None  # squared error of the output over its square, by x^T x; None without it
    mlx_output_error: float | None = None


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
    method: str = "mse",
    domain_weights: Mapping[str, float] | None = None,
    on_layer: Callable[[LayerReport], None] | None = None,
) -> Quantized:
    """A copy of `network` with its layers packed by `settings`; errors are weighted by `statistics` when given.

    Args:
        method: a name in `METHODS`.
        domain_weights: share of each domain of the statistics, see `Statistics.mean_square`.
        on_layer: called after each layer, for progress.

    Raises:
        ConfigError: no such method.
        UsageError: the method needs statistics, or Hessians in them, that are not there.
        QuantizationError: a layer that cannot be packed as asked, or that holds NaN or infinite weights.
        StatisticsError: statistics that lack a layer or a domain.
    """
    network, plans, factors = prepared(network, settings, statistics, method=method, domain_weights=domain_weights)
    modules = linear_layers(network)
    swapped: list[tuple[str, nn.Module]] = []
    reports = []
    for plan in plans:
        module = modules[plan.path]
        layer, report = pack_layer(
            module.weight, module.get("bias"), plan, statistics, method=method, domain_weights=domain_weights,
            factor=factors.get(plan.path),
        )  # fmt: skip
        if layer is not None:
            swapped.append((plan.path, layer))
        reports.append(report)
        if on_layer is not None:
            on_layer(report)
    result = copy_with(network, swapped)
    embeddings = [path for path, module in network.named_modules() if isinstance(module, nn.Embedding)]
    marlin = marlin_table(settings, plans, statistics, method, domain_weights)
    return Quantized(result, quantization_table(plans, sorted(embeddings)), marlin, reports)


def prepared(
    network: Network,
    settings: QuantizationSettings,
    statistics: Statistics | None,
    *,
    method: str,
    domain_weights: Mapping[str, float] | None,
) -> tuple[Network, list[LayerPlan], Factors]:
    """The network as its layers are packed, the decisions, and by path the factors of columns that awq has rescaled.

    Keys are balanced here, which no factor tells of: it scales rows, and every input stays as it was measured.

    Raises:
        ConfigError, UsageError, QuantizationError, StatisticsError: see `quantize_network`.
    """
    check_method(method, statistics)
    plans = plan_network(network, settings)
    if settings.balance_keys:
        if statistics is None:
            raise UsageError("--balance-keys needs statistics; make them with marlin calibrate, give --stats")
        network = with_balanced_keys(network, statistics)
    if method not in RESCALING:
        return network, plans, {}
    assert statistics is not None
    network, factors = rescaled(network, plans, statistics, domain_weights)
    return network, plans, factors


def pack_layer(
    weight: mx.array,
    bias: mx.array | None,
    plan: LayerPlan,
    statistics: Statistics | None = None,
    *,
    method: str = "mse",
    domain_weights: Mapping[str, float] | None = None,
    factor: npt.NDArray[np.float32] | None = None,
) -> tuple[QuantizedLinear | None, LayerReport]:
    """One layer packed by its plan (None where it stays as it is), and what that did to it.

    Args:
        weight: [rows, columns].
        factor: [columns] that the weight was multiplied by after the statistics were measured.

    Raises:
        QuantizationError, StatisticsError: see `quantize_network`.
    """
    if plan.format is None:
        return None, planned(plan)
    hessian = None if statistics is None else statistics.hessian(plan.path, domain_weights)
    importance = None if statistics is None else _importance(plan, statistics, domain_weights)
    if factor is not None:
        importance = None if importance is None else importance / mx.array(factor**2)
        hessian = None if hessian is None else hessian / np.outer(factor, factor)
    packed = _packed(weight, plan, method, importance, hessian)
    return packed_layer(packed, bias), _report(weight, packed, plan, hessian)


def marlin_table(
    settings: QuantizationSettings,
    plans: Sequence[LayerPlan],
    statistics: Statistics | None,
    method: str,
    domain_weights: Mapping[str, float] | None,
) -> dict[str, Any]:
    """Marlin's own table of config.json: how the model was packed."""
    table = {
        "format_version": FORMAT_VERSION,
        "method": method if statistics is None else f"{method}, weighted by statistics",
        "formats": settings.formats_of({plan.part for plan in plans}),
        "kv_bits": settings.kv_bits,
        "statistics": None if statistics is None else statistics.fingerprint(),
    }
    if settings.balance_keys:
        table["balanced_keys"] = True
    if domain_weights is not None:
        table["domain_weights"] = dict(domain_weights)
    return table


def check_method(method: str, statistics: Statistics | None) -> None:
    """Raise what `quantize_network` would raise about its method."""
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}{did_you_mean(method, METHODS)}")
    if method in NEED_SEQUENTIAL:
        raise UsageError(f"method {method!r} measures the inputs of the network that it has changed; add --sequential")
    if method in NEED_STATISTICS and statistics is None:
        raise UsageError(f"method {method!r} needs statistics; make them with marlin calibrate, give --stats")
    if method in NEED_HESSIANS and (statistics is None or not statistics.hessians):
        missing = "statistics" if statistics is None else "Hessians in the statistics"
        raise UsageError(f"method {method!r} needs {missing}; make them with marlin calibrate --hessian, give --stats")


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


def copy_with(network: AnyNetwork, modules: Sequence[tuple[str, nn.Module]]) -> AnyNetwork:
    """A network that shares the arrays of `network`, except in the modules given by path."""
    copy = type(network)(network.config)  # type: ignore[arg-type]  # its own configuration
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


def worst_layers(layers: Sequence[LayerReport], most: int = 10) -> list[LayerReport]:
    """The layers whose output suffers most, worst first; those without a measured error are left out."""
    measured = [layer for layer in layers if layer.output_error is not None]
    return sorted(measured, key=lambda layer: -(layer.output_error or 0.0))[:most]


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


def _importance(plan: LayerPlan, statistics: Statistics, domain_weights: Mapping[str, float] | None) -> mx.array:
    importance = mx.array(statistics.mean_square(plan.path, domain_weights))
    if importance.shape != (plan.columns,):
        raise QuantizationError(
            f"{plan.path!r} has {plan.columns} input channels, the statistics have {importance.shape[0]}; they belong"
            " to another model"
        )
    return importance


def _packed(
    weight: mx.array,
    plan: LayerPlan,
    method: str,
    importance: mx.array | None,
    hessian: npt.NDArray[np.float64] | None,
) -> Packed:
    assert plan.format is not None
    try:
        return METHODS[method](weight, plan.format, plan.group_size, importance, hessian)
    except QuantizationError as error:
        raise QuantizationError(f"{plan.path!r}: {error}") from None


def packed_layer(packed: Packed, bias: mx.array | None) -> QuantizedLinear:
    """A linear layer of a packed weight."""
    arrays = {"weight": packed.weight, "scales": packed.scales, "biases": packed.biases, "bias": bias}
    if packed.global_scale is not None:
        arrays["global_scale"] = mx.array(packed.global_scale, dtype=mx.float32)
    present = {name: array for name, array in arrays.items() if array is not None}
    settings = packed.format
    return QuantizedLinear(present, group_size=packed.group_size, bits=settings.bits, mode=settings.mode)


def _report(weight: mx.array, packed: Packed, plan: LayerPlan, hessian: npt.NDArray[np.float64] | None) -> LayerReport:
    baseline = mlx_encode(weight, packed.format, packed.group_size)
    ours = theirs = None
    if hessian is not None:
        original = np.array(weight.astype(mx.float32))
        energy = float(np.einsum("ij,ij->", original @ hessian, original)) or 1.0
        ours = output_error(original, packed, hessian) / energy
        theirs = output_error(original, baseline, hessian) / energy
    return LayerReport(
        plan=plan,
        bytes_before=weight.nbytes,
        bytes_after=packed.nbytes,
        squared_weight=scalar(mx.square(weight.astype(mx.float32)).sum()),
        squared_error=squared_error(weight, packed),
        mlx_squared_error=squared_error(weight, baseline),
        output_error=ours,
        mlx_output_error=theirs,
    )
