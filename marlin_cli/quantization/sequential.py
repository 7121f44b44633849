"""Packs a MegaByte layer after layer on calibration bytes: each layer sees what the packed layers before it leave.

Statistics of the 16-bit network say what a layer's input was; after packing it is something else. Here two networks run
side by side, the original and the packed one as far as it is packed, and a layer's weight is first fitted by least
squares so that on the packed network's input x it gives what the original gives on its own, and then packed with x^T x
of the packed network (asymmetric calibration, GPTAQ, arXiv 2504.02692). Layers that add to the residual stream are
fitted to what is missing in the stream too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from marlin_cli.errors import QuantizationError, UsageError
from marlin_cli.models import linear_layers, set_modules
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.quantization.apply import FORMAT_VERSION, Quantized, copy_with, plan_network
from marlin_cli.quantization.encoders import decode
from marlin_cli.quantization.layers import LayerReport, pack_weight, packed_layer, planned, report_of
from marlin_cli.quantization.methods import NEED_SEQUENTIAL
from marlin_cli.quantization.methods.hadamard import rotated
from marlin_cli.quantization.plan import LayerPlan, QuantizationSettings, quantization_table
from marlin_cli.quantization.windows import Batch
from marlin_cli.statistics.collect import shared_inputs

Matrix = npt.NDArray[np.float64]

# Layers whose output is added to the stream that their block began with, or that attention left.
RESIDUAL = ("o_proj", "down_proj")

# Of the mean diagonal of x^T x, in the fit: it keeps the weight near the original where inputs say little.
FIT_DAMPING = 0.01


@dataclass
class _Sums:
    """Sums over rows x of a layer's input in the packed network: what the fit and `gptq` need."""

    weight: float
    square: Matrix  # x^T x [channels, channels]
    drift: Matrix  # (original's input - x)^T x [channels, channels]
    missing: Matrix | None  # (original's stream - the packed network's)^T x [rows, channels]


