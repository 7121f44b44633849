"""One linear layer, or table, packed by its plan and a method, and what that did to it."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.errors import QuantizationError
from marlin_cli.ops import PackedTable, QuantizedLinear
from marlin_cli.quantization.encoders import Packed, mlx_encode, squared_error, squared_sum
from marlin_cli.quantization.formats import format_of
from marlin_cli.quantization.methods import METHODS
from marlin_cli.quantization.methods.gptq import output_error
from marlin_cli.quantization.plan import KEEP, LayerPlan
from marlin_cli.statistics import Statistics


@dataclass(frozen=True)
class LayerReport:
    """What packing did to one layer's weight. Squared errors are sums over its numbers; None where nothing was packed."""

    plan: LayerPlan
    bytes_before: int
    bytes_after: int
    squared_weight: float | None = None
    squared_error: float | None = None
    mlx_squared_error: float | None = None  # of MLX's own encoder in the same format
    output_error: float | None = None  # squared error of the output over its square, by x^T x; None without it
    mlx_output_error: float | None = None
    kept_as: str | None = None  # the type that it is stored in, where it stays as it is

    @property
    def format(self) -> str:
        """The name of its format, or of the type that it stays in."""
        return self.plan.format.name if self.plan.format is not None else self.kept_as or KEEP


def pack_layer(
    weight: mx.array,
    bias: mx.array | None,
    plan: LayerPlan,
    statistics: Statistics | None = None,
    *,
    method: str = "mse",
    domain_weights: Mapping[str, float] | None = None,
    factor: npt.NDArray[np.float32] | None = None,
) -> tuple[QuantizedLinear | PackedTable | None, LayerReport]:
    """One layer packed by its plan (None where it stays as it is), and what that did to it.

    Args:
        weight: [rows, columns].
        factor: [columns] that the weight was multiplied by after the statistics were measured.

    Raises:
        QuantizationError, StatisticsError: see `apply.quantize_network`.
    """
    if plan.format is None:
        return None, planned(plan, weight)
    if plan.part == "hash":  # rows are looked up, and multiplied by nothing: no input weighs their errors
        packed = pack_weight(weight, plan, method if method == "rtn" else "mse", None, None)
        return packed_table(packed), report_of(weight, packed, plan, None)
    hessian = None if statistics is None else statistics.hessian(plan.path, domain_weights)
    importance = None if statistics is None else _importance(plan, statistics, domain_weights)
    if factor is not None:
        importance = None if importance is None else importance / mx.array(factor**2)
        hessian = None if hessian is None else hessian / np.outer(factor, factor)
    packed = pack_weight(weight, plan, method, importance, hessian)
    return packed_layer(packed, bias), report_of(weight, packed, plan, hessian)


def pack_rows(blocks: Iterable[mx.array], plan: LayerPlan, method: str) -> Iterator[tuple[dict[str, mx.array], LayerReport]]:
    """A table that comes some rows at a time, packed as `pack_layer` does it (or as it is): arrays of rows, and their report.

    Raises:
        QuantizationError: as `pack_layer`; or a format with one scale for all rows.
    """
    for rows in blocks:
        if plan.format is None:
            yield {"weight": rows}, planned(plan, rows)
            continue
        if plan.format.layer_bytes:
            raise QuantizationError(f"{plan.path!r}: {plan.format.name} has one scale of the whole table, which comes by rows")
        layer, report = pack_layer(rows, None, plan, method=method)
        assert layer is not None
        arrays = {name: layer[name] for name in layer}
        mx.eval(arrays)
        yield arrays, report


