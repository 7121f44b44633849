"""Packs a network's linear layers and tables as planned, or unpacks them."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from marlin_cli.config import did_you_mean
from marlin_cli.errors import ConfigError, QuantizationError, UsageError
from marlin_cli.models import Network, architecture_of, matrices_of, set_modules
from marlin_cli.ops import Linear, PackedTable, QuantizedLinear, Table
from marlin_cli.quantization.balanced_keys import with_balanced_keys
from marlin_cli.quantization.encoders import decode
from marlin_cli.quantization.layers import LayerReport, check_columns, pack_layer, packed_of, type_name
from marlin_cli.quantization.methods import (
    METHODS,
    NEED_HESSIANS,
    NEED_SEQUENTIAL,
    NEED_STATISTICS,
    RESCALING,
    WITHOUT_OUTLIERS,
)
from marlin_cli.quantization.plan import (
    LayerPlan,
    QuantizationSettings,
    plan_layers,
    quantization_table,
)
from marlin_cli.quantization.scaled import Factors, rescaled, without_outliers
from marlin_cli.statistics import Statistics

FORMAT_VERSION = 1

AnyNetwork = TypeVar("AnyNetwork", bound=Network)


@dataclass(frozen=True)
class Quantized:
    """A packed copy of a network, its tables for config.json, and a report by layer."""

    network: Any
    quantization: dict[str, Any]
    marlin: dict[str, Any]
    layers: list[LayerReport]


def plan_network(network: Network, settings: QuantizationSettings) -> list[LayerPlan]:
    """The decisions for the layers of a network.

    Raises:
        QuantizationError: see `plan_layers`; or a layer is packed already.
    """
    layers = matrices_of(network)
    packed = [path for path, module in layers.items() if isinstance(module, (QuantizedLinear, PackedTable))]
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
    modules = matrices_of(network)
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
    """The network as its layers are packed, the decisions, and by path the factors of columns that were rescaled.

    awq rescales all channels, gptq those that stand out. Keys are balanced here, which no factor tells of: it scales
    rows, and every input stays as it was measured.

    Raises:
        ConfigError, UsageError, QuantizationError, StatisticsError: see `quantize_network`.
    """
    check_method(method, statistics)
    plans = plan_network(network, settings)
    if statistics is not None:
        for plan in plans:
            if plan.format is not None and plan.part != "hash":
                check_columns(plan, statistics)  # before factors are made of them
    if settings.balance_keys:
        if statistics is None:
            raise UsageError("--balance-keys needs statistics; make them with marlin calibrate and pass them with --stats")
        network = with_balanced_keys(network, statistics)
    factors: Factors = {}
    if method in RESCALING:
        assert statistics is not None
        network, factors = rescaled(network, plans, statistics, domain_weights)
    elif method in WITHOUT_OUTLIERS:
        assert statistics is not None
        network, factors = without_outliers(network, plans, lambda path: statistics.mean_square(path, domain_weights))
    return network, plans, factors


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
        "formats": settings.formats_of(plan.path for plan in plans),
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
        raise UsageError(f"method {method!r} needs statistics; make them with marlin calibrate and pass them with --stats")
    if method in NEED_HESSIANS and (statistics is None or not statistics.hessians):
        missing = "statistics" if statistics is None else "Hessians in the statistics"
        raise UsageError(
            f"method {method!r} needs {missing}; make them with marlin calibrate --hessian and pass them with --stats"
        )


def dequantize_network(network: Network, dtype: mx.Dtype = mx.bfloat16) -> Network:
    """A copy of `network` with every packed layer as a plain one in `dtype`.

    Raises:
        QuantizationError: no layer is packed.
    """
    swapped: list[tuple[str, nn.Module]] = []
    for path, module in matrices_of(network).items():
        if isinstance(module, (QuantizedLinear, PackedTable)):
            weight = decode(packed_of(module), mx.float32).astype(dtype)
            rows, columns = weight.shape
            table = isinstance(module, PackedTable)
            plain = Table(rows, columns) if table else Linear(columns, rows, bias="bias" in module)
            plain.weight = weight
            if "bias" in module:
                plain.bias = module["bias"]
            swapped.append((path, plain))
    if not swapped:
        raise QuantizationError("no layer of the model is packed; there is nothing to unpack")
    return copy_with(network, swapped)


def copy_with(network: AnyNetwork, modules: Sequence[tuple[str, nn.Module]]) -> AnyNetwork:
    """A network that shares the arrays of `network`, except in the modules given by path."""
    copy: AnyNetwork = architecture_of(network).network(network.config)
    set_modules(copy, [(path, module) for path, module in matrices_of(network).items()])
    set_modules(copy, list(modules))
    replaced = tuple(f"{path}." for path, _ in modules)
    kept = [(path, array) for path, array in tree_flatten(network.parameters()) if not path.startswith(replaced)]
    copy.load_weights(kept, strict=False)
    copy.eval()
    return copy


def kept_bytes(network: Network) -> dict[str, int]:
    """Bytes of everything but the linear layers' weights, by type: embeddings, positions, norms, start vectors, biases."""
    weights = {f"{path}.weight" for path in matrices_of(network)}
    sizes: Counter[str] = Counter()
    for path, array in tree_flatten(network.parameters()):
        sizes[type_name(array)] += 0 if path in weights else array.nbytes
    return {name: size for name, size in sizes.items() if size}