class _Observed(nn.Module):
    """A linear layer that keeps its last input and output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._input: mx.array | None = None
        self._output: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        self._input = x
        self._output = self.layer(x)
        return self._output

    @property
    def seen(self) -> tuple[mx.array, mx.array]:
        """Input and output of the last call."""
        assert self._input is not None and self._output is not None
        return self._input, self._output


def quantize_sequentially(
    network: MegaByte,
    settings: QuantizationSettings,
    batches: Sequence[Batch],
    *,
    method: str = "gptq",
    domain_weights: Mapping[str, float] | None = None,
    on_layer: Callable[[LayerReport], None] | None = None,
) -> Quantized:
    """A copy of `network` with its layers packed by `settings`, in the order that bytes pass them.

    Memory: the rows of one stage in both networks, 8 x width bytes a row; for the local stage a row is a byte.

    Args:
        batches: calibration bytes.
        method: a name in `METHODS` other than awq; gptq+hadamard packs the rotated network.
        domain_weights: share of each domain in the sums; the rows seen of each if None. One that is left out counts
            nothing.

    Raises:
        UsageError: keys are to be balanced, which takes statistics.
        QuantizationError: no calibration bytes, or what `quantize_network` raises.
    """
    if settings.balance_keys:
        raise UsageError("--balance-keys takes the keys' ranges from --stats, which --sequential goes without")
    weights = _weights(batches, domain_weights)
    if not any(weights):
        raise QuantizationError("no calibration bytes to pack the layers on")
    if method in NEED_SEQUENTIAL:
        network = rotated(network)
    run = _Run(network, plan_network(network, settings), method, batches, weights, on_layer)
    for number in range(len(run.student.stages)):
        run.pack_stage(number)
    embeddings = [path for path, module in network.named_modules() if isinstance(module, nn.Embedding)]
    plans = list(run.plans.values())
    marlin = {
        "format_version": FORMAT_VERSION,
        "method": f"{method}, sequential on {sum(windows.size for _, windows in batches):,} bytes",
        "formats": settings.formats_of({plan.part for plan in plans}),
        "kv_bits": settings.kv_bits,
        "statistics": None,
    }
    if domain_weights is not None:
        marlin["domain_weights"] = dict(domain_weights)
    reports = [run.reports.get(plan.path) or planned(plan) for plan in plans]
    return Quantized(copy_with(network, run.packed), quantization_table(plans, sorted(embeddings)), marlin, reports)


def _weights(batches: Sequence[Batch], domain_weights: Mapping[str, float] | None) -> list[float]:
    """The weight of a row of each batch."""
    if domain_weights is None:
        return [1.0] * len(batches)
    total: dict[str, int] = {}
    for domain, windows in batches:
        total[domain] = total.get(domain, 0) + windows.size
    unknown = sorted(set(domain_weights) - set(total))
    if unknown:
        raise QuantizationError(f"no domain {unknown[0]!r} in the calibration bytes; there are {', '.join(sorted(total))}")
    weights = [domain_weights.get(domain, 0.0) / total[domain] for domain, _ in batches]
    # Scaled so that a domain alone gives, to the last bit, what its bytes give without weights.
    return [weight / (max(weights) or 1.0) for weight in weights]


class _Run:
    """Both networks, and what has been packed so far."""

    def __init__(
        self,
        network: MegaByte,
        plans: Sequence[LayerPlan],
        method: str,
        batches: Sequence[Batch],
        weights: Sequence[float],
        on_layer: Callable[[LayerReport], None] | None,
    ) -> None:
        self.plans, self.method, self.on_layer = {plan.path: plan for plan in plans}, method, on_layer
        self.original = linear_layers(network)
        self.teacher, self.student = _in_float32(network), _in_float32(network)
        used = [(windows, weight) for (_, windows), weight in zip(batches, weights, strict=True) if weight > 0]
        self.ids = [mx.array(windows.astype(np.int32)) for windows, _ in used]
        self.weights = [weight for _, weight in used]
        # Hidden rows of the stages that are done: [batch][stage], of the teacher and of the student.
        self.hidden: list[tuple[list[mx.array], list[mx.array]]] = [([], []) for _ in used]
        self.reports: dict[str, LayerReport] = {}
        self.packed: list[tuple[str, nn.Module]] = []
        self.groups: dict[str, list[str]] = {}
        for path, source in shared_inputs(network).items():
            self.groups.setdefault(source, []).append(path)

    def pack_stage(self, number: int) -> None:
        """Pack what leads to stage `number`, then its blocks, and keep its hidden rows."""
        before, this = self.student.stages[max(number - 1, 0)], self.student.stages[number]
        names = {id(module): path for path, module in self.student.named_modules()}
        for layer in (before.to_next if number else None, this.patch_projection):
            if layer is not None:
                self._pack(names[id(layer)], lambda: self._leading_rows(number))
        rows = list(self._leading_rows(number))
        mx.eval(rows)
        stacks = self.teacher.stages[number].stack, this.stack
        for block, module in enumerate(this.stack.layers):

            def outputs(block: int = block) -> Iterator[tuple[mx.array, mx.array]]:
                for pair in rows:
                    yield stacks[0].layers[block](pair[0]), stacks[1].layers[block](pair[1])

            prefix = names[id(module)]
            for source in [source for source in self.groups if source.startswith(f"{prefix}.")]:
                self._pack(source, outputs, rows)
            for index, pair in enumerate(outputs()):
                mx.eval(pair)
                rows[index] = pair
        for kept, pair in zip(self.hidden, rows, strict=True):
            for hidden, stack, output in zip(kept, stacks, pair, strict=True):
                hidden.append(stack.norm(output) if "norm" in stack else output)
            mx.eval(kept)

    def _leading_rows(self, number: int) -> Iterator[tuple[mx.array, mx.array]]:
        """The rows that enter stage `number` in the teacher and in the student, a batch at a time."""
        for ids, kept in zip(self.ids, self.hidden, strict=True):
            yield _rows_at(self.teacher, ids, number, kept[0]), _rows_at(self.student, ids, number, kept[1])

    def _pack(
        self,
        source: str,
        outputs: Callable[[], Iterator[tuple[mx.array, mx.array]]],
        streams: Sequence[tuple[mx.array, mx.array]] | None = None,
    ) -> None:
        """Pack the layers that see the input of `source`.

        Args:
            outputs: runs both networks through the layer, a batch at a time; only what the sums need is evaluated.
            streams: what entered the block, where the layer is in one.
        """
        members = [path for path in self.groups[source] if self.plans[path].format is not None]
        if not members:
            return
        sums = self._sums(source, outputs, streams)
        hessian = sums.square / sums.weight
        importance = mx.array(np.diag(hessian).astype(np.float32))
        damped = sums.square + FIT_DAMPING * np.diag(sums.square).mean() * np.eye(len(hessian))
        shift = np.linalg.solve(damped, sums.drift.T).T
        missing = None if sums.missing is None else np.linalg.solve(damped, sums.missing.T).T
        for path in members:
            plan, module = self.plans[path], self.original[path]
            weight = np.array(module["weight"].astype(mx.float32))
            fitted = weight + weight @ shift
            if missing is not None:
                fitted = fitted + missing
            packed = pack_weight(mx.array(fitted.astype(np.float32)), plan, self.method, importance, hessian)
            self.packed.append((path, packed_layer(packed, module.get("bias"))))
            plain = linear_layers(self.student)[path]
            plain["weight"] = decode(packed)
            report = report_of(module["weight"], packed, plan, hessian)
            self.reports[path] = report
            if self.on_layer is not None:
                self.on_layer(report)

    def _sums(
        self,
        source: str,
        outputs: Callable[[], Iterator[tuple[mx.array, mx.array]]],
        streams: Sequence[tuple[mx.array, mx.array]] | None,
    ) -> _Sums:
        parent, _, name = source.rpartition(".")
        residual = name in RESIDUAL and streams is not None
        watched = [source]
        if residual and name == "down_proj":  # the stream it adds to is the block's input and what attention added
            watched.append(f"{parent.rpartition('.')[0]}.attention.o_proj")
        networks = self.teacher, self.student
        observers = [{path: _Observed(linear_layers(network)[path]) for path in watched} for network in networks]
        channels = self.plans[source].columns
        square, drift = np.zeros((channels, channels)), np.zeros((channels, channels))
        missing = np.zeros((self.plans[source].rows, channels)) if residual else None
        total = 0.0
        try:
            for network, watching in zip(networks, observers, strict=True):
                set_modules(network, list(watching.items()))
            for index, _ in enumerate(outputs()):
                weight = self.weights[index]
                seen = [watching[source].seen[0] for watching in observers]
                arrays = [_flat(array) for array in seen]
                if missing is not None:
                    assert streams is not None
                    at = [_flat(array) for array in streams[index]]
                    if len(watched) > 1:
                        at = [
                            stream + _flat(watching[watched[1]].seen[1]) for stream, watching in zip(at, observers, strict=True)
                        ]
                    arrays.append(at[0] - at[1])
                mx.eval(arrays)
                rows = [np.array(array) for array in arrays]
                total += weight * len(rows[1])
                square += weight * (rows[1].T @ rows[1])
                drift += weight * ((rows[0] - rows[1]).T @ rows[1])
                if missing is not None:
                    missing += weight * (rows[2].T @ rows[1])
        finally:
            for network, watching in zip(networks, observers, strict=True):
                set_modules(network, [(path, observer.layer) for path, observer in watching.items()])
        return _Sums(total, square, drift, missing)


def _rows_at(network: MegaByte, ids: mx.array, number: int, hidden: Sequence[mx.array]) -> mx.array:
    """The rows that enter stage `number`, from the hidden rows of the stages before it."""
    found: list[mx.array] = []

    def run(stage: int, rows: mx.array) -> mx.array:
        if stage == number:
            found.append(rows)
        return hidden[stage] if stage < number else rows

    network(ids, run)
    return found[0]


def _flat(array: mx.array) -> mx.array:
    return array.reshape(-1, array.shape[-1])


def _in_float32(network: MegaByte) -> MegaByte:
    """A copy whose linear layers are its own, with everything in float32."""
    copy = MegaByte(network.config)
    copy.load_weights([(path, array.astype(mx.float32)) for path, array in tree_flatten(network.parameters())])
    copy.eval()
    return copy