def added(reports: Sequence[LayerReport]) -> LayerReport:
    """The report of a table whose rows have these."""

    def total(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(reports) else None

    return replace(
        reports[0],
        bytes_before=sum(each.bytes_before for each in reports),
        bytes_after=sum(each.bytes_after for each in reports),
        squared_weight=total(each.squared_weight for each in reports),
        squared_error=total(each.squared_error for each in reports),
        mlx_squared_error=total(each.mlx_squared_error for each in reports),
    )


def planned(plan: LayerPlan, weight: mx.array) -> LayerReport:
    """The sizes of a layer's weight before, as it is stored, and after, from its plan; nothing of it is read."""
    if plan.format is None:
        return LayerReport(plan, weight.nbytes, weight.nbytes, kept_as=type_name(weight))
    return LayerReport(plan, weight.nbytes, plan.format.bytes_of(plan.rows * plan.columns, plan.group_size))


def type_name(array: mx.array) -> str:
    """The type of an array's numbers, such as float32."""
    return str(array.dtype).removeprefix("mlx.core.")


def pack_weight(
    weight: mx.array,
    plan: LayerPlan,
    method: str,
    importance: mx.array | None,
    hessian: npt.NDArray[np.float64] | None,
) -> Packed:
    """`weight` [rows, columns] by a method's name, as planned.

    Args:
        importance: mean square of each column of its input.
        hessian: mean of x^T x of its input.

    Raises:
        QuantizationError: as the method; it names the layer.
    """
    assert plan.format is not None
    try:
        return METHODS[method](weight, plan.format, plan.group_size, importance, hessian)
    except QuantizationError as error:
        raise QuantizationError(f"{plan.path!r}: {error}") from None


def packed_layer(packed: Packed, bias: mx.array | None) -> QuantizedLinear:
    """A linear layer of a packed weight."""
    own = {} if bias is None else {"bias": bias}
    settings = packed.format
    return QuantizedLinear({**_arrays(packed), **own}, group_size=packed.group_size, bits=settings.bits, mode=settings.mode)


def packed_table(packed: Packed) -> PackedTable:
    """A table of a packed weight."""
    return PackedTable(_arrays(packed), group_size=packed.group_size, bits=packed.format.bits, mode=packed.format.mode)


def _arrays(packed: Packed) -> dict[str, mx.array]:
    arrays = {"weight": packed.weight, "scales": packed.scales, "biases": packed.biases}
    if packed.global_scale is not None:
        arrays["global_scale"] = mx.array(packed.global_scale, dtype=mx.float32)
    return {name: array for name, array in arrays.items() if array is not None}


def packed_of(module: QuantizedLinear | PackedTable) -> Packed:
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


def report_of(weight: mx.array, packed: Packed, plan: LayerPlan, hessian: npt.NDArray[np.float64] | None) -> LayerReport:
    """What packing `weight` cost, beside what MLX's own encoder would have (None where that gives no finite number).

    Raises:
        QuantizationError: the packed weight or its error is not finite; the layer is named.
    """
    baseline = mlx_encode(weight, packed.format, packed.group_size)
    ours = theirs = None
    if hessian is not None:
        original = np.array(weight.astype(mx.float32))
        energy = float(np.einsum("ij,ij->", original @ hessian, original)) or 1.0
        ours = output_error(original, packed, hessian) / energy
        theirs = output_error(original, baseline, hessian) / energy
    squared_weight = squared_sum(weight)
    error, of_mlx = squared_error(weight, packed), squared_error(weight, baseline)
    if not all(math.isfinite(value) for value in (squared_weight, error, 0.0 if ours is None else ours)):
        raise QuantizationError(
            f"{plan.path!r}: as {packed.format.name} its error is not finite; its weights, or the inputs that were measured,"
            " are beyond float32; keep it in 16 bits, or calibrate again"
        )
    return LayerReport(
        plan=plan,
        bytes_before=weight.nbytes,
        bytes_after=packed.nbytes,
        squared_weight=squared_weight,
        squared_error=error,
        mlx_squared_error=of_mlx if math.isfinite(of_mlx) else None,
        output_error=ours,
        mlx_output_error=theirs if theirs is not None and math.isfinite(theirs) else None,
    )


def check_columns(plan: LayerPlan, statistics: Statistics) -> None:
    """See that the statistics are of inputs as wide as a layer's.

    Raises:
        QuantizationError: they are of other channels.
        StatisticsError: they have no such layer.
    """
    channels = len(statistics.absolute_maximum(plan.path))
    if channels != plan.columns:
        raise QuantizationError(
            f"{plan.path!r} has {plan.columns} input channels, the statistics have {channels}; they belong to another model"
        )


def _importance(plan: LayerPlan, statistics: Statistics, domain_weights: Mapping[str, float] | None) -> mx.array:
    check_columns(plan, statistics)
    return mx.array(statistics.mean_square(plan.path, domain_weights))
